"""Registration of everything that configs can name: importing this module fills mmdet's registries."""

import importlib

from mmdet.registry import MODELS

from mambavision.backbones.mamba_yolo import MambaYOLOBackbone, MambaYOLOPAFPN

for _module in (MambaYOLOBackbone, MambaYOLOPAFPN):
    MODELS.register_module(module=_module)

for _name in ("assigner", "losses", "head", "detector", "transforms", "datasets", "tinyimagenet", "hooks", "optim"):
    if importlib.util.find_spec(f"mambavision.detection.{_name}"):
        importlib.import_module(f"mambavision.detection.{_name}")
