"""Pictures and videos to train on: folders, class folders, archives, arrays; each item in the pixels it is trained at.

All are a :class:`FrameSet`, which says what the training asks of a data set.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

import cv2
import numpy as np
from mmengine.registry import DATASETS
from PIL import Image, ImageSequence
from torch import Tensor
from torch.utils.data import Dataset

from mambavision.engine.photos import (
    PHOTO_SUFFIXES,
    DatasetError,
    decode_unchanged,
    find_photos,
    imread_unchanged,
    is_hidden,
    walk,
)
from mambavision.engine.video import is_video, open_video

Root = str | os.PathLike
Split = Literal["train", "test"]


class Item(NamedTuple):
    """Frames, uint8 (F, C, H, W), one of a picture, at least T of a video; and the class, 0 where there are none."""

    frames: np.ndarray
    label: int


class FrameSet(Dataset):
    """A map-style data set: ``dataset[i]`` is an :class:`Item`, or raises DatasetError where it cannot be read.

    Attributes:
        size: (H, W) of pictures, or (T, H, W) of clips that are cut from videos of at least T frames.
        channels: Of a frame.
        class_names: Of the labels; empty where there are no classes.
        flip: A mirrored item is as good.
        autoencoder: Of latents, what tells the autoencoder that made them from others; None where it is not known.
    """

    size: tuple[int, ...]
    channels: int
    class_names: tuple[str, ...] = ()
    flip: bool = False
    autoencoder: str | None = None

    def x_0(self, frames: Tensor) -> Tensor:
        """What a network learns to make, float32, of items' frames (B, T, C, H, W) as they are kept."""
        return frames.float() / 127.5 - 1


class _Pictures(FrameSet):
    """Items made of whole photos: resized until they cover (H, W), and cut there from their middle."""

    def __init__(self, size: Sequence[int], gray: bool, flip: bool) -> None:
        if min(size) < 1:
            raise ValueError(f"size must be at least 1 pixel each way, got {tuple(size)}")
        self.size, self.gray, self.flip = tuple(size), gray, flip

    @property
    def channels(self) -> int:
        """1 if gray, else 3."""
        return 1 if self.gray else 3

    def _frame(self, img: np.ndarray) -> np.ndarray:
        """uint8 (C, H, W), gray or RGB, of a photo as OpenCV reads it."""
        return np.ascontiguousarray(cover(to_rgb(img, gray=self.gray), *self.size[-2:]).transpose(2, 0, 1))


@DATASETS.register_module()
class ImageFolder(_Pictures):
    """The photos of a folder and its subfolders, sorted, without classes; what is hidden is left out.

    Args:
        root: The folder.
        size: (H, W) in pixels: photos are resized until they cover it, and cut from their middle.
        gray: In one channel, not in RGB.
        flip: Mirrored photos are as good.

    Raises:
        FileNotFoundError: If the folder is missing.
        DatasetError: If it holds no photo.
        ValueError: If the size is not positive.
    """

    def __init__(self, root: Root, size: tuple[int, int], *, gray: bool = False, flip: bool = True) -> None:
        super().__init__(_of_picture(size), gray, flip)
        self.paths = [path for path, _ in find_photos(root)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Item:
        return Item(self._frame(imread_unchanged(self.paths[i]))[None], 0)


@DATASETS.register_module()
class ClassFolder(ImageFolder):
    """The photos of a folder of folders, one a class; the classes are sorted by name.

    If all photos lie below one folder, which has subfolders with photos, these are the classes, and so on. Hidden
    folders, by a dot before their names, and __MACOSX are none. Arguments and errors are those of :class:`ImageFolder`;
    besides, a photo that is in no class folder raises DatasetError.
    """

    def __init__(self, root: Root, size: tuple[int, int], *, gray: bool = False, flip: bool = True) -> None:
        super().__init__(root, size, gray=gray, flip=flip)
        folders = [path.relative_to(root).parts[:-1] for path in self.paths]
        self.class_names, self.labels = _classes(folders, root)

    def __getitem__(self, i: int) -> Item:
        return super().__getitem__(i)._replace(label=self.labels[i])


@DATASETS.register_module()
class ImageArchive(_Pictures):
    """The photos of a .tar (.tar.gz, .tar.xz ...) or .zip file; folders in it are classes, if there are any.

    The file's photos are kept in memory as they are, undecoded. What is hidden is left out, and classes are found below
    a folder that holds all others, as :class:`ClassFolder` does both.

    Args:
        path: The file.
        size, gray, flip: As :class:`ImageFolder`.
        folder: The folder in it that holds the photos or the class folders, such as "data/train".

    Raises:
        FileNotFoundError: If there is no such file.
        DatasetError: If it is no archive, holds no photo there, or some lie in class folders and some in none.
    """

    def __init__(
        self, path: Root, size: tuple[int, int], *, folder: str = "", gray: bool = False, flip: bool = True
    ) -> None:
        super().__init__(_of_picture(size), gray, flip)
        self.path, inside = Path(path), PurePosixPath(folder)
        found = sorted(
            (name, data)
            for name, data in _members(self.path)
            if name.suffix.lower() in PHOTO_SUFFIXES
            and name.is_relative_to(inside)
            and not is_hidden(name.relative_to(inside))
        )
        if not found:
            raise DatasetError(f"{path}: no photos in {folder or 'it'}")
        self._names, self._data = [name for name, _ in found], [data for _, data in found]
        folders = [name.relative_to(inside).parts[:-1] for name in self._names]
        self.labels = [0] * len(folders)
        if any(folders):
            self.class_names, self.labels = _classes(folders, path)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Item:
        img = decode_unchanged(self._data[i], f"{self.path}: {self._names[i]}")
        return Item(self._frame(img)[None], self.labels[i])


@DATASETS.register_module()
class CifarArchive(FrameSet):
    """CIFAR-10 or CIFAR-100 as its authors distribute it: cifar-10-binary.tar.gz or cifar-100-binary.tar.gz.

    A record is one byte of the class (of CIFAR-100 the coarse and the fine one; the fine one is taken), and 3 x 32 x 32
    bytes of pixels. The archives for Python hold pickles, which could run code, and are not read.

    Args:
        path: The file.
        split: Of its pictures.
        flip: Mirrored pictures are as good.

    Raises:
        FileNotFoundError: If there is no such file.
        DatasetError: If it is not such an archive, or a class has no name.
        ValueError: If the split is unknown.
    """

    size, channels = (32, 32), 3

    def __init__(self, path: Root, split: Split = "train", *, flip: bool = True) -> None:
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
        self.flip = flip
        members = {name.name: data for name, data in sorted(_members(Path(path)))}
        ours = [
            data for name, data in members.items() if name.endswith(".bin") and ("test" in name) == (split == "test")
        ]
        names = members.get("batches.meta.txt") or members.get("fine_label_names.txt")
        if not ours or names is None:
            raise DatasetError(
                f"{path}: not an archive of CIFAR's binary version; cifar-10-binary.tar.gz and cifar-100-binary.tar.gz "
                "are, and ClassFolder or ImageArchive read photos"
            )
        self.class_names = tuple(names.decode().split())
        length = 3 * 32 * 32 + (1 if "batches.meta.txt" in members else 2)
        data = np.frombuffer(b"".join(ours), np.uint8)
        if not len(data) or len(data) % length:
            raise DatasetError(
                f"{path}: its {len(data)} bytes of {split} pictures are no records of {length}; cut short?"
            )
        records = data.reshape(-1, length)
        self.labels, self._pixels = records[:, -3073], records[:, -3072:].reshape(-1, 3, 32, 32)
        if self.labels.max() >= len(self.class_names):
            raise DatasetError(
                f"{path}: a picture has label {self.labels.max()}, but names are given for {len(self.class_names)} "
                "classes (from 0 on); get the archive anew, or put the photos into class folders"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Item:
        return Item(self._pixels[i][None], int(self.labels[i]))


@DATASETS.register_module()
class ImageArrays(FrameSet):
    """Pictures that are packed as arrays, such as Tiny-ImageNet's ``tools/tinyimagenet.py pack``.

    Args:
        images: .npy file of uint8 (N, H, W, C) RGB or gray.
        labels: .npy file of N classes, or None.
        names: .json file of the classes' names, with ``labels``.
        classes: Names of the classes to take, in the order of their labels; all if None.
        bgr: The channels are BGR.
        flip: Mirrored pictures are as good.

    Raises:
        FileNotFoundError: If a file is missing.
        DatasetError: If the files do not hold that, or do not fit each other, or a class is not among the names.
        ValueError: If one of ``labels`` and ``names`` is missing, or both are and there are ``classes``.
    """

    def __init__(
        self,
        images: Root,
        labels: Root | None = None,
        names: Root | None = None,
        *,
        classes: Sequence[str] | None = None,
        bgr: bool = False,
        flip: bool = True,
    ) -> None:
        if (labels is None) != (names is None):
            raise ValueError(f"labels and names come together, got labels={labels}, names={names}")
        self._images, self.flip, self.bgr = _load_array(images), flip, bgr
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or self._images.shape[3] not in (1, 3):
            found = f"{self._images.dtype} {self._images.shape}"
            raise DatasetError(f"{images}: holds {found}, expected uint8 (N, H, W, 1 or 3)")
        self.size, self.channels = self._images.shape[1:3], self._images.shape[3]
        self.class_names = () if names is None else tuple(json.loads(Path(names).read_text()))
        self.labels = np.zeros(len(self._images), np.int64) if labels is None else _load_array(labels)
        if self.labels.ndim != 1 or self.labels.dtype.kind not in "iu":
            raise DatasetError(f"{labels}: holds {self.labels.dtype} {self.labels.shape}, expected whole numbers (N,)")
        low, high = (self.labels.min(), self.labels.max()) if len(self.labels) else (0, 0)
        count = len(self.class_names)
        if len(self.labels) != len(self._images) or (labels is not None and (low < 0 or high >= count)):
            raise DatasetError(
                f"{labels}: {len(self.labels)} labels from {low} to {high}, expected one of 0 to {count - 1} "
                f"({count} names in {names}) for each of {len(self._images)} pictures"
            )
        self._rows = np.arange(len(self._images))
        if classes is not None:
            self._take(classes, names)

    def _take(self, classes: Sequence[str], names: Root | None) -> None:
        """Leave pictures of these classes, and number the classes anew."""
        unknown = [name for name in classes if name not in self.class_names]
        if names is None or not classes:
            raise ValueError("classes: give labels and names, and at least one of the names")
        if unknown:
            raise DatasetError(f"{names}: no class {', '.join(map(repr, unknown))} among its {len(self.class_names)}")
        new = np.full(len(self.class_names), -1)
        new[[self.class_names.index(name) for name in classes]] = np.arange(len(classes))
        labels = new[self.labels]
        self._rows = np.flatnonzero(labels >= 0)
        self.labels, self.class_names = labels[self._rows], tuple(classes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Item:
        image = self._images[self._rows[i]]
        image = image[..., ::-1] if self.bgr else image
        return Item(np.ascontiguousarray(image.transpose(2, 0, 1))[None], int(self.labels[i]))


@DATASETS.register_module()
class VideoFolder(_Pictures):
    """The videos of a folder and its subfolders, sorted: video files, .gif files, and folders of frames.

    A folder with at least two photos directly in it is a video, its photos the frames, in the order of the numbers in
    their names: 2.png before 10.png. What is hidden, by a dot before its name, and __MACOSX is left out.

    Args:
        root: The folder.
        size: (T, H, W): frames of a clip, and pixels, to which frames are resized and cut as in :class:`ImageFolder`.
        stride: Take every so manieth frame.
        classes: Folders in the root are classes, as :class:`ClassFolder` finds them.
        gray, flip: As :class:`ImageFolder`, of all frames of a clip alike.

    Raises:
        FileNotFoundError: If the folder is missing.
        DatasetError: If it holds no video; on reading, if one is shorter than a clip.
        ValueError: If size or stride are not positive.
    """

    def __init__(
        self,
        root: Root,
        size: tuple[int, int, int],
        *,
        stride: int = 1,
        classes: bool = False,
        gray: bool = False,
        flip: bool = True,
    ) -> None:
        super().__init__(size, gray, flip)
        if stride < 1 or len(size) != 3:
            raise ValueError(f"size must be (frames, height, width) and stride at least 1, got {size} and {stride}")
        self.stride = stride
        self.paths = sorted(_find_videos(Path(root)))
        if not self.paths:
            raise DatasetError(f"{root}: no videos in this folder: no video files, .gif files or folders of frames")
        self.labels = [0] * len(self.paths)
        if classes:
            folders = [path.relative_to(root).parts[:-1] for path in self.paths]
            self.class_names, self.labels = _classes(folders, root)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Item:
        path = self.paths[i]
        frames = [self._frame(img) for k, img in enumerate(_read_video(path)) if k % self.stride == 0]
        if len(frames) < self.size[0]:
            raise DatasetError(f"{path}: {len(frames)} frames at stride {self.stride}, a clip has {self.size[0]}")
        return Item(np.stack(frames), self.labels[i])


def to_rgb(img: np.ndarray, *, gray: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) RGB, or (H, W, 1), of a photo as OpenCV reads it; what is transparent becomes white."""
    if img.dtype == np.uint16:
        img = (img >> 8).astype(np.uint8)
    if img.ndim == 3 and img.shape[2] == 4:
        alpha = img[..., 3:].astype(np.float32) / 255
        img = (img[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)
    if img.ndim == 2 or img.shape[2] == 1:
        img = img.reshape(*img.shape[:2], 1)
        return img if gray else img.repeat(3, axis=2)
    return cv2.cvtColor(img, cv2.COLOR_BGR2GRAY)[..., None] if gray else cv2.cvtColor(img, cv2.COLOR_BGR2RGB)


def cover(img: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, C) resized until it just covers (height, width), and cut to it from its middle."""
    h, w, channels = img.shape
    scale = max(height / h, width / w)
    if scale != 1:
        size = max(round(w * scale), width), max(round(h * scale), height)
        img = cv2.resize(img, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (img.shape[0] - height) // 2, (img.shape[1] - width) // 2
    return img.reshape(*img.shape[:2], channels)[top : top + height, left : left + width]


def _classes(folders: Sequence[tuple[str, ...]], where: Root) -> tuple[tuple[str, ...], list[int]]:
    """Names of classes, sorted, and the class of each item, by the first of its folders that not all of them share."""
    while len({parts[:1] for parts in folders}) == 1 and any(len(parts) > 1 for parts in folders):
        where = f"{where}/{folders[0][0]}"
        folders = [parts[1:] for parts in folders]
    alone = sum(not parts for parts in folders)
    if alone:
        raise DatasetError(f"{where}: {alone} items lie in no class folder; put each into a folder named for its class")
    names = sorted({parts[0] for parts in folders})
    label_of = {name: label for label, name in enumerate(names)}
    return tuple(names), [label_of[parts[0]] for parts in folders]


def _of_picture(size: Sequence[int]) -> Sequence[int]:
    if len(size) != 2:
        raise ValueError(f"size must be (height, width) of pictures, got {tuple(size)}; VideoFolder reads clips")
    return size


def _members(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files of an archive, read in the order in which they lie in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such archive")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((PurePosixPath(name), archive.read(name)) for name in archive.namelist())
            return
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield PurePosixPath(member.name), archive.extractfile(member).read()
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
        # RuntimeError: encrypted, or of a compression that Python does not know
        raise DatasetError(f"{path}: not a whole .tar or .zip archive ({error})") from error


def _load_array(path: Root) -> np.ndarray:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DatasetError(f"{path}: not a .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray):
        raise DatasetError(f"{path}: an archive of arrays; one .npy file is wanted")
    return array


def _find_videos(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    for folder, names in walk(root):
        suffixes = [Path(name).suffix.lower() for name in names]
        yield from (folder / name for name in names if is_video(name) or name.lower().endswith(".gif"))
        if sum(suffix in PHOTO_SUFFIXES for suffix in suffixes) > 1:
            yield folder


def _by_number(path: Path) -> tuple:
    """Sorts names by the numbers in them, by their text between these."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _read_video(path: Path) -> Iterator[np.ndarray]:
    """Frames as OpenCV reads photos; a frame of a GIF as often as it lasts longer than its shortest."""
    if path.is_dir():
        photos = [file for file in path.iterdir() if file.suffix.lower() in PHOTO_SUFFIXES and not is_hidden(file.name)]
        yield from (imread_unchanged(file) for file in sorted(photos, key=_by_number))
    elif path.suffix.lower() == ".gif":
        try:
            with Image.open(path) as gif:
                durations = [frame.info.get("duration", 0) for frame in ImageSequence.Iterator(gif)]
                shortest = min(filter(None, durations), default=1)
                for frame, duration in zip(ImageSequence.Iterator(gif), durations, strict=True):
                    img = cv2.cvtColor(np.array(frame.convert("RGBA")), cv2.COLOR_RGBA2BGRA)
                    yield from repeat(img, max(1, round(duration / shortest)))
        except Exception as error:  # Pillow raises IndexError, struct.error and others on damaged files
            raise DatasetError(f"{path}: not a whole GIF ({error})") from error
    else:
        with open_video(path) as video:
            yield from video.frames
