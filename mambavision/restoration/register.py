"""Registration of everything that configs can name: importing this module fills mmengine's registries."""

from mmengine.registry import MODELS

from mambavision.engine import cuda_graphs, hooks, optim  # noqa: F401  (their decorators register)
from mambavision.restoration import batches, datasets, degradations, loops, losses, metrics, restorer  # noqa: F401
from mambavision.restoration.networks import CLASSES, SIZES

for network in (*CLASSES, *SIZES):
    MODELS.register_module(module=network)
