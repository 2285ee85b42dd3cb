"""Latents of a diffusers AutoencoderKL in place of pixels: made once, kept in shards, trained on as a data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from mmengine.registry import DATASETS
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mambavision.diffusion.datasets import FrameSet, Item
from mambavision.engine.files import atomic_path, check_folder
from mambavision.engine.photos import DatasetError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Root = str | os.PathLike

_INDEX = "index.json"


def load_autoencoder(path: Root) -> AutoencoderKL:
    """Load an AutoencoderKL, in eval mode, from a local folder of config.json and safetensors weights.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no such autoencoder.
    """
    from diffusers import AutoencoderKL

    if not Path(path, "config.json").is_file():
        raise FileNotFoundError(f"{path}: no folder of an autoencoder, which holds config.json and its weights")
    try:
        autoencoder, said = AutoencoderKL.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: not an AutoencoderKL with safetensors weights ({error})") from error
    if missing := said["missing_keys"]:  # diffusers would leave them random
        raise ValueError(f"{path}: its weights lack {len(missing)} tensors of the autoencoder, first {missing[0]}")
    return autoencoder.eval()


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, x: Tensor) -> Tensor:
    """Latents of pictures (B, C, H, W) or videos (B, C, T, H, W) in [-1, 1]: the posterior's mode, at unit variance."""
    shift, scale = _shift_and_scale(autoencoder)
    return _by_frame(lambda frames: (autoencoder.encode(frames).latent_dist.mode() - shift) * scale, x)


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, z: Tensor) -> Tensor:
    """Pictures or videos, about [-1, 1], of latents as :func:`encode` makes them."""
    shift, scale = _shift_and_scale(autoencoder)
    return _by_frame(lambda frames: autoencoder.decode(frames / scale + shift).sample, z)


def _shift_and_scale(autoencoder: AutoencoderKL) -> tuple[float, float]:
    return getattr(autoencoder.config, "shift_factor", None) or 0.0, autoencoder.config.scaling_factor


def _by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.ndim == 4:
        return function(x)
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def cache_latents(
    dataset: FrameSet, autoencoder: AutoencoderKL, out: Root, *, batch_size: int = 32, shard_items: int = 4096
) -> list[str]:
    """Write the latents of all items into a folder that :class:`LatentShards` reads; mirrored too, if the set says so.

    On the device of the autoencoder. A run that was interrupted goes on after its last whole shard, if the files, sizes
    and autoencoder are the same.

    Args:
        dataset: Pictures or videos; of these all frames.
        autoencoder: Its input has the data set's channels.
        out: The folder; made if it is not there.
        batch_size: Frames at a time.
        shard_items: Items a shard.

    Returns:
        A message for each item that cannot be read.

    Raises:
        ValueError: If the autoencoder takes other channels or sides, or the folder holds latents of another data set or
            autoencoder.
        DatasetError: If no item can be read.
    """
    if autoencoder.config.in_channels != dataset.channels:
        taken = autoencoder.config.in_channels
        raise ValueError(f"the data set has {dataset.channels} channels, the autoencoder takes {taken}")
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if any(side % factor for side in dataset.size[-2:]):
        sides = " x ".join(map(str, dataset.size[-2:]))
        raise ValueError(f"{sides} pixels: sides must be multiples of {factor}, a latent's side for this autoencoder")
    out = Path(out)
    check_folder(out, "out")
    out.mkdir(parents=True, exist_ok=True)
    said = dict(items=len(dataset), pixels=list(dataset.size), flip=dataset.flip, class_names=list(dataset.class_names))
    said |= dict(files=_digest(dataset), autoencoder=fingerprint(autoencoder), shard_items=shard_items)
    begun = out / "begun.json"
    if begun.exists() and json.loads(begun.read_text()) != said:
        raise ValueError(f"{out} holds latents of another set, or by another autoencoder: name another, or delete it")
    with atomic_path(begun) as temporary:
        temporary.write_text(json.dumps(said))
    shards, skipped, size = [], [], None
    with tqdm(total=len(dataset), desc="encoding", unit="item") as bar:
        for first in range(0, len(dataset), shard_items):
            path = out / f"shard_{len(shards):05d}.safetensors"
            indices = range(first, min(first + shard_items, len(dataset)))
            if not path.exists():
                _write_shard(path, dataset, autoencoder, indices, batch_size)
            with safe_open(str(path), framework="pt") as file:
                skipped += json.loads(file.metadata()["skipped"])
                size = file.get_slice("latents").get_shape()[1:] if "latents" in file.keys() else size  # noqa: SIM118
            shards.append(path.name)
            bar.update(len(indices))
    if size is None:
        raise DatasetError(f"none of {len(dataset)} items can be used; {skipped[0]}")
    index = dict(size=[*dataset.size[:-2], *size[1:]], channels=size[0], class_names=said["class_names"], shards=shards)
    index["autoencoder"] = said["autoencoder"]
    with atomic_path(out / _INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n")
    return skipped


def _digest(dataset: FrameSet) -> str:
    """What tells the files of a data set from others: their names and sizes; of a folder of frames, its files'."""
    paths = list(map(Path, getattr(dataset, "paths", ())))
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    files = (file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]))
    found = [(os.path.relpath(file, root), file.stat().st_size if file.exists() else None) for file in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def fingerprint(autoencoder: AutoencoderKL) -> str:
    """What tells the weights and the latents' scale from others: a SHA-256."""
    digest = hashlib.sha256(json.dumps(_shift_and_scale(autoencoder)).encode())
    for parameter in autoencoder.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_made_latents(autoencoder: AutoencoderKL, made_by: str | None, weights: Root) -> None:
    """Check that an autoencoder is the one whose latents a network was trained on.

    Args:
        autoencoder: The one that is to decode.
        made_by: :func:`fingerprint` of the one that encoded; None, where it is not known, passes.
        weights: The network's file.

    Raises:
        ValueError: If it is another one.
    """
    if made_by is not None and made_by != (found := fingerprint(autoencoder)):
        raise ValueError(
            f"{weights} was trained on latents of another autoencoder ({made_by[:8]}, this one is {found[:8]}): name "
            "the one that tools/cache_latents.py was given"
        )


def _write_shard(path: Path, dataset: FrameSet, autoencoder: AutoencoderKL, indices: range, batch_size: int) -> None:
    counts, labels, skipped = [], [], []

    def frames() -> Iterator[np.ndarray]:
        """All frames of the items, (C, H, W) each, in the order of counts and labels."""
        for i in indices:
            try:
                item = dataset[i]
            except DatasetError as error:
                skipped.append(str(error))
                continue
            for mirrored in (False, True) if dataset.flip else (False,):
                counts.append(len(item.frames))
                labels.append(item.label)
                yield from np.flip(item.frames, -1) if mirrored else item.frames

    device, coming, latents = next(autoencoder.parameters()).device, frames(), []
    while batch := list(islice(coming, batch_size)):
        pixels = dataset.x_0(torch.from_numpy(np.stack(batch)).to(device))
        latents.append(encode(autoencoder, pixels).half().cpu().contiguous())
    tensors = dict(counts=torch.tensor(counts, dtype=torch.int64), labels=torch.tensor(labels, dtype=torch.int64))
    if latents:
        tensors["latents"] = torch.cat(latents)
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"skipped": json.dumps(skipped)})


@DATASETS.register_module()
class LatentShards(FrameSet):
    """The latents that :func:`cache_latents` wrote.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If it is missing.
        DatasetError: If it holds no latents, or not all of them.
    """

    def __init__(self, root: Root) -> None:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder of latents")
        try:
            index = json.loads((root / _INDEX).read_text())
            shards = [load_file(str(root / name)) for name in index["shards"]]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            said = f"{root}: no whole set of latents, make it with tools/cache_latents.py ({error})"
            raise DatasetError(said) from error
        self.size, self.channels = tuple(index["size"]), index["channels"]
        self.class_names, self.autoencoder = tuple(index["class_names"]), index.get("autoencoder")
        self._videos = [
            (frames.numpy(), label)
            for shard in shards
            if "latents" in shard
            for frames, label in zip(
                shard["latents"].split(shard["counts"].tolist()), shard["labels"].tolist(), strict=True
            )
        ]

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, i: int) -> Item:
        return Item(*self._videos[i])

    def x_0(self, frames: Tensor) -> Tensor:
        """float32 of the fp16 that is kept."""
        return frames.float()
