"""Registration of everything that configs can name: importing this module fills mmengine's registries."""

from mmengine.registry import MODELS

from mambavision.backbones import serpent
from mambavision.engine import cuda_graphs, hooks, optim  # noqa: F401  (their decorators register)
from mambavision.restoration import datasets, degradations, losses, loops, metrics, restorer  # noqa: F401

SIZES = (serpent.serpent_t, serpent.serpent_s, serpent.serpent_b, serpent.serpent_l, serpent.serpent_debug)
for network in (serpent.Serpent, *SIZES):
    MODELS.register_module(module=network)
