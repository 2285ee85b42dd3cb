_base_ = [
    "../_base_/diffusion/moving_digits16.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

model = dict(
    network=dict(type="DiT", d_model=192, depth=6, nheads=3, input_size=(16, 32, 32), patch_size=4, in_channels=1),
    compile=True,
)
