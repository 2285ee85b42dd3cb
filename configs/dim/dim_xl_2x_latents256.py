_base_ = [
    "../_base_/diffusion/latents256.py",
    "../_base_/diffusion/ddpm_400k.py",
    "../_base_/diffusion/default_runtime.py",
]

model = dict(
    network=dict(type="dim_xl_2x", orders="cross", input_size=(32, 32), in_channels=4, num_classes=1000), compile=True
)
