_base_ = "mamba_yolo_debug.py"  # the debug size learns the drawn cells of demo/ in about two minutes on two CPU cores

train_pipeline = [
    dict(type="MosaicAffine", size=224, scale=(0.9, 1.4), translate=0.1),
    dict(type="HSVGain", hue=0.015, saturation=0.3, value=0.2),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LetterBox", size=256, rect=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "pad_param")),
]
train_dataloader = dict(dataset=dict(photo_side=256, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=60, val_interval=20)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=4e-3, weight_decay=0.01))
custom_hooks = [
    dict(type="WarmupLinearDecayHook", warmup_epochs=2, warmup_min_iters=1, warmup_bias_lr=0.0, final_lr_ratio=0.02),
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=0.05, gamma=20, update_buffers=True),
    dict(type="LossCurveHook", interval=2),
]
default_hooks = dict(logger=dict(interval=6), checkpoint=dict(interval=20, max_keep_ckpts=1))
randomness = dict(seed=0)
