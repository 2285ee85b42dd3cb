"""Batches of pictures and clips with their noise: of a training, and the same ones for every validation."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.registry import DATASETS, FUNCTIONS
from torch import Tensor
from torch.utils.data import Dataset

from mambavision.diffusion.datasets import FrameSet, Item
from mambavision.engine.loops import BatchMaker, moved
from mambavision.engine.memory import free_memory
from mambavision.engine.photos import DatasetError, read_all

Keep = Literal["device", "host", "disk"]


class _Some(FrameSet):
    """The items of a data set at some indices."""

    def __init__(self, dataset: FrameSet, indices: np.ndarray) -> None:
        self._dataset, self._indices, self.size = dataset, indices.tolist(), dataset.size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Item:
        return self._dataset[self._indices[i]]


class _Kept:
    """Items of a data set, read once and kept in one tensor; parts of their frames by item and place."""

    def __init__(self, dataset: FrameSet, kept_on: torch.device, device: torch.device, advice: str) -> None:
        _check_memory(dataset, kept_on, advice)
        items, self.skipped = read_all(dataset, "video" if len(dataset.size) == 3 else "picture")
        counts = np.array([len(item.frames) for item in items])
        self.labels = np.array([item.label for item in items], np.int64)
        self._counts, self._offsets, self._device = counts, np.cumsum(counts) - counts, device
        self._frames = torch.from_numpy(np.concatenate([item.frames for item in items])).to(kept_on)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray, places: np.ndarray, length: int) -> tuple[Tensor, np.ndarray]:
        """Frames (B, length, C, H, W) on the device, and labels.

        Args:
            indices: Items (B,).
            places: Where to begin (B,), from 0 at an item's first frame to 1 at the last one possible.
            length: How many frames to take of each.
        """
        first = self._offsets[indices] + (places * (self._counts[indices] - length + 1)).astype(np.int64)
        frames = torch.from_numpy(first[:, None] + np.arange(length))
        if self._frames.device == self._device:
            return self._frames[moved(frames, self._device)], self.labels[indices]
        return moved(self._frames[frames], self._device), self.labels[indices]


class _Unkept:
    """Items that are read from their files each time; one that cannot be read is replaced by the next that can."""

    def __init__(self, dataset: FrameSet, device: torch.device) -> None:
        self.dataset, self._device = dataset, device
        self.skipped: list[str] = []
        self._unreadable: set[int] = set()
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray, places: np.ndarray, length: int) -> tuple[Tensor, np.ndarray]:
        """As :meth:`_Kept.read`."""
        items = list(self._pool.map(self._item, indices.tolist()))
        begins = [int(place * (len(item.frames) - length + 1)) for item, place in zip(items, places, strict=True)]
        frames = np.stack([item.frames[k : k + length] for item, k in zip(items, begins, strict=True)])
        return moved(frames, self._device), np.array([item.label for item in items], np.int64)

    def _item(self, index: int) -> Item:
        for i in range(index, index + len(self)):
            try:
                return self.dataset[i % len(self)]
            except DatasetError as error:
                if i % len(self) not in self._unreadable:
                    self._unreadable.add(i % len(self))
                    self.skipped.append(str(error))
                    print_log(f"left out: {error}", logger="current", level=logging.WARNING)
        raise DatasetError(f"none of {len(self)} items can be used; {self.skipped[0]}")


@DATASETS.register_module()
class NoisyBatches(BatchMaker):
    """Endless batches of dict(inputs=x_0, noise=..., draws=..., labels=... where there are classes).

    inputs and noise are float32 (B, C, H, W), or (B, C, T, H, W) of clips; draws (B, 2) are uniform in [0, 1), for the
    time of the noise and for leaving the class out. All items come once before one comes again, in an order of the
    seed; which part of a video, whether it is mirrored, noise and draws are functions of (seed, iteration), on one kind
    of device. So a training that sets `iteration` to its checkpoint's goes on with the batches it would have seen. Each
    process makes the whole batch and yields its slice: together they train on what one alone would.

    Args:
        dataset: The data set, or its config.
        batch_size: Items over all processes.
        keep: Where the items lie: decoded in the device's memory, decoded in the host's, or on the disk, to be read
            again for every batch.
        seed: Of all that is drawn.
        device: Where batches are made; by default the GPU, if there is one.
        rank, world_size: This process and their number; by default those of torch.distributed.

    Attributes:
        iteration: The one whose batch comes next; may be set.
        skipped: A message for each item that cannot be read; of ``keep="disk"`` those found so far.

    Raises:
        ValueError: If the batch is no multiple of the processes, or ``keep`` unknown.
        DatasetError: If no item can be read.
        MemoryError: If memory does not suffice to keep the items; says what it would need.
    """

    def __init__(
        self,
        dataset: FrameSet | dict,
        batch_size: int,
        *,
        keep: Keep = "device",
        seed: int = 0,
        device: str | torch.device | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if keep not in get_args(Keep):
            raise ValueError(f"keep must be one of {', '.join(get_args(Keep))}, got {keep!r}")
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: a whole number of items, at least 1")
        if batch_size % self.world_size:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {self.world_size} processes")
        self.dataset = _built(dataset)
        self.batch_size, self.seed, self.iteration = batch_size, seed, 0
        self.device = _device(device)
        advice = "set train_dataloader.keep='host' or 'disk', or a smaller size"
        self._items = _store(self.dataset, keep, self.device, advice)
        self.metainfo = {"classes": list(self.dataset.class_names)}  # kept in checkpoints
        if self.dataset.autoencoder is not None:
            self.metainfo["autoencoder"] = self.dataset.autoencoder

    @property
    def skipped(self) -> list[str]:
        return self._items.skipped

    def batch(self, iteration: int) -> dict[str, Tensor]:
        """The batch of an iteration: this process's slice of it."""
        share = self.batch_size // self.world_size
        ours = slice(self.rank * share, (self.rank + 1) * share)
        positions = iteration * self.batch_size + np.arange(self.batch_size)
        rounds, places_in_round = np.divmod(positions, len(self._items))
        orders = {number: _order(self.seed, number, len(self._items)) for number in np.unique(rounds).tolist()}
        indices = np.array([orders[number][i] for number, i in zip(rounds.tolist(), places_in_round, strict=True)])
        numbers = np.random.default_rng([self.seed, iteration])
        draws = numbers.random((self.batch_size, 4), np.float32)
        generator = torch.Generator(self.device).manual_seed(int(numbers.integers(2**63)))
        flips = (draws[:, 3] < 0.5) & self.dataset.flip
        return _batch(self.dataset, self._items, indices, draws, flips, generator, ours)


@DATASETS.register_module()
class HeldOutBatches(Dataset):
    """The batches of a validation, always the same: fixed items, noise and times, whatever network or device.

    Noise is drawn for each batch: another ``batch_size`` is other noise, and measures a little differently.

    Each is a batch as of :class:`NoisyBatches`, without mirroring; no class is left out, and the times are spread
    evenly over the items.

    Args:
        dataset: The data set, or its config.
        batch_size: Items a batch.
        num: How many items in all, spread evenly over the data set; all of it if None. No others are read.
        seed: Of what is drawn.
        device: Where batches are made; by default the GPU, if there is one.

    Attributes:
        skipped: A message for each item that cannot be read.

    Raises:
        ValueError: If ``batch_size`` or ``num`` is below 1.
        DatasetError: If no item can be read.
        MemoryError: If memory does not suffice to keep the items; says what it would need.
    """

    def __init__(
        self,
        dataset: FrameSet | dict,
        batch_size: int,
        *,
        num: int | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if num is not None and num < 1:
            raise ValueError(f"num={num} must be at least 1 item, or None for all")
        self.dataset, self.batch_size, self.seed = _built(dataset), batch_size, seed
        self.device, self.metainfo = _device(device), {}
        chosen = len(self.dataset) if num is None else min(num, len(self.dataset))
        some = _Some(self.dataset, np.arange(chosen) * len(self.dataset) // chosen)
        self._items = _store(some, "device", self.device, "hold out fewer (num), or set a smaller size")
        num = len(self._items)
        numbers = np.random.default_rng(seed)
        times = (numbers.permutation(num) + numbers.random(num)) / num
        self._draws = np.column_stack([times, np.ones(num), numbers.random(num)]).astype(np.float32)

    @property
    def skipped(self) -> list[str]:
        return self._items.skipped

    def __len__(self) -> int:
        return -(-len(self._items) // self.batch_size)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        part = slice(i * self.batch_size, (i + 1) * self.batch_size)
        indices, draws = np.arange(len(self._items))[part], self._draws[part]
        if not len(indices):
            raise IndexError(i)
        generator = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, i]).integers(2**63)))
        return _batch(self.dataset, self._items, indices, draws, None, generator, slice(None))


@FUNCTIONS.register_module()
def whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collate function of a loader whose data set holds batches."""
    return batch


def _batch(
    dataset: FrameSet,
    items: _Kept | _Unkept,
    indices: np.ndarray,
    draws: np.ndarray,
    flips: np.ndarray | None,
    generator: torch.Generator,
    ours: slice,
) -> dict[str, Tensor]:
    video = len(dataset.size) == 3
    frames, labels = items.read(indices[ours], draws[ours, 2], dataset.size[0] if video else 1)
    device = frames.device
    noise = torch.randn(len(indices), *_shape(dataset), generator=generator, device=generator.device)[ours]
    x_0 = dataset.x_0(frames)
    x_0 = x_0.transpose(1, 2) if video else x_0[:, 0]  # (B, T, C, H, W) to (B, C, T, H, W) or (B, C, H, W)
    if flips is not None:
        mirrored = moved(flips[ours], device)
        x_0 = torch.where(mirrored.view(-1, *[1] * (x_0.ndim - 1)), x_0.flip(-1), x_0)
    batch = dict(
        inputs=x_0.contiguous(),
        noise=noise.to(device),
        draws=moved(np.ascontiguousarray(draws[ours, :2]), device),
    )
    return {**batch, "labels": moved(labels, device)} if dataset.class_names else batch


def _shape(dataset: FrameSet) -> tuple[int, ...]:
    return dataset.channels, *dataset.size


def _built(dataset: FrameSet | dict) -> FrameSet:
    return DATASETS.build(dataset) if isinstance(dataset, dict) else dataset


def _device(device: str | torch.device | None) -> torch.device:
    device = torch.device(device or get_device())
    if device.type == "cuda" and device.index is None:  # tensors say their index
        device = torch.device("cuda", torch.cuda.current_device())
    return device


@lru_cache(4)
def _order(seed: int, number: int, length: int) -> np.ndarray:
    """The order of the items in one round through them."""
    return np.random.default_rng([seed, number, length]).permutation(length)


def _store(dataset: FrameSet, keep: Keep, device: torch.device, advice: str) -> _Kept | _Unkept:
    """Items by where they are kept; the advice is for where memory does not suffice."""
    if keep == "disk":
        return _Unkept(dataset, device)
    items = _Kept(dataset, device if keep == "device" else torch.device("cpu"), device, advice)
    if items.skipped:
        few, more = items.skipped[:5], len(items.skipped) - 5
        reasons = "; ".join(few) + (f"; and {more} more" if more > 0 else "")
        message = f"{len(items)} of {len(dataset)} items are used; {len(items.skipped)} cannot be: {reasons}"
        print_log(message, logger="current", level=logging.WARNING)
    return items


def _check_memory(dataset: FrameSet, kept_on: torch.device, advice: str) -> None:
    """Raise MemoryError if the items do not fit, judged by a few that can be read: videos are of many lengths."""
    few = 5 if len(dataset.size) == 3 else 1
    spread = dict.fromkeys([*(k * len(dataset) // few for k in range(few)), *range(len(dataset))])
    sizes: list[int] = []
    for i in spread:
        if len(sizes) == few:
            break
        try:
            sizes.append(dataset[i].frames.nbytes)
        except DatasetError:
            continue
    if not sizes:
        return
    need = sum(sizes) / len(sizes) * len(dataset)
    for device, factor in ((torch.device("cpu"), 2), (kept_on, 1)):  # twice while they are put together
        free = free_memory(device)
        if need * factor > free:
            found = f"need {need * factor / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free"
            raise MemoryError(f"{len(dataset)} items {found}: {advice}")
