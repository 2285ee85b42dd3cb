_base_ = [
    "../_base_/restoration/deblur_gray.py",
    "../_base_/restoration/schedule_20k.py",
    "../_base_/restoration/default_runtime.py",
]

model = dict(network=dict(type="serpent_s", in_channels=1))
