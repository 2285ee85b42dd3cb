_base_ = [
    "../_base_/diffusion/moving_digits64.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

model = dict(network=dict(type="video_unet_t", in_channels=1, input_size=(64, 32, 32), temporal="s4d"))
