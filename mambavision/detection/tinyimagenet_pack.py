"""Tiny-ImageNet-200 as a few large files: arrays to train from, and lossless shards to carry.

A pack folder holds, for split in train, val: {split}_photos.npy uint8 (N, 64, 64, 3) BGR, {split}_boxes.npy int16
(N, 4) xyxy with exclusive right and bottom edges, {split}_labels.npy uint8 (N,), and names.json, 200 class names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from mambavision.engine.photos import DatasetError

SIDE = 64
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


class Entry(NamedTuple):
    """One photo of the distributed folder: its file, box (x1, y1, x2, y2) with exclusive edges, and class index."""

    path: Path
    box: tuple[int, int, int, int]
    label: int


def pack(root: str | os.PathLike, out: str | os.PathLike) -> None:
    """Decode the distributed folder tiny-imagenet-200 (train, val, wnids.txt, words.txt) into a pack folder.

    Raises:
        DatasetError: a file of the set is missing or cannot be decoded.
    """
    for split in SPLITS:
        entries = list(read_entries(root, split))
        photos = np.stack([_decode(entry.path.read_bytes(), entry.path) for entry in entries])
        _write(out, split, photos, np.array([e.box for e in entries]), np.array([e.label for e in entries]))
    _write_names(out, class_names(root))


def read_entries(root: str | os.PathLike, split: Split) -> Iterator[Entry]:
    """The photos of one split with box and label, classes in the order of wnids.txt sorted."""
    root = Path(root)
    label_of = {wnid: label for label, wnid in enumerate(_wnids(root))}
    if split == "val":
        for line in _lines(root / "val" / "val_annotations.txt"):
            name, wnid, *box = line.split()
            yield Entry(root / "val" / "images" / name, _exclusive(box), label_of[wnid])
    else:
        for wnid, label in label_of.items():
            for line in _lines(root / "train" / wnid / f"{wnid}_boxes.txt"):
                name, *box = line.split()
                yield Entry(root / "train" / wnid / "images" / name, _exclusive(box), label)


def class_names(root: str | os.PathLike) -> tuple[str, ...]:
    """A readable name per class: the first synonym in words.txt, with the next one added where two classes share it."""
    words = dict(line.split("\t", 1) for line in _lines(Path(root) / "words.txt"))
    synonyms = [[word.strip() for word in words[wnid].split(",")] for wnid in _wnids(Path(root))]
    first = [names[0] for names in synonyms]
    return tuple(", ".join(names[:2]) if first.count(names[0]) > 1 else names[0] for names in synonyms)


def shard(root: str | os.PathLike, out: str | os.PathLike, *, max_bytes: int = 45 * 2**20) -> list[Path]:
    """Write the photos' JPEG bytes into shards {split}_{i}.bin of at most `max_bytes`, and {split}_index.npz.

    Nothing is re-encoded. What precedes the entropy-coded data is the same in nearly all these files, so each
    distinct header is kept once, in the index, which saves a third. Returns the files written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for split in SPLITS:
        entries = list(read_entries(root, split))
        headers: dict[bytes, int] = {}
        header_ids, sizes, shard_ids = [], [], []
        chunks: list[bytes] = []
        filled = number = 0
        for entry in entries:
            header, body = _split_jpeg(entry.path.read_bytes(), entry.path)
            if filled + len(body) > max_bytes:
                written.append(_write_shard(out, split, number, chunks))
                chunks, filled, number = [], 0, number + 1
            chunks.append(body)
            filled += len(body)
            header_ids.append(headers.setdefault(header, len(headers)))
            sizes.append(len(body))
            shard_ids.append(number)
        written.append(_write_shard(out, split, number, chunks))
        index = out / f"{split}_index.npz"
        np.savez_compressed(
            index,
            headers=np.frombuffer(b"".join(headers), np.uint8),
            header_sizes=np.array([len(header) for header in headers], np.int32),
            header_ids=np.array(header_ids, np.uint16),
            sizes=np.array(sizes, np.int32),
            shard_ids=np.array(shard_ids, np.uint8),
            boxes=np.array([e.box for e in entries], np.int16),
            labels=np.array([e.label for e in entries], np.uint8),
        )
        written.append(index)
    written.append(_write_names(out, class_names(root)))
    return written


def unpack(shards: str | os.PathLike, out: str | os.PathLike, *, workers: int | None = None) -> None:
    """Decode shards made by `shard` into a pack folder, in `workers` processes (all cores by default)."""
    shards = Path(shards)
    for split in SPLITS:
        with np.load(shards / f"{split}_index.npz") as file:
            index = dict(file)
        bounds = np.cumsum(index["header_sizes"])[:-1]
        headers = [part.tobytes() for part in np.split(index["headers"], bounds)]
        jobs = []
        for number in np.unique(index["shard_ids"]):
            mine = np.flatnonzero(index["shard_ids"] == number)
            starts = np.cumsum(index["sizes"][mine]) - index["sizes"][mine]
            for part in np.array_split(np.arange(len(mine)), max(len(mine) // 2000, 1)):
                rows = mine[part]
                where = list(zip(starts[part], index["sizes"][rows], index["header_ids"][rows], strict=True))
                jobs.append((shards / f"{split}_{number}.bin", where, headers))
        with ProcessPoolExecutor(workers) as pool:
            photos = np.concatenate(list(pool.map(_decode_part, jobs)))
        _write(out, split, photos, index["boxes"], index["labels"])
    _write_names(out, json.loads((shards / "names.json").read_text()))


def _decode_part(job: tuple[Path, list[tuple[int, int, int]], list[bytes]]) -> np.ndarray:
    path, where, headers = job
    with open(path, "rb") as file:
        file.seek(where[0][0])
        data = file.read(where[-1][0] + where[-1][1] - where[0][0])
    base = where[0][0]
    return np.stack(
        [_decode(headers[header] + data[start - base : start - base + size], path) for start, size, header in where]
    )


def _decode(data: bytes, path: Path) -> np.ndarray:
    img = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if img is None or img.shape != (SIDE, SIDE, 3):
        raise DatasetError(f"{path}: not a {SIDE}x{SIDE} photo")
    return img


def _split_jpeg(data: bytes, path: Path) -> tuple[bytes, bytes]:
    """(everything up to the end of the scan header, the scan's data and what follows)."""
    start = data.rfind(b"\xff\xda")
    if start < 0:
        raise DatasetError(f"{path}: not a JPEG")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:end], data[end:]


def _exclusive(box: list[str]) -> tuple[int, int, int, int]:
    # the files give inclusive corners, 0..63 (some of them unordered by a pixel)
    x1, y1, x2, y2 = map(int, box)
    return min(x1, x2), min(y1, y2), min(max(x1, x2) + 1, SIDE), min(max(y1, y2) + 1, SIDE)


def _wnids(root: Path) -> list[str]:
    return sorted(_lines(root / "wnids.txt"))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; expected the folder tiny-imagenet-200") from None


def _write(out: str | os.PathLike, split: str, photos: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> None:
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / f"{split}_photos.npy", photos)
    np.save(out / f"{split}_boxes.npy", boxes.astype(np.int16))
    np.save(out / f"{split}_labels.npy", labels.astype(np.uint8))


def _write_shard(out: Path, split: str, number: int, chunks: list[bytes]) -> Path:
    path = out / f"{split}_{number}.bin"
    path.write_bytes(b"".join(chunks))
    return path


def _write_names(out: str | os.PathLike, names: tuple[str, ...] | list[str]) -> Path:
    path = Path(out) / "names.json"
    path.write_text(json.dumps(list(names)))
    return path
