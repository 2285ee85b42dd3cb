_base_ = "dim_t_mlp_tinyimagenet64.py"

model = dict(network=dict(mixer="mamba", mlp_ratio=0, depth=10))
