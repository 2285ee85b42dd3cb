"""Object detection on mmdet: Mamba-YOLO, its losses, data and tools.

Importing this package makes mmdet importable without mmcv's compiled operators and registers all parts in mmdet's
registries; configs do it by ``custom_imports = dict(imports=["mambavision.detection"])``.
"""

from mambavision.engine import openmmlab

openmmlab.install()

from mambavision.detection import register as register  # noqa: E402
from mambavision.detection.detector import MambaYOLO, build_mamba_yolo  # noqa: E402

__all__ = ["MambaYOLO", "build_mamba_yolo"]
