_base_ = "schedule_20k.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=False, gamma=0.5, milestones=[10_000, 16_000, 18_000, 19_000]),
]
