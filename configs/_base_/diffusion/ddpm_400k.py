# DiT's own schedule (Peebles and Xie, 2023): a constant rate, batches of 256
model = dict(type="Diffusion", objective=dict(type="EpsilonPrediction", schedule="linear"), class_dropout=0.1)

train_cfg = dict(type="NoisyTrainLoop", max_iters=400_000, val_interval=10_000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="AsyncOptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, fused=True),
)
custom_hooks = [
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=1e-4, gamma=2000, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=50),
]
