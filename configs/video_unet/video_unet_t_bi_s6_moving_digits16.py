_base_ = [
    "../_base_/diffusion/moving_digits16.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

# another layer over frames: --cfg-options model.network.temporal=attention
model = dict(network=dict(type="video_unet_t", in_channels=1, input_size=(16, 32, 32), temporal="bi_s6"))
