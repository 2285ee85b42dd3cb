_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

# seconds on a CPU
model = dict(network=dict(type="video_unet_debug", in_channels=3, input_size=(4, 16, 16), num_classes=3))
train_dataloader = dict(dataset=dict(type="BouncingShapes", num=16, size=(4, 16, 16)), batch_size=4)
held_out = dict(type="BouncingShapes", num=4, size=(4, 16, 16), seed=1)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=4))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=4))

train_cfg = dict(max_iters=40, val_interval=20)
param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4)]
default_hooks = dict(runtime_info=dict(interval=1), logger=dict(interval=10), checkpoint=dict(interval=10))
custom_hooks = [
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=0.1, gamma=5, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=1),
]
