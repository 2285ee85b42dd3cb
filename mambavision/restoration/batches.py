"""Training batches of random crops, cut and degraded on the device that holds all photos."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import Tensor

from mambavision.engine.loops import BatchMaker, moved
from mambavision.engine.photos import read_all
from mambavision.restoration.datasets import CleanFolder, Pair, PairedFolder, resolve
from mambavision.restoration.degradations import Degradation
from mambavision.restoration.resize import mirror


class Stage(NamedTuple):
    """A part of a training: its iterations, the side of its crops in pixels of gt, and how many a batch holds."""

    iterations: int
    patch: int
    batch: int


class PhotoCache:
    """The photos of a set, all in one uint8 tensor on a device; of 16 bits the upper 8 are kept.

    Args:
        photos: uint8 or uint16 (H, W, C) each, C the same in all.
        device: Where they lie.
    """

    def __init__(self, photos: Sequence[np.ndarray], device: torch.device) -> None:
        self.channels = photos[0].shape[2]
        self.sizes = np.array([photo.shape[:2] for photo in photos], np.int64)
        counts = self.sizes.prod(1) * self.channels
        offsets = np.cumsum(counts) - counts
        pixels = torch.empty(int(counts.sum()), dtype=torch.uint8)
        for offset, photo in zip(offsets, photos, strict=True):
            eight_bits = photo if photo.dtype == np.uint8 else (photo >> 8).astype(np.uint8)
            pixels[offset : offset + photo.size] = torch.from_numpy(eight_bits.reshape(-1))
        self._pixels = pixels.to(device)
        self._table = torch.from_numpy(np.column_stack([offsets, self.sizes])).to(device)

    def crop(self, places: Tensor, side: int, border: Literal["symmetric", "reflect"]) -> Tensor:
        """Square crops, float32 (B, C, side, side) in [0, 1]; beyond its border a photo is mirrored.

        Args:
            places: int64 (B, 6) on the device: photo, first row, first column, and 0 or 1 for flipping rows, flipping
                columns and swapping both.
            side: Pixels.
            border: As in :func:`mirror`.
        """
        photo, top, left, flip_rows, flip_columns, swap = places.view(-1, 6, 1, 1).unbind(1)
        offset, height, width = self._table[photo].unbind(-1)
        step = torch.arange(side, device=places.device)
        i, j = step.view(1, -1, 1), step.view(1, 1, -1)
        i, j = torch.where(swap == 1, j, i), torch.where(swap == 1, i, j)
        row = mirror(top + torch.where(flip_rows == 1, side - 1 - i, i), height, border)
        column = mirror(left + torch.where(flip_columns == 1, side - 1 - j, j), width, border)
        index = offset + (row * width + column) * self.channels
        channel = torch.arange(self.channels, device=places.device).view(-1, 1, 1)
        return self._pixels[index[:, None] + channel].float() / 255


@DATASETS.register_module()
class CropLoader(BatchMaker):
    """Endless batches of dict(inputs=lq, gt=..., sigma=... of a noise), float32 (B, C, H, W) in [0, 1].

    Every photo is decoded once and kept on the device. A crop's photo (each equally often), place and one of 8 flips
    and rotations are drawn from (seed, iteration) alone, its degradation too, on one kind of device. So a training that
    sets `iteration` to its checkpoint's goes on with the batches it would have seen. Each process makes the whole
    batch and yields its slice: together they train on what one alone would.

    It is a loader by itself, and works as dataset of DataLoader(..., batch_size=None).

    Args:
        photos: Clean photos with a degradation, or pairs without; objects or their config dicts.
        degradation: Applied to a batch at once, on the device.
        schedule: Progressive patches, (iterations, patch, batch) each: crops of patch x patch pixels of gt, and how
            many over all processes. The last goes on for ever.
        seed: Of all that is drawn.
        device: Where photos lie and batches are made; by default the GPU, if there is one.
        rank, world_size: This process and their number; by default those of torch.distributed.

    Attributes:
        iteration: The one whose batch comes next; may be set.
        skipped: A message for each photo that cannot be read.
        transparent: How many photos have transparency, which is left out.

    Raises:
        ValueError: If a patch is no multiple of the scale, a batch none of the processes, or degradation and photos do
            not fit.
        DatasetError: If no photo can be read.
    """

    def __init__(
        self,
        photos: CleanFolder | PairedFolder | dict,
        degradation: Degradation | dict | None = None,
        *,
        schedule: Sequence[tuple[int, int, int]],
        seed: int = 0,
        device: str | torch.device | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        photos, degradation = resolve(photos, degradation)
        self.degradation, self.seed = degradation, seed
        self.device = torch.device(device or get_device())
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        self.scale = photos.scale if degradation is None else degradation.scale
        self.schedule = [Stage(*stage) for stage in schedule]
        for stage in self.schedule:
            if min(stage) < 1 or stage.patch % self.scale or stage.batch % self.world_size:
                raise ValueError(
                    f"{stage}: the patch must be a multiple of the scale {self.scale}, the batch of the "
                    f"{self.world_size} processes, and all at least 1"
                )
        self.iteration = 0
        items, self.skipped = read_all(photos)
        self.transparent = sum(item.had_alpha for item in items)
        if self.skipped or self.transparent:
            print_log(
                f"{len(items)} of {len(photos)} photos are used, {self.transparent} of them without their transparency"
                + (f"; {len(self.skipped)} cannot be read, first {self.skipped[0]}" if self.skipped else ""),
                logger="current",
                level=logging.WARNING,
            )
        self._gt = PhotoCache([item.gt if isinstance(item, Pair) else item.pixels for item in items], self.device)
        self._lq = PhotoCache([item.lq for item in items], self.device) if degradation is None else None

    def stage(self, iteration: int) -> Stage:
        """The part of the schedule that an iteration belongs to."""
        for stage in self.schedule:
            iteration -= stage.iterations
            if iteration < 0:
                return stage
        return self.schedule[-1]

    def batch(self, iteration: int) -> dict[str, Tensor]:
        """The batch of an iteration: this process's slice of it."""
        _, patch, size = self.stage(iteration)
        generator = np.random.default_rng([self.seed, iteration])
        if self._lq is not None:
            places = self._draw(generator, self._lq, patch // self.scale, size)
            lq = self._lq.crop(moved(places, self.device), patch // self.scale, "symmetric")
            places[:, 1:3] *= self.scale
            batch = {
                "inputs": lq,
                "gt": self._gt.crop(moved(places, self.device), patch, "symmetric"),
            }
        else:
            # crops with all around that the degradation looks at: lq is a part of the whole degraded photo
            margin = self.degradation.margin
            places = self._draw(generator, self._gt, patch, size)
            places[:, 1:3] -= margin
            gt = self._gt.crop(moved(places, self.device), patch + 2 * margin, self.degradation.border)
            seed = int(generator.integers(2**63))
            degraded = self.degradation(gt, torch.Generator(self.device).manual_seed(seed))
            lq = _without_border(degraded.pop("lq"), margin // self.scale)
            batch = {"inputs": lq, "gt": _without_border(gt, margin), **degraded}
        share = size // self.world_size
        return {name: value[self.rank * share : (self.rank + 1) * share] for name, value in batch.items()}

    @staticmethod
    def _draw(generator: np.random.Generator, cache: PhotoCache, side: int, count: int) -> np.ndarray:
        photo = generator.integers(len(cache.sizes), size=count)
        corner = generator.integers(np.maximum(cache.sizes[photo] - side, 0) + 1)
        return np.column_stack([photo, corner, generator.integers(2, size=(count, 3))])


def _without_border(x: Tensor, width: int) -> Tensor:
    return x[..., width : x.shape[-2] - width, width : x.shape[-1] - width]
