_base_ = "../dim/dim_debug.py"

model = dict(network=dict(type="dit_debug"))
