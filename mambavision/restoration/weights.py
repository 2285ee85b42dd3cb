"""Published weights: a safetensors file that says what it restores and rebuilds its network without a config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from mambavision.engine import weights
from mambavision.restoration.networks import CLASSES

Task = Literal[
    "denoise_color",
    "denoise_gray",
    "sr_x2",
    "sr_x3",
    "sr_x4",
    "sr_x8",
    "deblur",
    "deblur_gray",
    "jpeg",
    "jpeg_gray",
    "motion_deblur",
    "inpaint",
]

_FIELDS = ("task", "class", "config")
_JSON_FIELDS = ("config", "degradation", "sigma_range")  # the others are text


def save(
    net: nn.Module,
    path: str | Path,
    *,
    task: Task,
    metadata: Mapping[str, Any] | None = None,
    precision: Literal["fp16", "fp32"] = "fp16",
) -> None:
    """Write a network's weights, whole or not at all.

    Raw training weights of a run with EMA are not what to publish: ``tools/publish.py`` takes the averaged ones.

    Args:
        net: A network of :mod:`mambavision.restoration.networks`, which keeps its arguments as ``config``.
        path: File to write, ``*.safetensors``.
        task: What it restores.
        metadata: What else to say, as text; and ``degradation``, its config, and ``sigma_range``, the lowest and
            highest noise level in units of 1/255 that a network with sigma_input was trained for.
        precision: Of the floats.

    Raises:
        ValueError: If the task is unknown, the network is none of ours, or its weights are not finite.
    """
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
    if type(net) not in CLASSES:
        names = ", ".join(network.__name__ for network in CLASSES)
        raise ValueError(f"{type(net).__name__} cannot be rebuilt from a file; it must be one of {names}")
    fields = {**(metadata or {}), "task": task, "class": type(net).__name__, "config": net.config}
    text = {name: json.dumps(value) if name in _JSON_FIELDS else value for name, value in fields.items()}
    weights.save_published(net.state_dict(), path, text, precision=precision)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a network from a file of :func:`save`: fp32, in eval mode, on ``device``; and the file's metadata.

    ``metadata["task"]`` is what it restores.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not one of ours, or its tensors do not fit the network it names.
    """
    metadata = read_metadata(path)
    return weights.rebuild(path, CLASSES, metadata, device), metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a restoration network's file: ``task``, ``class``, ``config``, and what else is said.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no safetensors file, or one that :func:`save` did not write
    """
    metadata = weights.read_metadata(path, _FIELDS, of="restoration")
    return {name: json.loads(value) if name in _JSON_FIELDS else value for name, value in metadata.items()}
