"""Published weights: a safetensors file that rebuilds a network and its objective without a config."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mambavision.diffusion.networks import CLASSES
from mambavision.diffusion.objectives import Objective, objective_from
from mambavision.engine import weights
from mambavision.engine.checkpoint import CheckpointError

TASK = "diffusion"
_FIELDS = ("task", "class", "config", "objective")
_JSON_FIELDS = ("config", "objective", "class_names")  # the others are text


def save(
    net: nn.Module,
    path: str | Path,
    *,
    objective: Objective,
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    precision: Literal["fp16", "fp32"] = "fp16",
) -> None:
    """Write a network's weights, whole or not at all.

    Raw training weights of a run with EMA are not what to publish: ``tools/publish.py`` takes the averaged ones.

    Args:
        net: A network of :mod:`mambavision.diffusion.networks`, which keeps its arguments as ``config``.
        path: File to write, ``*.safetensors``.
        objective: What it was trained for.
        class_names: Of its classes.
        metadata: What else to say.
        precision: Of the floats.

    Raises:
        ValueError: If the network is none of ours, or its weights are not finite.
    """
    if type(net) not in CLASSES:
        raise ValueError(f"{type(net).__name__} cannot be rebuilt from a file; it must be one of {_names()}")
    fields = {**(metadata or {}), "task": TASK, "class": type(net).__name__, "config": net.config}
    fields["objective"] = objective.config()
    if class_names is not None:
        fields["class_names"] = list(class_names)
    text = {name: json.dumps(value) if name in _JSON_FIELDS else value for name, value in fields.items()}
    weights.save_published(net.state_dict(), path, text, precision=precision)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Objective, dict[str, Any]]:
    """Rebuild a network from a file of :func:`save`, fp32, in eval mode, on ``device``; its objective; the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not one of ours, or its tensors do not fit the network it names.
    """
    metadata = read_metadata(path)
    try:
        (network,) = (network for network in CLASSES if network.__name__ == metadata["class"])
        net = network(**metadata["config"])
        objective = objective_from(metadata["objective"])
    except (ValueError, TypeError) as error:  # another version's, or a damaged one
        raise CheckpointError(
            f"{path} is of a {metadata['class']} with arguments {metadata['config']} for {metadata['objective']}, "
            f"which cannot be built here ({error}); the networks are {_names()}"
        ) from error
    weights.load_state(net, weights.read_published(path), path)
    return net.to(device).eval(), objective, metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a diffusion network's file: ``class``, ``config``, ``objective``, and what else is said.

    ``class_names`` is missing where the classes have no names.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no safetensors file, or one that :func:`save` did not write.
    """
    metadata = weights.read_metadata(path, _FIELDS, of="diffusion network")
    if metadata["task"] != TASK:
        raise CheckpointError(f"{path} is for {metadata['task']}: weights of a diffusion network are wanted")
    return {name: json.loads(value) if name in _JSON_FIELDS else value for name, value in metadata.items()}


def _names() -> str:
    return ", ".join(network.__name__ for network in CLASSES)
