_base_ = [
    "../_base_/diffusion/tinyimagenet64.py",
    "../_base_/diffusion/flow_10k.py",
    "../_base_/diffusion/default_runtime.py",
]

model = dict(
    network=dict(type="dim_s_2x", orders="cross", input_size=(64, 64), patch_size=4, in_channels=3, num_classes=200),
    compile=True,
)
