"""Sampled pictures and clips as files: PNG, grids, GIF, MP4, and .npz for the usual evaluators.

Pictures are uint8 (N, H, W, C), clips (N, T, H, W, C), with C = 1 or 3 (RGB).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mambavision.engine.files import atomic_path
from mambavision.engine.video import write_video

RATE = 10.0  # frames a second


def to_uint8(x: Tensor) -> np.ndarray:
    """Channels last, of floats (N, C, H, W) or (N, C, T, H, W) in [0, 1]."""
    return (x * 255).round().clamp(0, 255).byte().movedim(1, -1).cpu().numpy()


def to_pil(x: Tensor) -> list:
    """Pillow images of floats (N, C, H, W) in [0, 1]; of (N, T, C, H, W) a list for each clip."""
    if x.ndim == 5:
        return [to_pil(clip) for clip in x]
    return [_pil(picture) for picture in to_uint8(x)]


def _pil(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def make_grid(samples: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay pictures (N, H, W, C) out in rows, the first ones on top: (H', W', C); clips as a clip (T, H', W', C).

    Args:
        samples: The pictures or clips.
        columns: How many side by side; by default about as many as rows.
        gap: White pixels between and around them. Both sides are made even, as video codecs want them.
    """
    count, (height, width, channels) = len(samples), samples.shape[-3:]
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tall, wide = rows * (height + gap) + gap, columns * (width + gap) + gap
    grid = np.full((*samples.shape[1:-3], tall + tall % 2, wide + wide % 2, channels), 255, np.uint8)
    for index, sample in enumerate(samples):
        top, left = (
            gap + place * (side + gap) for place, side in zip(divmod(index, columns), (height, width), strict=True)
        )
        grid[..., top : top + height, left : left + width, :] = sample
    return grid


def write_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Write a picture (H, W, C), whole or not at all."""
    with atomic_path(path) as temporary:
        _pil(picture).save(temporary)


def write_gif(path: str | os.PathLike, clip: np.ndarray, rate: float = RATE) -> None:
    """Write a clip (T, H, W, C) as a GIF that repeats, whole or not at all; GIF has 256 colours a frame.

    Args:
        path: The file.
        clip: The frames.
        rate: Frames a second; of GIF's hundredths of a second a frame takes a whole number, viewers show at most 50.
    """
    frames = [_pil(frame) for frame in clip]
    duration = 10 * max(2, round(100 / rate))  # Pillow writes equal frames as one of as many durations
    with atomic_path(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def write_mp4(path: str | os.PathLike, clip: np.ndarray, rate: float = RATE) -> None:
    """Write a clip (T, H, W, C) as MPEG-4, which blurs, whole or not at all; odd sides grow by one pixel."""
    clip = np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
    _, height, width, channels = clip.shape
    with write_video(path, height=height, width=width, rate=rate) as append:
        for frame in clip:
            append(np.ascontiguousarray(np.repeat(frame, 3 // channels, -1)[..., ::-1]))


def write_npz(path: str | os.PathLike, samples: np.ndarray, labels: Sequence[int | None]) -> None:
    """Write samples, RGB, as ``arr_0`` and their classes, if any, as ``arr_1``, whole or not at all.

    This is how guided-diffusion writes samples, and how its evaluator reads them.
    """
    arrays: dict[str, Any] = {"arr_0": np.repeat(samples, 3 // samples.shape[-1], -1)}
    if None not in labels:
        arrays["arr_1"] = np.asarray(labels, np.int64)
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)
