_base_ = "dim_t_mlp_cifar10.py"

model = dict(network=dict(orders="raster", mlp_ratio=4.0))  # row after row in every layer
