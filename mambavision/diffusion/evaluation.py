"""Comparing sets of samples: reading them from what they lie in, and their distances in a network's features."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor
from tqdm import tqdm

from mambavision.diffusion import register as register  # configs name data sets
from mambavision.diffusion.datasets import FrameSet, ImageArchive, ImageFolder, Item, VideoFolder
from mambavision.diffusion.features import FeatureExtractor, extract
from mambavision.diffusion.metrics import UNREADABLE, FeatureSet, frechet_distance, kernel_distance
from mambavision.engine.photos import DatasetError, find_photos, first_size
from mambavision.engine.runs import read_config

PathLike = str | os.PathLike


class SampleArchive(FrameSet):
    """Samples of an .npz file: ``arr_0``, uint8 (N, H, W, C) of pictures or (N, T, H, W, C) of clips, C = 1 or 3.

    Raises:
        DatasetError: If the file does not hold that.
    """

    def __init__(self, path: PathLike) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self._samples = file["arr_0"]
        except UNREADABLE as error:
            raise DatasetError(f"{path}: not an .npz file of samples, or a damaged one ({error})") from error
        shape = self._samples.shape
        if self._samples.dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] not in (1, 3) or not shape[0]:
            found = f"{self._samples.dtype} {shape}"
            raise DatasetError(f"{path}: arr_0 is {found}; uint8 (N, H, W, C) or (N, T, H, W, C) is wanted, C 1 or 3")
        self.size, self.channels = shape[1:-1], shape[-1]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Item:
        frames = self._samples[i] if len(self.size) == 3 else self._samples[i : i + 1]
        return Item(frames.transpose(0, 3, 1, 2), 0)


class SampleFolder(ImageFolder):
    """Samples as pictures in a folder, all of one size; grid.png, which tools/sample.py writes too, is left out."""

    def __init__(self, root: PathLike) -> None:
        if any(Path(root).glob("*.gif")) and not any(Path(root).glob("*.png")):
            raise DatasetError(f"{root}: clips are compared as samples.npz: write it by tools/sample.py --save npz")
        size = first_size(path for path, _ in find_photos(root) if path.name != "grid.png")
        if size is None:
            raise DatasetError(f"{root}: no pictures in this folder but a grid, or none that can be read")
        super().__init__(root, size, flip=False)
        self.paths = [path for path in self.paths if path.name != "grid.png"]

    def _frame(self, img: np.ndarray) -> np.ndarray:
        if img.shape[:2] != self.size:
            raise ValueError(f"samples are of {img.shape[:2]} and of {self.size} pixels: compare those of one size")
        return super()._frame(img)


def open_samples(path: PathLike, size: tuple[int, ...] | None = None) -> FrameSet:
    """The pictures or clips of an .npz file, a folder, a .tar or .zip archive, or of a config's training set.

    Args:
        path: The file or folder.
        size: (H, W) to which photos of a folder or archive are resized and cut, (T, H, W) of videos; None: a folder's
            pictures are samples, all of one size.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        ValueError: If it holds nothing that can be used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of samples")
    if path.suffix == ".npz":
        return SampleArchive(path)
    if path.suffix == ".py":
        cfg = read_config(path)
        init_default_scope("mmengine")
        return DATASETS.build(cfg.train_dataloader.dataset)
    if size is None:
        if path.is_dir():
            return SampleFolder(path)
        raise DatasetError(f"{path}: samples are an .npz file (tools/sample.py --save npz) or a folder of pictures")
    if len(size) == 3:
        return VideoFolder(path, size, flip=False)
    if path.is_dir():
        pictures = ImageFolder(path, size, flip=False)
        if Path(path, "samples.json").is_file():  # of tools/sample.py, with a grid of all of them
            pictures.paths = [picture for picture in pictures.paths if picture.name != "grid.png"]
        return pictures
    return ImageArchive(path, size, flip=False)


def features_of(
    dataset: FrameSet, extractor: FeatureExtractor, *, source: str, num: int | None = None, batch_size: int = 100
) -> FeatureSet:
    """The features of a set of pictures or clips; what cannot be read is left out, and noted on stderr.

    Args:
        dataset: Of its videos that are longer than a clip, a clip at random, always the same.
        extractor: Computes the features.
        source: What the set is, for messages.
        num: How many items, the first ones; all if None.
        batch_size: Items at once.

    Raises:
        ValueError: If the set is not of the extractor's modality, or smaller than ``num``.
    """
    modality = "video" if len(dataset.size) == 3 else "image"
    if modality != extractor.modality:
        raise ValueError(f"{source} holds {modality}s, {extractor.name} is for {extractor.modality}s: name --features")
    if dataset.channels not in (1, 3):
        raise ValueError(f"{source} holds {dataset.channels} channels, latents perhaps: pictures have 1 or 3")
    if num is not None and num > len(dataset):
        raise ValueError(f"{source} holds {len(dataset)}, fewer than the {num} that are asked for")
    skipped: list[str] = []
    items = _read(dataset, num or len(dataset), source, skipped)
    features = extract(extractor, _batches(items, batch_size))
    if skipped:
        print(f"note: {len(skipped)} of {source} cannot be read, first {skipped[0]}", file=sys.stderr)
    return FeatureSet.of(features, extractor=extractor.name, source=source, size=tuple(dataset.size))


def compare(samples: FeatureSet, reference: FeatureSet, *, seed: int = 0) -> dict[str, Any]:
    """Fréchet distance and, where the reference has its features, kernel distance of samples from a reference.

    Raises:
        ValueError: If they were not made by the same features, or are of different sizes.
    """
    found: dict[str, Any] = {"features": samples.extractor, "samples": samples.count, "reference": reference.count}
    found["frechet_distance"] = frechet_distance(samples, reference)
    if reference.features is not None and samples.features is not None:
        mean, std = kernel_distance(samples, reference, seed=seed)
        found |= {"kernel_distance": mean, "kernel_distance_std": std}
    return found


def _read(dataset: FrameSet, num: int, source: str, skipped: list[str]) -> Iterator[Tensor]:
    """uint8 RGB (3, H, W) or (3, T, H, W) of each item that can be read."""

    def read(i: int) -> Tensor | DatasetError:
        try:
            frames = dataset[i].frames
        except DatasetError as error:
            return error
        if len(dataset.size) == 3:
            begin = np.random.default_rng([0, i]).integers(len(frames) - dataset.size[0] + 1)
            frames = frames[begin : begin + dataset.size[0]]
        x = torch.from_numpy(np.ascontiguousarray(frames.transpose(1, 0, 2, 3))).expand(3, -1, -1, -1)
        return x if len(dataset.size) == 3 else x[:, 0]

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=num, desc=Path(source).name, unit="sample") as bar:
        for begin in range(0, num, 1024):  # not all at once into memory
            for item in pool.map(read, range(begin, min(begin + 1024, num))):
                bar.update()
                if isinstance(item, DatasetError):
                    skipped.append(str(item))
                else:
                    yield item


def _batches(items: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    while batch := list(islice(items, batch_size)):
        yield torch.stack(batch)
