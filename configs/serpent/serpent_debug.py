_base_ = [
    "../_base_/restoration/denoise_color25.py",
    "../_base_/restoration/schedule_20k.py",
    "../_base_/restoration/default_runtime.py",
]

# the drawn photos that ship with the project, seconds on a CPU
data_root = "demo/cells"
model = dict(network=dict(type="serpent_debug"))
train_dataloader = dict(
    photos=dict(root=f"{data_root}/train"),
    schedule=[(20, 32, 4), (20, 48, 2)],  # iterations, side of a crop, crops a batch: progressive patches
)
sets = [
    dict(
        type="EvaluationSet",
        name="cells_s25",
        photos=dict(type="CleanFolder", root=f"{data_root}/val"),
        degradation=dict(type="GaussianNoise", sigma=(25, 25)),
    )
]
val_dataloader = dict(dataset=dict(sets=sets))
test_dataloader = dict(dataset=dict(sets=sets))

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
