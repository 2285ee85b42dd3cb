_base_ = [
    "../_base_/restoration/motion_deblur.py",
    "../_base_/restoration/schedule_20k.py",
    "../_base_/restoration/default_runtime.py",
]

model = dict(network=dict(type="serpent_s"))
optim_wrapper = dict(optimizer=dict(lr=3e-4))
