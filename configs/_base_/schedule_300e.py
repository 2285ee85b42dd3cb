train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=300, val_interval=10)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="MambaYOLOOptimWrapperConstructor",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.937, weight_decay=5e-4, nesterov=True),
    paramwise_cfg=dict(batch_size_per_gpu=64),  # must be the data loader's; tools/train.py sees to it
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = None  # WarmupLinearDecayHook
custom_hooks = [
    dict(
        type="WarmupLinearDecayHook",
        warmup_epochs=3,
        warmup_min_iters=100,
        warmup_bias_lr=0.1,
        warmup_momentum=0.8,
        final_lr_ratio=0.01,
    ),
    # decay 0.9999 * (1 - exp(-t / 2000))
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=1e-4, gamma=2000, update_buffers=True),
    dict(type="CloseMosaicHook", last_epochs=10),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook"),
]
