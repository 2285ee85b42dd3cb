"""Detectors as networks of tensors alone, for files that run elsewhere."""

from pathlib import Path

from mmengine.model import BaseModel
from torch import Tensor, nn

from mambavision.detection.detector import MambaYOLO
from mambavision.detection.weights import from_checkpoint, load_detector
from mambavision.engine.export import Exportable
from mambavision.engine.runs import read_config


class BoxesAndScores(nn.Module):
    """A Mamba-YOLO up to NMS."""

    def __init__(self, detector: MambaYOLO) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, A, 4) ``xyxy`` in pixels and scores (B, A, classes) of images (B, 3, H, W), RGB in [0, 1]."""
        return self.detector.bbox_head.decode(*self.detector.maps(images))


def exportable(weights: str | Path, config: str | None = None) -> Exportable:
    """The detector of published weights, or of a checkpoint and its config.

    Raises:
        FileNotFoundError: If one of them does not exist.
        ValueError: If they do not fit each other, or are of another detector.
    """
    detector: BaseModel = load_detector(weights) if config is None else from_checkpoint(read_config(config), weights)
    if not isinstance(detector, MambaYOLO):
        raise ValueError(f"{config}: only Mamba-YOLO is exported, this is a {type(detector).__name__}")
    classes = detector.dataset_meta["classes"]
    return Exportable(
        BoxesAndScores(detector).eval(), 3, ("images",), ("boxes", "scores"), multiple=32,
        metadata={"task": "detection", "classes": list(classes)},
    )  # fmt: skip
