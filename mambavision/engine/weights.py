"""Weights on disk: published safetensors files that say what they are, and checkpoints that a model can start from."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mambavision.engine import checkpoint as safe_checkpoint
from mambavision.engine.checkpoint import CheckpointError
from mambavision.engine.files import atomic_path

FORMAT = "mambavision-zoo/1"

Kind = Literal["detection", "restoration", "diffusion", "features"]
_KINDS: dict[Kind, tuple[str, str]] = {
    "detection": ("a detector", "tools/detect.py --weights"),
    "restoration": ("a restoration network", "tools/restore.py --weights"),
    "diffusion": ("a diffusion model", "tools/sample.py --weights"),
    "features": ("a feature network", "tools/evaluate_samples.py --features"),
}
"""What weights are of, in words, and the argument that takes a published file of them."""


def save_published(
    state: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str],
    *,
    precision: Literal["fp16", "fp32"] = "fp16",
) -> None:
    """Write a state dict as a safetensors file, whole or not at all.

    Args:
        state: The tensors; integers are kept as they are.
        path: File to write, ``*.safetensors``.
        metadata: What rebuilds the network and says where it comes from; ``format`` is added.
        precision: Of the floats; tensors that do not fit fp16's range are kept in fp32.

    Raises:
        ValueError: If the weights are not finite, or the file's name ends in something else.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: published weights end in .safetensors; name such a file")
    tensors = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite; such weights are not worth saving")
            half = tensor.half()
            tensor = half if precision == "fp16" and half.isfinite().all() else tensor.float()
        tensors[name] = tensor.detach().contiguous().cpu().clone()
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={**metadata, "format": FORMAT})


def read_metadata(path: str | Path, fields: Sequence[str] = (), *, of: Kind | None = None) -> dict[str, str]:
    """Return the metadata of a published file.

    Args:
        path: The file.
        fields: What the metadata must hold.
        of: What it must be of; None: anything.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no safetensors file, or one that :func:`save_published` did not write, or is of
            something else; then the message says of what, and for which tool.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        advice = "; of a training checkpoint tools/publish.py makes one" if Path(path).suffix == ".pth" else ""
        raise CheckpointError(f"{path} is not a safetensors file, or is cut short ({error}){advice}") from error
    if metadata.get("format") != FORMAT:
        found = f"format {metadata.get('format')!r}, expected {FORMAT!r}"
        raise CheckpointError(f"{path} does not say how to rebuild its network ({found})")
    kind = _kind(metadata)
    if of and kind and kind != of:
        tool = _KINDS[kind][1]
        raise CheckpointError(f"{path} holds {_described(metadata)}, not {_KINDS[of][0]}: it is for {tool}")
    missing = [field for field in fields if field not in metadata]
    if missing:
        raise CheckpointError(f"{path} does not say how to rebuild its network (fields missing: {', '.join(missing)})")
    return metadata


def _kind(metadata: Mapping[str, str]) -> Kind | None:
    task = metadata.get("task")
    return task if task is None or task in _KINDS else "restoration"  # which says what it restores


def _described(metadata: Mapping[str, str]) -> str:
    kind, task, network = _kind(metadata), metadata["task"], metadata.get("class")
    said = ", ".join(filter(None, (network, None if task == kind else task)))
    return _KINDS[kind][0] + (f" ({said})" if said else "")


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a published file, floats in fp32.

    Raises:
        FileNotFoundError, CheckpointError: As :func:`read_metadata`.
    """
    read_metadata(path)
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def rebuild(
    path: str | Path,
    classes: Sequence[type[nn.Module]],
    metadata: Mapping[str, Any],
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The network of a published file, from its metadata's ``class`` and ``config``: fp32, in eval mode, on a device.

    Raises:
        CheckpointError: If the class is none of ``classes`` or does not take the arguments, or the tensors do not fit.
    """
    by_name, name = {network.__name__: network for network in classes}, metadata["class"]
    if name not in by_name:
        raise CheckpointError(f"{path} is of a {name}, which is not known here: networks are {', '.join(by_name)}")
    try:
        net = by_name[name](**metadata["config"])
    except (ValueError, TypeError) as error:  # another version's, or a damaged one
        raise CheckpointError(f"{path} is of a {name} that cannot be built here: {error}") from error
    load_state(net, read_published(path), path)
    return net.to(device).eval()


@CheckpointLoader.register_scheme(prefixes="safetensors:", force=True)
def load_safetensors(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Read a published file as mmengine reads checkpoints; ``load_from="safetensors:FILE"`` in a config."""
    path = filename.removeprefix("safetensors:")
    state, metadata = read_published(path), read_metadata(path)
    # detectors' and restorers' names are `classes`, denoising networks' `class_names`
    names = metadata.get("classes", metadata.get("class_names"))
    dataset_meta = {} if names is None else {"classes": json.loads(names)}
    if "autoencoder" in metadata:
        dataset_meta["autoencoder"] = metadata["autoencoder"]
    return {"state_dict": state, "meta": {"dataset_meta": dataset_meta}}


def read_checkpoint(path: str | Path) -> dict:
    """Read a training checkpoint (.pth) or a published file as a dict with ``state_dict``, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, would run code, or holds no state dict.
    """
    if Path(path).suffix == ".safetensors":
        return load_safetensors(str(path))
    checkpoint = safe_checkpoint.load(path, map_location="cpu")
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict")
    return {**checkpoint, "state_dict": state} if state is not checkpoint else {"state_dict": state}


def build_from_checkpoint(config: str | Path | Config, path: str | Path) -> tuple[nn.Module, dict]:
    """Build the model of a config with the weights of a checkpoint; returns it on the CPU, and the checkpoint.

    With ``EMAHook``, mmengine saves the averaged weights as ``state_dict`` and the raw ones as ``ema_state_dict``, so
    these are the averaged weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, would run code, or does not fit the network of the config.
    """
    config = config if isinstance(config, Config) else Config.fromfile(config)
    init_default_scope(config.get("default_scope", "mmengine"))
    checkpoint = read_checkpoint(path)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    load_state(model, _named_for(model, checkpoint, path), path)
    return model, checkpoint


def fitting_tensors(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint or published file that a model can start from, and log what is left out.

    A tensor fits if the model has one of its name and shape: not, for example, the last class convolutions of a
    detector for another number of classes.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, would run code, or is of a network of another size: nothing in it fits,
            or less than what has the model's names and other shapes.
    """
    own, state = model.state_dict(), _named_for(model, read_checkpoint(path), path)
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    if not fitting:
        held = _held(path)
        raise CheckpointError(f"{path}{held}: none of its {len(state)} tensors fits one of this network's {len(own)}")
    misfits = [name for name in own if name in state and state[name].shape != own[name].shape]
    if len(misfits) > len(fitting):
        raise CheckpointError(
            f"{path}{_held(path)}: {len(fitting)} of its tensors fit this network, {len(misfits)} are of another shape "
            f"(such as {misfits[0]}): it is of another size"
        )
    anew, unused = _groups(own.keys() - fitting.keys()), _groups(state.keys() - own.keys())
    message = f"{path}: starting from {len(fitting)} of the network's {len(own)} tensors"
    print_log(f"{message}; anew: {anew or 'none'}; not used: {unused or 'none'}", logger="current")
    return fitting


def check_fits(model: nn.Module, path: str | Path) -> None:
    """Check that a run of ``model`` can be resumed from a checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: If there is none, or its tensors are not the model's.
    """
    _compare(model.state_dict(), _named_for(model, read_checkpoint(path), path), path)


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load tensors into a model that has all of them and no other.

    Args:
        model: The model.
        state: The tensors.
        path: Where they come from, for the message.

    Raises:
        CheckpointError: If they are not the model's.
    """
    _compare(model.state_dict(), state, path)
    model.load_state_dict(state)


def _named_for(model: nn.Module, checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The state dict under the names of a model, of which a published file may hold a part only."""
    prefix = getattr(model, "published_prefix", "") if Path(path).suffix == ".safetensors" else ""
    return {prefix + name: tensor for name, tensor in checkpoint["state_dict"].items()}


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path) -> None:
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    misfits = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unknown or misfits:
        examples, held = ", ".join((missing + unknown + sorted(misfits))[:3]), _held(path)
        raise CheckpointError(
            f"{path}{held and held + ' and'} does not fit this network: {len(missing)} tensors missing, "
            f"{len(unknown)} unknown, {len(misfits)} of another shape (such as {examples})"
        )


def _held(path: str | Path) -> str:
    """What a published file holds, for a message; nothing of other files."""
    metadata = read_metadata(path) if Path(path).suffix == ".safetensors" else {}
    return f" holds {_described(metadata)}" if "task" in metadata else ""


def _groups(names: Iterable[str]) -> str:
    """Counts of tensors by the first two parts of their names."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{group} ({count})" for group, count in sorted(counts.items()))
