_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_10k.py",
    "../_base_/diffusion/default_runtime.py",
]

# the drawn photos that ship with the project, seconds on a CPU
data_root = "demo/cells"
model = dict(network=dict(type="dim_debug", input_size=(16, 16), in_channels=3))
train_dataloader = dict(dataset=dict(type="ImageFolder", root=f"{data_root}/train", size=(16, 16)), batch_size=8)
held_out = dict(type="ImageFolder", root=f"{data_root}/val", size=(16, 16))
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=4))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=4))

train_cfg = dict(max_iters=40, val_interval=20)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=False, begin=4),
]
default_hooks = dict(runtime_info=dict(interval=1), logger=dict(interval=10), checkpoint=dict(interval=10))
custom_hooks = [
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=0.1, gamma=5, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=1),
]
