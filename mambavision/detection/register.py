"""Registration of everything that configs can name: importing this module fills mmdet's registries."""

from mmdet.registry import MODELS

from mambavision.backbones.mamba_yolo import MambaYOLOBackbone, MambaYOLOPAFPN
from mambavision.detection import (  # noqa: F401  (their decorators register)
    assigner,
    batches,
    datasets,
    detector,
    head,
    hooks,
    losses,
    metrics,
    optim,
    samplers,
    tinyimagenet,
    transforms,
)
from mambavision.engine import cuda_graphs  # noqa: F401
from mambavision.engine import hooks as engine_hooks  # noqa: F401
from mambavision.engine import optim as engine_optim  # noqa: F401

MODELS.register_module(module=MambaYOLOBackbone)
MODELS.register_module(module=MambaYOLOPAFPN)
