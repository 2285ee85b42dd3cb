"""Official Mamba-YOLO state dicts (HZAI-ZJNU/Mamba-YOLO, names `model.N...`) to detectors of this project and back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from torch import Tensor

from mambavision.backbones.mamba_yolo import SIZES, Size, Variant
from mambavision.detection.detector import MambaYOLO, build_mamba_yolo

_STEM, _CLASSES, _BINS = "model.0.conv.3.weight", "model.21.cv3.0.2.weight", "model.21.dfl.conv.weight"
_LAYERS = {
    "backbone.stem": "model.0",
    "backbone.stages.0": "model.1",
    "backbone.merges.0": "model.2",
    "backbone.stages.1": "model.3",
    "backbone.merges.1": "model.4",
    "backbone.stages.2": "model.5",
    "backbone.merges.2": "model.6",
    "backbone.stages.3": "model.7",
    "backbone.sppf": "model.8",
    "neck.top_down4": "model.11",
    "neck.top_down3": "model.14",
    "neck.down3": "model.15",
    "neck.bottom_up4": "model.17",
    "neck.down4": "model.18",
    "neck.bottom_up5": "model.20",
    "bbox_head.reg_towers": "model.21.cv2",
    "bbox_head.cls_towers": "model.21.cv3",
}
_LEAVES = (
    (r"^(proj_conv|in_proj)\.conv\.", r"\1.0."),
    (r"^(proj_conv|in_proj)\.bn\.", r"\1.1."),
    (r"^(norm2?)\.", r"\1.norm."),
)


def identify(state_dict: Mapping[str, Tensor]) -> tuple[Size, Variant, int]:
    """Size, variant and number of classes of an official state dict, read from its shapes.

    Raises:
        ValueError: if its stem or head are not those of a Mamba-YOLO.
    """
    for name in (_STEM, _CLASSES):
        if name not in state_dict:
            first = ", ".join(sorted(state_dict)[:3]) or "nothing"
            raise ValueError(f"not an official Mamba-YOLO state dict: {name} is missing (it holds {first}, ...)")
    width = state_dict[_STEM].shape[0]
    sizes = {spec.channels[0]: size for size, spec in SIZES.items()}
    if width not in sizes:
        raise ValueError(f"no size of Mamba-YOLO has a stem of {width} channels (known: {sizes})")
    variant = "released" if any(".lsblock." in name for name in state_dict) else "aaai"
    return sizes[width], variant, state_dict[_CLASSES].shape[0]


def from_official(checkpoint: Mapping[str, Any], *, classes: Sequence[str] | None = None) -> MambaYOLO:
    """Build the detector that an official state dict belongs to, with its weights, in evaluation mode.

    Args:
        checkpoint: official names to tensors, or such a dict under the key "model".
        classes: names of the classes; left out, COCO's for 80 classes, else "0", "1", ...

    Raises:
        ValueError: if the state dict does not fit; the message names keys that miss, remain or have another shape.
    """
    state = unwrap(checkpoint)
    size, variant, count = identify(state)
    classes = default_classes(count) if classes is None else classes
    if len(classes) != count:
        raise ValueError(f"the checkpoint has {count} classes, {len(classes)} names were given")
    detector = build_mamba_yolo(size, variant=variant, classes=classes)
    own = detector.state_dict()
    names = {name: _official_name(detector, name) for name in own}
    shapes = {names[name]: _official_shape(name, tensor) for name, tensor in own.items()}

    missing = [name for name in shapes if name not in state]
    remaining = [name for name in state if name not in shapes and name != _BINS]
    misfits = [f"{n} {tuple(state[n].shape)}, not {s}" for n, s in shapes.items() if n in state and state[n].shape != s]
    if missing or remaining or misfits:
        raise ValueError(
            f"the state dict does not fit Mamba-YOLO-{size.upper()} ({variant}): {_some(missing)} missing, "
            f"{_some(remaining)} remaining, {_some(misfits)} of another shape"
        )
    detector.load_state_dict({name: _from_official_layout(name, state[names[name]], own[name]) for name in own})
    return detector.eval()


def to_official(detector: MambaYOLO) -> dict[str, Tensor]:
    """State dict of a detector under the official names and shapes; the tensors are shared where layouts agree."""
    state = {}
    for name, tensor in detector.state_dict().items():
        if _is_merge(name):
            tensor = tensor.permute(0, 3, 2, 1)  # (out, column parity, row parity, in)
        state[_official_name(detector, name)] = tensor.reshape(_official_shape(name, tensor))
    state[_BINS] = torch.arange(16, dtype=torch.float32).view(1, 16, 1, 1)
    return state


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Tensors of a checkpoint, which may lie under the key "model"; raises ValueError where there are none."""
    if isinstance(checkpoint, Mapping) and "message_hub" in checkpoint:
        raise ValueError("this is a checkpoint of tools/train.py, not an official one: tools/publish.py is for it")
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("the checkpoint holds no state dict: expected names and tensors, or such a dict under 'model'")
    return state


def default_classes(count: int) -> tuple[str, ...]:
    """COCO's names for 80 classes, else "0", "1", ..."""
    return CocoDataset.METAINFO["classes"] if count == 80 else tuple(str(i) for i in range(count))


def _official_name(detector: MambaYOLO, name: str) -> str:
    layer = next(layer for layer in _LAYERS if name.startswith(f"{layer}."))
    leaf = name.removeprefix(f"{layer}.")
    prefix = _LAYERS[layer]
    if layer.startswith("backbone.stages"):
        index, leaf = leaf.split(".", 1)
        if len(detector.get_submodule(layer)) > 1:  # a stage of one block has no index
            prefix = f"{prefix}.{index}"
    elif layer.startswith("backbone.merges"):
        leaf = leaf.replace("conv.", "pw_linear.0.").replace("bn.", "pw_linear.1.")
    for pattern, replacement in _LEAVES:
        leaf = re.sub(pattern, replacement, leaf)
    return f"{prefix}.{leaf}"


def _official_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if _is_merge(name):
        return tensor.shape[0], tensor[0].numel(), 1, 1
    if re.search(r"(op|ss2d\.\d+)\.(in|out)_proj\.weight$", name):  # a linear layer here, a 1x1 convolution there
        return *tensor.shape, 1, 1
    return tuple(tensor.shape)


def _from_official_layout(name: str, official: Tensor, own: Tensor) -> Tensor:
    if _is_merge(name):  # sub-grids (even row, even column), (odd, even), (even, odd), (odd, odd) to a 2x2 kernel
        return official.reshape(len(official), 2, 2, -1).permute(0, 3, 2, 1)
    return official.reshape(own.shape)


def _is_merge(name: str) -> bool:
    return name.startswith("backbone.merges.") and name.endswith("conv.weight")


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "0"
