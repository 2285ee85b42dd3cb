_base_ = [
    "../_base_/diffusion/tinyimagenet20.py",
    "../_base_/diffusion/flow_10k.py",
    "../_base_/diffusion/default_runtime.py",
]

model = dict(
    network=dict(
        type="DiM",
        orders="cross",
        d_model=192,
        depth=5,
        mlp_ratio=3.75,
        input_size=(64, 64),
        patch_size=4,
        in_channels=3,
        num_classes=20,
    ),
    compile=True,
)
