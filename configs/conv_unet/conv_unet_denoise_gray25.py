_base_ = [
    "../_base_/restoration/denoise_gray25.py",
    "../_base_/restoration/schedule_20k.py",
    "../_base_/restoration/default_runtime.py",
]

model = dict(network=dict(type="conv_unet", in_channels=1))
