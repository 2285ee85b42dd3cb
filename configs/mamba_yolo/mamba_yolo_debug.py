_base_ = [
    "../_base_/models/mamba_yolo_t.py",
    "../_base_/datasets/coco_json.py",
    "../_base_/schedule_300e.py",
    "../_base_/default_runtime.py",
]

data_root = "demo/cells"
model = dict(
    backbone=dict(size="debug"),
    neck=dict(size="debug"),
    bbox_head=dict(num_classes=3, in_channels=(16, 24, 32)),
)
train_pipeline = [
    dict(type="MosaicAffine", size=128, scale=(0.5, 1.5), translate=0.1),
    dict(type="HSVGain", hue=0.015, saturation=0.7, value=0.4),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LetterBox", size=128, rect=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "pad_param")),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file="train.json",
        data_prefix=dict(img="train/"),
        cache="ram",
        photo_side=128,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, ann_file="val.json", data_prefix=dict(img="val/"), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/val.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=3, val_interval=1)
optim_wrapper = dict(paramwise_cfg=dict(batch_size_per_gpu=4))
custom_hooks = [
    dict(type="WarmupLinearDecayHook", warmup_epochs=1, warmup_min_iters=1),
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=0.05, gamma=20, update_buffers=True),  # decay 0.95
    dict(type="CloseMosaicHook", last_epochs=1),
    dict(type="LossCurveHook", interval=1),
]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(save_best="coco/bbox_mAP"))
