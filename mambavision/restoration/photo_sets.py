"""The public photo sets that are trained and tested on, gathered from the git repositories that hold them.

No repository states a licence for its photos: research use, and nothing of them is distributed here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from mambavision.engine.photos import DatasetError, find_photos, imread_unchanged


class PhotoSet(NamedTuple):
    """A set: its folder, the repository on GitHub, the patterns of its photos there, and how many are taken."""

    folder: str
    repository: str
    patterns: tuple[str, ...]
    count: int
    every: int = 1
    leave_out: tuple[str, ...] = ()


PHOTO_SETS = (
    PhotoSet(
        "train/bsd400",  # BSDS500's third part, val, holds all of CBSD68, BSD68 and BSD100
        "BIDS/BSDS500",
        ("BSDS500/data/images/train/*.jpg", "BSDS500/data/images/test/*.jpg"),
        398,
        leave_out=("12003.jpg", "302003.jpg"),  # Set12's starfish (04) and Set5's woman were cut from them
    ),
    PhotoSet("train/t91", "tegg89/SRCNN-Tensorflow", ("Train/*.bmp",), 91),
    PhotoSet("train/coco128", "developer0hye/COCO128", ("train2017/*.jpg",), 128),
    PhotoSet("val/davis", "MathLee/EOR-VOS", ("DAVIS/JPEGImages/480p/*/*.jpg",), 16, every=90),
    PhotoSet("test/set12", "cszn/FFDNet", ("testsets/Set12/*.png",), 12),
    PhotoSet("test/bsd68", "cszn/FFDNet", ("testsets/BSD68/*.png",), 68),
    PhotoSet("test/cbsd68", "cszn/FFDNet", ("testsets/CBSD68/*.png",), 68),
    PhotoSet("test/kodak24", "cszn/FFDNet", ("testsets/Kodak24/*.png",), 24),
    PhotoSet("test/mcmaster", "cszn/FFDNet", ("testsets/McMaster/*.tif",), 18),
    PhotoSet("test/classic5", "cszn/DnCNN", ("testsets/classic5/*.bmp",), 5),
    PhotoSet("test/live1", "cszn/DnCNN", ("testsets/LIVE1/*.bmp",), 29),
    PhotoSet("test/set14", "cszn/DnCNN", ("testsets/Set14/*.bmp",), 14),
    PhotoSet("test/urban100", "majedelhelou/denoising_datasets", ("CUrban100/*.png",), 100),
    PhotoSet("test/bsd100", "BIDS/BSDS500", ("BSDS500/data/images/val/*.jpg",), 100),
    PhotoSet("test/set5", "JingyunLiang/SwinIR", ("testsets/Set5/HR/*.png",), 5),
    *(
        PhotoSet(f"test/set5_lr/x{s}", "JingyunLiang/SwinIR", (f"testsets/Set5/LR_bicubic/X{s}/*.png",), 5)
        for s in (2, 3, 4, 8)
    ),
)


def prepare(clones: str | os.PathLike, out: str | os.PathLike) -> dict[str, int]:
    """Copy every set into its folder of `out`, and check that no test photo is among the training photos.

    Files are copied as they are, but BMP and TIFF become PNG of the same pixels.

    Args:
        clones: Folder with a clone of each repository, under its name without the owner.
        out: Folder to make; sets that are there already are left alone.

    Returns:
        The number of photos of each set's folder.

    Raises:
        DatasetError: A repository or some of its photos are missing, or a training photo is a test photo.
    """
    sources = {photo_set: _find(photo_set, Path(clones)) for photo_set in PHOTO_SETS}  # all, before any is copied
    for photo_set, files in sources.items():
        _copy(files, Path(out) / photo_set.folder)
    check_disjoint(Path(out) / "train", Path(out) / "test")
    return {photo_set.folder: len(files) for photo_set, files in sources.items()}


def check_disjoint(train: str | os.PathLike, test: str | os.PathLike) -> None:
    """Check that no photo under `train` is one under `test`, also not smaller, gray or compressed anew.

    Raises:
        DatasetError: Names the first such pair: two thumbnails correlate by more than 0.97.
    """
    files = [path for path, _ in find_photos(train)]
    known = np.stack([_thumbnail(path) for path in files])
    for path, _ in find_photos(test):
        likeness = known @ _thumbnail(path)
        closest = int(likeness.argmax())
        if likeness[closest] > 0.97:
            raise DatasetError(f"{files[closest]} is the test photo {path}; training on it would spoil the comparison")


def _find(photo_set: PhotoSet, clones: Path) -> list[Path]:
    root = clones / photo_set.repository.partition("/")[2]
    if not root.is_dir():
        raise DatasetError(f"{root}: no such clone; run: git clone https://github.com/{photo_set.repository} {root}")
    files = [file for pattern in photo_set.patterns for file in sorted(root.glob(pattern))]
    files = [file for file in files if file.name not in photo_set.leave_out][:: photo_set.every]
    if len(files) != photo_set.count:
        expected = f"{photo_set.count} photos for {photo_set.folder} in {', '.join(photo_set.patterns)}"
        raise DatasetError(f"{root}: expected {expected}, found {len(files)}; is the clone whole?")
    return files


def _copy(files: list[Path], folder: Path) -> None:
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in tqdm(files, unit="photo", desc=folder.name):
        name = file.name if folder.name != "davis" else f"{file.parent.name}_{file.name}"
        if file.suffix.lower() in (".bmp", ".tif"):
            _, data = cv2.imencode(".png", imread_unchanged(file))
            (unfinished / name).with_suffix(".png").write_bytes(data)
        else:
            shutil.copyfile(file, unfinished / name)
    os.replace(unfinished, folder)


def _thumbnail(path: Path) -> np.ndarray:
    """The photo as 24 x 24 gray values of mean 0 and length 1."""
    photo = imread_unchanged(path)
    gray = photo if photo.ndim == 2 else cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(gray, (24, 24), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    return small / max(float(np.linalg.norm(small)), 1e-6)
