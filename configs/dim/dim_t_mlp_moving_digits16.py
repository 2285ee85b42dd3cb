_base_ = [
    "../_base_/diffusion/moving_digits16.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

# 1024 tokens; orders: raster is space-time frame after frame, factorised two orders in a frame and one over time
model = dict(
    network=dict(
        type="DiM",
        orders="factorised",
        d_model=192,
        depth=6,
        expand=4 / 3,
        mlp_ratio=4,
        input_size=(16, 32, 32),
        patch_size=4,
        in_channels=1,
    ),
    compile=True,
)
