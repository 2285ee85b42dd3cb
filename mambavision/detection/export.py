"""Detectors as networks of tensors alone, for files that run elsewhere."""

from pathlib import Path

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
    if config is None:
        detector = load_detector(weights)
        side = detector.input_size
    else:
        cfg = read_config(config)
        detector = from_checkpoint(cfg, weights)
        side = next((step.size for step in cfg.test_dataloader.dataset.pipeline if step.type == "LetterBox"), None)
    if not isinstance(detector, MambaYOLO):
        raise ValueError(f"{config}: only Mamba-YOLO is exported, this is a {type(detector).__name__}")
    said = {"task": "detection", "classes": list(detector.dataset_meta["classes"]), "input_size": side}
    network = BoxesAndScores(detector).eval()
    return Exportable(network, 3, ("images",), ("boxes", "scores"), multiple=32, metadata=said)
