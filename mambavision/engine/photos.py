"""Reading photos as people have them, and saying in one line what is wrong with a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Literal, TypeVar

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")


Item = TypeVar("Item")


class DatasetError(ValueError):
    """Input data that cannot be used; the message is one line that names the file and what is wrong with it."""


def imread_unchanged(
    path: str | os.PathLike, *, orientation: Literal["displayed", "stored"] = "displayed"
) -> np.ndarray:
    """Read a photo with the channels and bits it has.

    A JPEG's EXIF orientation is applied ("displayed", what a viewer shows) or ignored ("stored").

    Returns:
        uint8 or uint16, contiguous: (H, W) gray, (H, W, 3) BGR or (H, W, 4) BGRA.

    Raises:
        DatasetError: missing, empty, truncated or undecodable file, or one of neither 8 nor 16 bits a channel.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None
    return decode_unchanged(data, path, orientation=orientation)


def decode_unchanged(
    data: bytes, name: str | os.PathLike, *, orientation: Literal["displayed", "stored"] = "displayed"
) -> np.ndarray:
    """:func:`imread_unchanged` of a file's bytes; ``name`` is for messages."""
    if not data:
        raise DatasetError(f"{name}: empty file")
    if is_truncated(data):
        raise DatasetError(f"{name}: truncated photo, its last part is missing ({len(data)} bytes)")
    if data[:2] == b"\xff\xd8":
        flags = cv2.IMREAD_ANYCOLOR | (cv2.IMREAD_IGNORE_ORIENTATION if orientation == "stored" else 0)
    else:
        flags = cv2.IMREAD_UNCHANGED
    try:
        img = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        img = None
    if img is None:
        raise DatasetError(f"{name}: not a photo of 1 to 4 channels that OpenCV can decode (starts with {data[:8]!r})")
    if img.dtype not in (np.uint8, np.uint16):
        raise DatasetError(f"{name}: {img.dtype} pixels; save it with 8 or 16 bits a channel")
    return np.ascontiguousarray(img)


def is_truncated(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP file ends early. Decoders fill the missing part of some such files silently."""
    if data[:2] == b"\xff\xd8":
        # entropy-coded data holds neither marker, and a thumbnail's end marker precedes the main scan
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda") or b"\xff\xda" not in data
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" not in data[-64:]
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False


def count_pictures(path: str | os.PathLike) -> int:
    """Pages of a TIFF, frames of an animation, of which :func:`imread_unchanged` reads the first; else 1."""
    try:
        with Image.open(path) as image:  # a JPEG's others are previews
            return 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    except Exception:  # Pillow's readers raise of all kinds
        return 1


def is_hidden(path: str | PurePath) -> bool:
    """Whether a relative path, or a folder on it, has a name that begins with a dot, or is a Mac's __MACOSX."""
    return any(name.startswith(".") or name == "__MACOSX" for name in PurePath(path).parts)


def walk(root: str | os.PathLike) -> Iterator[tuple[Path, list[str]]]:
    """The folders at and below a path, each with the names of its files, without what :func:`is_hidden` below it.

    Links to folders are followed, those to one of the folders that they lie in are not. A link to nowhere is a file.
    """

    def goes_around(link: Path) -> bool:
        return link.is_symlink() and os.path.realpath(link) in map(os.path.realpath, link.absolute().parents)

    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name) and not goes_around(Path(folder, name))]
        yield Path(folder), [name for name in names if not is_hidden(name)]


def find_photos(path: str | os.PathLike, *, exclude: str | os.PathLike | None = None) -> list[tuple[Path, Path]]:
    """List the photos of a path: itself, or all in a folder and its subfolders, except those in ``exclude`` below it.

    What :func:`is_hidden` below the folder is left out, links to folders are followed, as by :func:`walk`.

    Returns:
        (file, path relative to the folder) of each photo, sorted.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        DatasetError: If the folder holds no photo, or is the one to exclude.
    """
    if not os.fspath(path):  # a variable of the shell that is not set; Path would make it the present folder
        raise FileNotFoundError("an empty name is no photo, folder or video")
    path = Path(path)
    if path.is_file():
        return [(path, Path(path.name))]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such photo, folder or video")
    excluded = Path(exclude).resolve() if exclude else None
    if excluded == path.resolve():
        raise DatasetError(f"{path}: the results would lie among the photos; choose another folder for them")
    if excluded in path.resolve().parents:
        excluded = None
    photos = [
        (file, file.relative_to(path))
        for file in sorted(Path(folder, name) for folder, names in walk(path) for name in names)
        if file.suffix.lower() in PHOTO_SUFFIXES and excluded not in Path(os.path.realpath(file)).parents
    ]
    if not photos:
        raise DatasetError(f"{path}: no photos in this folder (looked for {', '.join(PHOTO_SUFFIXES)})")
    return photos


def first_size(paths: Iterable[Path]) -> tuple[int, int] | None:
    """(H, W) of the first of these photos that can be read, None where none can."""
    for path in paths:
        with suppress(DatasetError):
            return imread_unchanged(path).shape[:2]
    return None


def read_all(dataset: Sequence[Item], unit: str = "photo") -> tuple[list[Item], list[str]]:
    """Read a data set, on all cores; returns what can be read, and a message for each item that cannot.

    Args:
        dataset: Its items raise DatasetError where they cannot be read.
        unit: What they are, for progress bar and messages.

    Raises:
        DatasetError: If none can be read.
    """

    def read(i: int) -> Item | DatasetError:
        try:
            return dataset[i]
        except DatasetError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(read, range(len(dataset))), f"reading {unit}s", len(dataset), unit=unit))
    skipped = [str(item) for item in found if isinstance(item, DatasetError)]
    if len(skipped) == len(found):
        raise DatasetError(f"none of {len(found)} {unit}s can be used; {skipped[0] if skipped else 'there is none'}")
    return [item for item in found if not isinstance(item, DatasetError)], skipped
