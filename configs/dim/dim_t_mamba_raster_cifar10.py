_base_ = "dim_t_cifar10.py"

model = dict(network=dict(mixer="mamba", orders="raster"))  # row after row in every layer
