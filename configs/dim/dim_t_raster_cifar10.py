_base_ = "dim_t_cifar10.py"

model = dict(network=dict(orders="raster"))  # row after row in every layer
