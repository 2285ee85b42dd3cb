"""Published weights: a safetensors file that rebuilds its denoising network and objective without a config."""

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.registry import MODELS
from torch import nn

from mambavision.diffusion.networks import CLASSES
from mambavision.diffusion.objectives import Objective, objective_from
from mambavision.engine import weights
from mambavision.engine.checkpoint import CheckpointError

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
    """Write a network's weights and what it was trained for, whole or not at all.

    Args:
        net: A network of :mod:`mambavision.diffusion.networks`, which keeps its arguments as ``config``.
        path: File to write, ``*.safetensors``.
        objective: What it predicts.
        class_names: Of its classes, if it has any.
        metadata: What else to say.
        precision: Of the floats.

    Raises:
        ValueError: If the network is none of ours, its weights are not finite, or the names are not one a class.
    """
    if type(net) not in CLASSES:
        names = ", ".join(network.__name__ for network in CLASSES)
        raise ValueError(f"{type(net).__name__} cannot be rebuilt from a file; it must be one of {names}")
    if class_names is not None and len(class_names) != net.num_classes:
        raise ValueError(f"{len(class_names)} class names for a network of {net.num_classes} classes")
    fields = {**(metadata or {}), "task": "diffusion", "class": type(net).__name__}
    fields |= {"config": json.dumps(net.config), "objective": json.dumps(objective.config())}
    if class_names is not None:
        fields["class_names"] = json.dumps(list(class_names))
    weights.save_published(net.state_dict(), path, fields, precision=precision)


def guidable(model: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str | Path) -> bool:
    """Whether weights were trained without classes too, as guidance needs; arguments as of :func:`check_trained_as`.

    What the file does not say, the config does.
    """
    if Path(path).suffix == ".safetensors":
        return read_metadata(path).get("class_dropout") != "0"
    return (_trained_model(checkpoint) or model).get("class_dropout") != 0


def class_dropout(net: nn.Module, guidable: bool) -> dict[str, str]:
    """What a file's metadata says of a network that was trained with its classes alone; of others nothing."""
    return {"class_dropout": "0"} if net.num_classes and not guidable else {}


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Objective, dict[str, Any]]:
    """Rebuild network and objective from a file of :func:`save`; and the file's metadata.

    The network is in fp32 and eval mode, on ``device``. ``metadata["class_names"]`` is None where there are none.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not one of ours, or its tensors do not fit the network it names.
    """
    metadata = read_metadata(path)
    try:
        objective = objective_from(metadata["objective"])
    except ValueError as error:
        raise CheckpointError(f"{path} was trained for an objective that is not known here: {error}") from error
    return weights.rebuild(path, CLASSES, metadata, device), objective, metadata


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the metadata of a denoising network's file: ``config``, ``objective``, ``class_names`` and more.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no safetensors file, or one that :func:`save` did not write.
    """
    metadata = weights.read_metadata(path, _FIELDS, of="diffusion")
    said = {name: json.loads(value) if name in _JSON_FIELDS else value for name, value in metadata.items()}
    return {"class_names": None, **said}


def check_trained_as(model: Mapping[str, Any], checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check that weights were trained as a config says; of scan orders or the objective no tensor tells.

    Args:
        model: The config's ``model``, of a :class:`~mambavision.diffusion.diffusion.Diffusion`.
        checkpoint: As :func:`mambavision.engine.weights.read_checkpoint` reads it. What does not say how it was trained
            passes.
        path: Its file.

    Raises:
        CheckpointError: If network or objective differ; says in what.
    """
    if Path(path).suffix == ".safetensors":
        metadata = read_metadata(path)
        theirs = metadata["config"] | metadata["objective"]
    elif (trained := _trained_model(checkpoint)) is not None:
        theirs = _described(trained)
    else:
        return
    ours = _described(model)
    differing = [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]
    if differing:
        said = ", ".join(f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in sorted(differing))
        raise CheckpointError(
            f"{path} was trained with {said}: name the config that it was trained by, a copy of which is in its work "
            "directory"
        )


def _described(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a config's network, and of its objective with its ``type``."""
    with torch.device("meta"):
        network = MODELS.build(model["network"])
    return json.loads(json.dumps(network.config | objective_from(model["objective"]).config()))  # tuples are lists


def _trained_model(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """``model`` of the config that mmengine wrote into a checkpoint, as text; none of it is run."""
    for statement in ast.parse(checkpoint.get("meta", {}).get("cfg", "")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "model":
            return _literal(statement.value)
    return None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):  # dict(name=value, ...)
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    return ast.literal_eval(node)
