_base_ = [
    "../_base_/restoration/sr_x4.py",
    "../_base_/restoration/schedule_20k.py",
    "../_base_/restoration/default_runtime.py",
]

model = dict(network=dict(type="serpent_s", scale=4))
