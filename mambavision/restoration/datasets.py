"""Folders of photos, clean alone or in degraded and clean pairs, and their pictures for evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from mmengine.registry import DATASETS, TRANSFORMS
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from mambavision.engine.photos import DatasetError, find_photos, imread_unchanged
from mambavision.restoration.degradations import Degradation

Root = str | os.PathLike

_FULL_RANGE_GRAY = (0.298936021293776, 0.587043074451121, 0.114020904255103)  # MATLAB's rgb2gray
_LIMITED_RANGE_Y = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # MATLAB's rgb2ycbcr, BT.601: Y in 16..235


class Photo(NamedTuple):
    """Pixels, uint8 or uint16 (H, W, 3) RGB or (H, W, 1) gray; the file; whether it had transparency, left out here."""

    pixels: np.ndarray
    path: Path
    had_alpha: bool = False


class Pair(NamedTuple):
    """Degraded and clean photo of one scene; `path` is the degraded one's."""

    lq: np.ndarray
    gt: np.ndarray
    path: Path
    had_alpha: bool = False


def read_photo(path: Root, *, gray: bool = False, gray_range: Literal["full", "limited"] = "full") -> Photo:
    """Read a photo as displayed (EXIF orientation applied), RGB or gray, in its 8 or 16 bits.

    Gray of a colour photo is rounded to its bits: MATLAB's rgb2gray ("full"), or Y of BT.601 in 16..235 ("limited"), as
    the JPEG benchmarks have it. A gray photo read in colour gets three equal channels.

    Raises:
        DatasetError: If the file is missing, truncated or no photo.
    """
    pixels = imread_unchanged(path)
    had_alpha = pixels.ndim == 3 and pixels.shape[2] == 4
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = pixels[..., 2::-1] if pixels.shape[2] > 1 else pixels
    if gray and pixels.shape[2] == 3:
        top = np.iinfo(pixels.dtype).max
        weights, offset = (_FULL_RANGE_GRAY, 0) if gray_range == "full" else (_LIMITED_RANGE_Y, 16 / 255 * top)
        pixels = np.floor(pixels @ np.array(weights) + offset + 0.5).astype(pixels.dtype)[..., None]
    elif not gray and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return Photo(np.ascontiguousarray(pixels), Path(path), had_alpha)


@DATASETS.register_module()
class CleanFolder(Dataset):
    """The photos of folders and their subfolders, sorted; `dataset[i]` reads one as :class:`Photo`.

    Args:
        root: A folder, or several.
        gray, gray_range: As in :func:`read_photo`.

    Raises:
        FileNotFoundError: If a folder is missing.
        DatasetError: If it holds no photo.
    """

    def __init__(
        self, root: Root | Sequence[Root], *, gray: bool = False, gray_range: Literal["full", "limited"] = "full"
    ) -> None:
        roots = [root] if isinstance(root, (str, os.PathLike)) else root
        self.paths = [path for folder in roots for path, _ in find_photos(folder)]
        self.gray, self.gray_range = gray, gray_range

    @property
    def channels(self) -> int:
        """1 if gray, else 3."""
        return 1 if self.gray else 3

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Photo:
        return read_photo(self.paths[i], gray=self.gray, gray_range=self.gray_range)


@DATASETS.register_module()
class PairedFolder(Dataset):
    """Photos of two folders, degraded and clean, paired by their paths without suffix; `dataset[i]` is a :class:`Pair`.

    Args:
        lq_root: Folder of the degraded photos.
        gt_root: Folder of the clean photos.
        scale: How many times larger the clean photos are.
        gray, gray_range: As in :func:`read_photo`.

    Raises:
        FileNotFoundError: If a folder is missing.
        DatasetError: If it holds no photo, or a photo has no partner; on reading, if their sizes do not fit.
    """

    def __init__(
        self,
        lq_root: Root,
        gt_root: Root,
        *,
        scale: int = 1,
        gray: bool = False,
        gray_range: Literal["full", "limited"] = "full",
    ) -> None:
        lq, gt = ({name.with_suffix(""): path for path, name in find_photos(root)} for root in (lq_root, gt_root))
        alone = sorted(lq.keys() ^ gt.keys())
        if alone:
            there, missing = (lq_root, gt_root) if alone[0] in lq else (gt_root, lq_root)
            raise DatasetError(f"{there}: {len(alone)} photos have no partner in {missing}, the first is {alone[0]}")
        self.paths = [lq[name] for name in lq]
        self.gt_paths = [gt[name] for name in lq]
        self.scale, self.gray, self.gray_range = scale, gray, gray_range

    @property
    def channels(self) -> int:
        """1 if gray, else 3."""
        return 1 if self.gray else 3

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Pair:
        lq, gt = (
            read_photo(path, gray=self.gray, gray_range=self.gray_range) for path in (self.paths[i], self.gt_paths[i])
        )
        (h, w), (gt_h, gt_w) = lq.pixels.shape[:2], gt.pixels.shape[:2]
        if (gt_h, gt_w) != (h * self.scale, w * self.scale):
            expected = f"{w * self.scale}x{h * self.scale} for {lq.path} of {w}x{h} at scale {self.scale}"
            raise DatasetError(f"{gt.path}: {gt_w}x{gt_h} pixels, expected {expected}")
        return Pair(lq.pixels, gt.pixels, lq.path, lq.had_alpha or gt.had_alpha)


@DATASETS.register_module()
class EvaluationSet(Dataset):
    """Pictures for evaluation: dict(inputs=lq, gt=..., path=..., set=name, sigma=... of a noise), always the same.

    lq and gt are float32 (C, H, W) in [0, 1], the sides of gt cropped to a multiple of the scale.

    Args:
        photos: Clean photos with a degradation, or pairs without; objects or their config dicts.
        degradation: Applied by its `for_evaluation`.
        name: Set that a metric counts the pictures to.

    Raises:
        ValueError: If photos and degradation do not fit.
    """

    def __init__(
        self,
        photos: CleanFolder | PairedFolder | dict,
        degradation: Degradation | dict | None = None,
        *,
        name: str = "",
    ) -> None:
        self.photos, self.degradation = resolve(photos, degradation)
        self.name, self.metainfo = name, {}

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, i: int) -> dict:
        item = self.photos[i]
        names = dict(path=str(item.path), set=self.name)
        if self.degradation is None:
            return dict(inputs=to_tensor(item.lq), gt=to_tensor(item.gt), **names)
        gt, scale = to_tensor(item.pixels), self.degradation.scale
        gt = gt[:, : gt.shape[1] // scale * scale, : gt.shape[2] // scale * scale]
        degraded = {key: value[0] for key, value in self.degradation.for_evaluation(gt[None]).items()}
        return dict(inputs=degraded.pop("lq"), gt=gt, **names, **degraded)


@DATASETS.register_module()
class EvaluationSets(ConcatDataset):
    """Several evaluation sets, one after another; objects or their config dicts."""

    def __init__(self, sets: Sequence[EvaluationSet | dict]) -> None:
        super().__init__([DATASETS.build(item) if isinstance(item, dict) else item for item in sets])
        self.metainfo: dict = {}


def resolve(
    photos: CleanFolder | PairedFolder | dict, degradation: Degradation | dict | None
) -> tuple[CleanFolder | PairedFolder, Degradation | None]:
    """Photos and their degradation, built where they are config dicts.

    Raises:
        ValueError: If clean photos come without a degradation, or pairs with one.
    """
    photos = DATASETS.build(photos) if isinstance(photos, dict) else photos
    degradation = TRANSFORMS.build(degradation) if isinstance(degradation, dict) else degradation
    if isinstance(photos, PairedFolder) != (degradation is None):
        has = "needs a" if degradation is None else "takes no"
        raise ValueError(f"a {type(photos).__name__} {has} degradation, got {degradation}")
    return photos, degradation


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 or uint16 (H, W, C) to float32 (C, H, W) in [0, 1]."""
    top = np.iinfo(pixels.dtype).max
    return torch.from_numpy(pixels.astype(np.float32) / top).permute(2, 0, 1).contiguous()
