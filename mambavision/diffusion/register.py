"""Registration of everything that configs can name: importing this module fills mmengine's registries."""

from mmengine.registry import MODELS

from mambavision.diffusion import batches, datasets, diffusion, generated, latents, loops  # noqa: F401  (their decorators register)
from mambavision.diffusion.networks import CLASSES, SIZES
from mambavision.engine import cuda_graphs, hooks, optim  # noqa: F401

for network in (*CLASSES, *SIZES):
    MODELS.register_module(module=network)
