data_root = "../shared/data/bccd"

train_pipeline = [
    dict(type="MosaicAffine", size=320, scale=(0.5, 1.5), translate=0.1),
    dict(type="HSVGain", hue=0.015, saturation=0.7, value=0.4),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
# "instances" lets CocoMetric score a data set that has no COCO JSON
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "pad_param", "instances")
test_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LetterBox", size=320, rect=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=meta_keys),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="stacked_collate"),
    dataset=dict(
        type="VOCDetDataset",
        data_root=data_root,
        ann_file="ImageSets/Main/train.txt",
        cache="ram",
        photo_side=320,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="VOCDetDataset",
        data_root=data_root,
        ann_file="ImageSets/Main/val.txt",
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="VOCDetDataset",
        data_root=data_root,
        ann_file="ImageSets/Main/test.txt",
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator
