"""Small data drawn for tests."""

from pathlib import Path

import cv2
import numpy as np

from mambavision.diffusion.datasets import FrameSet, Item


class Drawn(FrameSet):
    """Gray items whose brightness is their number, of classes by turns; of videos, frame by frame brighter."""

    def __init__(
        self, num: int = 12, size=(8, 8), *, num_classes: int = 3, frames: int = 1, flip: bool = False
    ) -> None:
        self.num, self.size, self.channels, self.frames, self.flip = num, tuple(size), 1, frames, flip
        self.class_names = tuple(f"class {i}" for i in range(num_classes))

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Item:
        frames = np.full((self.frames, 1, *self.size[-2:]), i, np.uint8)
        frames[..., 0] = 200  # the left border: a mirrored item has it on the right
        frames[:, 0, 0, -1] = np.arange(self.frames)
        return Item(frames, i % max(len(self.class_names), 1))


def write_photo(path: Path, colour=(10, 120, 240), size=(12, 16)) -> Path:
    """Write a photo of one BGR colour; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), colour, np.uint8))
    return path
