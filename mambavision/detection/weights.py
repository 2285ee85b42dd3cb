"""Published weights: a safetensors file in half precision that says enough to rebuild its detector without a config."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel

from mambavision.detection.detector import build_mamba_yolo
from mambavision.engine import weights

_FIELDS = ("task", "size", "variant", "classes", "input_size")


def save_weights(
    detector: BaseModel,
    path: str | Path,
    *,
    size: str,
    variant: str,
    classes: Sequence[str],
    input_size: int,
    extra: dict[str, str] | None = None,
) -> None:
    """Write a detector's weights, whole or not at all.

    Floats are stored as fp16, except tensors that do not fit its range. Raw training weights of a run with EMA are not
    what to publish: see :func:`from_checkpoint`.

    Args:
        detector: The detector, as :func:`~mambavision.detection.detector.build_mamba_yolo` makes it.
        path: File to write, ``*.safetensors``.
        size: Size it was built with: "t", "b", "l" or "debug".
        variant: Form it was built with: "aaai" or "released".
        classes: Class names, in the order of the class logits.
        input_size: Side of the square network input, pixels.
        extra: Further metadata, such as what it was trained on.

    Raises:
        ValueError: If the weights are not finite.
    """
    metadata = {
        **(extra or {}),
        "task": "detection",
        "size": size,
        "variant": variant,
        "classes": json.dumps(list(classes)),
        "input_size": str(input_size),
    }
    weights.save_published(detector.state_dict(), path, metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a detector's weights file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no safetensors file, or one that :func:`save_weights` did not write.
    """
    return weights.read_metadata(path, _FIELDS, of="detection")


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> BaseModel:
    """Rebuild a detector from a file of :func:`save_weights`: fp32, in eval mode, on ``device``.

    ``detector.dataset_meta["classes"]`` and ``detector.input_size`` (pixels) come from the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of ours, or its tensors do not fit the network it names.
    """
    metadata = read_metadata(path)
    classes = json.loads(metadata["classes"])
    detector = build_mamba_yolo(metadata["size"], variant=metadata["variant"], classes=classes)
    weights.load_state(detector, weights.read_published(path), path)
    detector.dataset_meta = {"classes": tuple(classes)}
    detector.input_size = int(metadata["input_size"])
    return detector.to(device).eval()


def from_checkpoint(config: str | Path | Config, path: str | Path, device: str | torch.device = "cpu") -> BaseModel:
    """Build the detector of a config with the averaged weights of a checkpoint: fp32, in eval mode, on ``device``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, would run code, or does not fit the network of the config.
    """
    detector, checkpoint = weights.build_from_checkpoint(config, path)
    dataset_meta = checkpoint.get("meta", {}).get("dataset_meta") or {}
    detector.dataset_meta = {"classes": tuple(dataset_meta.get("classes", ()))}
    return detector.to(device).eval()
