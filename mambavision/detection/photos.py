"""Photos as a detector takes them: eight bits, three channels, no larger than need be."""

from __future__ import annotations

import os
from typing import Literal

import cv2
import numpy as np

from mambavision.engine.photos import imread_unchanged

PAD_VALUE = 114


def imread(path: str | os.PathLike, *, orientation: Literal["displayed", "stored"] = "displayed") -> np.ndarray:
    """Read a photo as BGR.

    Gray becomes three equal channels, 16 bits keep their upper 8, transparency is laid over gray 114. A JPEG's EXIF
    orientation is applied ("displayed", what a viewer shows) or ignored ("stored").

    Returns:
        uint8 (H, W, 3), contiguous.

    Raises:
        DatasetError: missing, empty, truncated or undecodable file.
    """
    img = imread_unchanged(path, orientation=orientation)
    if img.dtype == np.uint16:
        img = (img >> 8).astype(np.uint8)
    if img.ndim == 2:
        return cv2.cvtColor(img, cv2.COLOR_GRAY2BGR)
    if img.shape[2] == 4:
        alpha = img[..., 3:].astype(np.uint16)
        img = ((img[..., :3] * alpha + PAD_VALUE * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(img)


def shrink(img: np.ndarray, max_side: int) -> tuple[np.ndarray, float]:
    """Scale a photo down, by area averaging, so that its longer side is max_side. Returns (photo, factor <= 1)."""
    h, w = img.shape[:2]
    factor = max_side / max(h, w)
    if factor >= 1:
        return img, 1.0
    size = max(round(w * factor), 1), max(round(h * factor), 1)
    return cv2.resize(img, size, interpolation=cv2.INTER_AREA), factor
