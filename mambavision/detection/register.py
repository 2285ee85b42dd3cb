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

MODELS.register_module(module=MambaYOLOBackbone)
MODELS.register_module(module=MambaYOLOPAFPN)
