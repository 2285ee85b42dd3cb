model = dict(type="Diffusion", objective=dict(type="RectifiedFlow", times="logit_normal"), class_dropout=0.1)

train_cfg = dict(type="NoisyTrainLoop", max_iters=10_000, val_interval=1000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="AsyncOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
    clip_grad=dict(max_norm=1.0),
)
warmup = 500
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=warmup),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False, begin=warmup),  # ends with max_iters
]
custom_hooks = [
    # decay 0.9995 * (1 - exp(-t / 500))
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=5e-4, gamma=500, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=50),
]
