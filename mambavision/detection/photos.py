"""Reading photos as people have them: one function for training and inference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

PAD_VALUE = 114
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class DatasetError(ValueError):
    """Input data that cannot be used; the message is one line that names the file and what is wrong with it."""


def imread(path: str | os.PathLike, *, orientation: Literal["displayed", "stored"] = "displayed") -> np.ndarray:
    """Read a photo as BGR.

    Gray becomes three equal channels, 16 bits keep their upper 8, transparency is laid over gray 114. A JPEG's EXIF
    orientation is applied ("displayed", what a viewer shows) or ignored ("stored").

    Returns:
        uint8 (H, W, 3), contiguous.

    Raises:
        DatasetError: missing, empty, truncated or undecodable file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None
    if not data:
        raise DatasetError(f"{path}: empty file")
    if is_truncated(data):
        raise DatasetError(f"{path}: truncated photo, its last part is missing ({len(data)} bytes)")
    if data[:2] == b"\xff\xd8":
        flags = cv2.IMREAD_COLOR | (cv2.IMREAD_IGNORE_ORIENTATION if orientation == "stored" else 0)
    else:
        flags = cv2.IMREAD_UNCHANGED
    try:
        img = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        img = None
    if img is None:
        raise DatasetError(f"{path}: not a photo that OpenCV can decode (starts with {data[:8]!r})")
    if img.dtype == np.uint16:
        img = (img >> 8).astype(np.uint8)
    if img.dtype != np.uint8:
        raise DatasetError(f"{path}: {img.dtype} pixels; save it with 8 or 16 bits a channel")
    if img.ndim == 2:
        return cv2.cvtColor(img, cv2.COLOR_GRAY2BGR)
    if img.shape[2] == 4:
        alpha = img[..., 3:].astype(np.uint16)
        img = ((img[..., :3] * alpha + PAD_VALUE * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(img)


def is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG file ends before its end marker. Decoders fill the missing part of such files silently."""
    if data[:2] == b"\xff\xd8":
        # entropy-coded data holds neither marker, and a thumbnail's end marker precedes the main scan
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda") or b"\xff\xda" not in data
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"IEND" not in data[-64:]
    return False


def shrink(img: np.ndarray, max_side: int) -> tuple[np.ndarray, float]:
    """Scale a photo down, by area averaging, so that its longer side is max_side. Returns (photo, factor <= 1)."""
    h, w = img.shape[:2]
    factor = max_side / max(h, w)
    if factor >= 1:
        return img, 1.0
    size = max(round(w * factor), 1), max(round(h * factor), 1)
    return cv2.resize(img, size, interpolation=cv2.INTER_AREA), factor
