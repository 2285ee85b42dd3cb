model = dict(type="Diffusion", objective=dict(type="RectifiedFlow", times="logit_normal"), class_dropout=0.1)

train_cfg = dict(type="NoisyTrainLoop", max_iters=1000, val_interval=200)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="AsyncOptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=1.0),
)
# constant, so that a loss at any step is that of a training of so many steps
param_scheduler = [dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100)]
custom_hooks = [
    # decay 0.99 * (1 - exp(-t / 100))
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=1e-2, gamma=100, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=50),
]
