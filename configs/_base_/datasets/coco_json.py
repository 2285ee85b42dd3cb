_base_ = "pipelines_640.py"

data_root = "data/custom"

train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="stacked_collate"),
    dataset=dict(
        type="CocoDetDataset",
        data_root=data_root,
        ann_file="train.json",
        photo_side=640,
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDetDataset",
        data_root=data_root,
        ann_file="val.json",
        test_mode=True,
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="CocoMetric", ann_file=data_root + "/val.json", metric="bbox")
test_evaluator = val_evaluator
