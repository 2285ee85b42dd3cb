"""Published weights: a safetensors file in half precision that says enough to rebuild its detector without a config."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mambavision.detection.detector import build_mamba_yolo
from mambavision.engine import checkpoint as safe_checkpoint
from mambavision.engine.checkpoint import CheckpointError
from mambavision.engine.files import atomic_path

_FORMAT = "mambavision-zoo/1"
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
    tensors = {}
    for name, tensor in detector.state_dict().items():
        if tensor.is_floating_point():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite; such weights are not worth saving")
            half = tensor.half()
            tensor = half if half.isfinite().all() else tensor.float()
        tensors[name] = tensor.contiguous().cpu().clone()
    metadata = {
        **(extra or {}),
        "format": _FORMAT,
        "task": "detection",
        "size": size,
        "variant": variant,
        "classes": json.dumps(list(classes)),
        "input_size": str(input_size),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a weights file.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no safetensors file, or one that :func:`save_weights` did not write.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is cut short ({error})") from error
    missing = [field for field in _FIELDS if field not in metadata]
    if metadata.get("format") != _FORMAT or missing:
        raise CheckpointError(
            f"{path} does not say how to rebuild its detector (format {metadata.get('format')!r}, expected "
            f"{_FORMAT!r}; fields missing: {', '.join(missing) or 'none'})"
        )
    return metadata


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
    _load_state(detector, _load_safetensors(str(path))["state_dict"], path)
    detector.dataset_meta = {"classes": tuple(classes)}
    detector.input_size = int(metadata["input_size"])
    return detector.to(device).eval()


def from_checkpoint(config: str | Path | Config, path: str | Path, device: str | torch.device = "cpu") -> BaseModel:
    """Build the detector of a config with the weights of a training checkpoint: fp32, in eval mode, on ``device``.

    With ``EMAHook``, mmengine saves the averaged weights as ``state_dict`` and the raw ones as ``ema_state_dict``, so
    these are the averaged weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, would run code, or does not fit the network of the config.
    """
    config = config if isinstance(config, Config) else Config.fromfile(config)
    init_default_scope(config.get("default_scope", "mmdet"))
    checkpoint = _read(path)
    detector = revert_sync_batchnorm(MODELS.build(config.model))
    _load_state(detector, _state_dict(checkpoint, path), path)
    dataset_meta = checkpoint.get("meta", {}).get("dataset_meta") or {}
    detector.dataset_meta = {"classes": tuple(dataset_meta.get("classes", ()))}
    return detector.to(device).eval()


def fitting_tensors(model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint or published file that a model can start from, and log what is left out.

    A tensor fits if the model has one of its name and shape. With another number of classes that is all but the last
    class convolutions, or the class towers where their width follows the number of classes.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no checkpoint, would run code, or nothing in it fits.
    """
    own, state = model.state_dict(), _state_dict(_read(path), path)
    fitting = {name: state[name] for name in own if name in state and state[name].shape == own[name].shape}
    if not fitting:
        raise CheckpointError(f"{path}: none of its {len(state)} tensors fits one of this network's {len(own)}")
    anew, unused = _groups(own.keys() - fitting.keys()), _groups(state.keys() - own.keys())
    message = f"{path}: starting from {len(fitting)} of the network's {len(own)} tensors"
    print_log(f"{message}; anew: {anew or 'none'}; not used: {unused or 'none'}", logger="current")
    return fitting


def check_fits(model: nn.Module, path: str | Path) -> None:
    """Check that a run of ``model`` can be resumed from a checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: If there is none, or its tensors are not the model's.
    """
    _compare(model.state_dict(), _state_dict(_read(path), path), path)


@CheckpointLoader.register_scheme(prefixes="safetensors:", force=True)
def _load_safetensors(filename: str, map_location: str | torch.device | None = None) -> dict:
    """Read a published file as mmengine reads checkpoints; ``load_from="safetensors:FILE"`` in a config."""
    path = filename.removeprefix("safetensors:")
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {"state_dict": state, "meta": {"dataset_meta": {"classes": json.loads(metadata["classes"])}}}


def _read(path: str | Path) -> dict:
    if Path(path).suffix == ".safetensors":
        return _load_safetensors(str(path))
    return safe_checkpoint.load(path, map_location="cpu")


def _state_dict(checkpoint: object, path: str | Path) -> dict[str, Tensor]:
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict")
    return state


def _compare(own: dict[str, Tensor], state: dict[str, Tensor], path: str | Path) -> None:
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    misfits = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or unknown or misfits:
        examples = ", ".join((missing + unknown + sorted(misfits))[:3])
        raise CheckpointError(
            f"{path} does not fit this network: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(misfits)} of another shape (such as {examples})"
        )


def _load_state(detector: BaseModel, state: dict[str, Tensor], path: str | Path) -> None:
    _compare(detector.state_dict(), state, path)
    detector.load_state_dict(state)


def _groups(names: Iterable[str]) -> str:
    """Counts of tensors by the first two parts of their names."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{group} ({count})" for group, count in sorted(counts.items()))
