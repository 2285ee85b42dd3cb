_base_ = ["../_base_/models/mamba_yolo_t.py", "../_base_/schedule_300e.py", "../_base_/default_runtime.py"]

# pictures composed of Tiny-ImageNet-200's photos and boxes.
# No picture comes twice: an epoch is the next 64,000 of an endless set (500 iterations). Sessions continue each other
# with --resume, or from published weights: --load-from, and sampler.start after the last picture seen. The rate is
# constant until the last half of train_cfg.max_epochs, which the last session may choose.
data_root = "data/tinyimagenet_pack"
data_advice = "tools/tinyimagenet.py pack makes it (see its --help), or name yours with --data-root"
model = dict(bbox_head=dict(num_classes=200))
train_dataloader = dict(
    batch_size=128,
    num_workers=14,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type="ConsecutiveSampler", epoch_length=64_000),
    collate_fn=dict(type="stacked_collate"),
    dataset=dict(
        type="TinyImageNetMosaic",
        root=data_root,
        split="train",
        length=100_000_000,
        size=320,
        pipeline=[
            dict(type="HSVGain", hue=0.015, saturation=0.7, value=0.4),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances")
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="TinyImageNetMosaic",
        root=data_root,
        split="val",
        length=2_000,
        size=320,
        test_mode=True,
        pipeline=[dict(type="PackDetInputs", meta_keys=meta_keys)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", metric="bbox")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=60, val_interval=10)
optim_wrapper = dict(type="BFloat16OptimWrapper", paramwise_cfg=dict(batch_size_per_gpu=128))
custom_hooks = [
    dict(type="WarmupLinearDecayHook", warmup_epochs=1, decay_part=0.5, by_epoch=False),
    # decay 0.9999 * (1 - exp(-t / 2000))
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=1e-4, gamma=2000, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=50),
]
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
