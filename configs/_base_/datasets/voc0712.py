_base_ = "pipelines_640.py"

data_root = "data/VOCdevkit/"

train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="stacked_collate"),
    dataset=dict(
        type="ConcatDataset",
        ignore_keys=["dataset_type"],
        datasets=[
            dict(
                type="VOCDetDataset",
                data_root=data_root + "VOC2007",
                ann_file="ImageSets/Main/trainval.txt",
                pipeline=_base_.train_pipeline,
            ),
            dict(
                type="VOCDetDataset",
                data_root=data_root + "VOC2012",
                ann_file="ImageSets/Main/trainval.txt",
                pipeline=_base_.train_pipeline,
            ),
        ],
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="VOCDetDataset",
        data_root=data_root + "VOC2007",
        ann_file="ImageSets/Main/test.txt",
        test_mode=True,
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="VOCMetric", metric="mAP", eval_mode="11points")  # VOC2007's rule, IoU 0.5
test_evaluator = val_evaluator
