"""Videos that are drawn, not downloaded: digits and shapes that fly straight on and bounce off the borders.

A clip is a function of (seed, index): its first frames are the same however many are drawn. OpenCV 4 and 5 draw other
digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from mmengine.registry import DATASETS

from mambavision.diffusion.datasets import FrameSet, Item

FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)
THICKNESSES = (6, 9, 12)  # of 64 pixels
SHAPES = ("disc", "square", "triangle")
DRAWN = 64  # sides of a picture of a digit or shape before it is made small


class _Bouncing(FrameSet):
    """Clips of objects that bounce in a frame.

    Args:
        num: Clips.
        size: (T, H, W) frames and pixels.
        objects: In a clip.
        speed: Lowest and highest, pixels a frame.
        seed: Of the clips: those of another seed are others.

    Raises:
        ValueError: If a number is not positive, or frames are smaller than 16 pixels.
    """

    def __init__(
        self, num: int, size: Sequence[int], *, objects: int = 2, speed: tuple[float, float], seed: int = 0
    ) -> None:
        if len(size) != 3 or min(num, objects, *size) < 1 or min(size[1:]) < 16:
            raise ValueError(
                f"num, objects and size (frames, height, width) must be positive, and frames of 16x16 pixels at least; "
                f"got {num}, {objects} and {tuple(size)}"
            )
        if not 0 <= speed[0] <= speed[1]:
            raise ValueError(f"speed must be the lowest and the highest, pixels a frame, got {tuple(speed)}")
        self.num, self.size, self.objects, self.speed, self.seed = num, tuple(size), objects, tuple(speed), seed

    def __len__(self) -> int:
        return self.num

    def _numbers(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.num:
            raise IndexError(index)
        return np.random.default_rng([self.seed, index])

    def _flight(self, picture: np.ndarray, side: float, numbers: np.random.Generator) -> np.ndarray:
        """float32 (T, H, W) in 0..1: a picture (64, 64), made ``side`` pixels large, on a path that is drawn."""
        frames, height, width = self.size
        angle, speed = numbers.random() * 2 * np.pi, numbers.uniform(*self.speed)
        spans = np.array([width - side, height - side])
        begin = numbers.random(2) * spans
        path = begin + np.arange(frames)[:, None] * speed * np.array([np.cos(angle), np.sin(angle)])
        path = spans - abs(path % (2 * spans) - spans)  # bounces at 0 and at the span
        scale = side / DRAWN
        smooth = cv2.GaussianBlur(picture.astype(np.float32) / 255, (0, 0), 0.35 / scale)  # so that no pixel is missed
        moves = [np.array([[scale, 0, x + (scale - 1) / 2], [0, scale, y + (scale - 1) / 2]]) for x, y in path]
        return np.stack([cv2.warpAffine(smooth, move, (width, height), flags=cv2.INTER_LINEAR) for move in moves])


@DATASETS.register_module()
class MovingDigits(_Bouncing):
    """Gray clips of digits that bounce, as of Moving MNIST, from OpenCV's fonts; without classes.

    Source of the kind: Srivastava et al., "Unsupervised learning of video representations using LSTMs", arXiv
    1502.04681. Digits are of six fonts and three thicknesses, turned and slanted a little.

    Arguments and errors are those of :class:`_Bouncing`.
    """

    channels = 1

    def __init__(
        self,
        num: int,
        size: Sequence[int],
        *,
        objects: int = 2,
        speed: tuple[float, float] = (0.5, 2.0),
        seed: int = 0,
    ) -> None:
        super().__init__(num, size, objects=objects, speed=speed, seed=seed)

    def __getitem__(self, index: int) -> Item:
        numbers = self._numbers(index)
        clip = np.zeros(self.size, np.float32)
        for _ in range(self.objects):
            digit = _digit(*(int(numbers.integers(n)) for n in (10, len(FONTS), len(THICKNESSES))))
            turn, slant = numbers.uniform(-0.15, 0.15), numbers.uniform(-0.2, 0.2)
            digit = _turned(digit, turn, slant)
            side = 0.5 * min(self.size[1:])
            np.maximum(clip, self._flight(digit, side, numbers), out=clip)
        return Item((clip[:, None] * 255 + 0.5).astype(np.uint8), 0)


@DATASETS.register_module()
class BouncingShapes(_Bouncing):
    """RGB clips of coloured discs, squares or triangles that bounce; all those of a clip are of one class.

    Arguments and errors are those of :class:`_Bouncing`.
    """

    channels = 3
    class_names = SHAPES

    def __init__(
        self,
        num: int,
        size: Sequence[int],
        *,
        objects: int = 2,
        speed: tuple[float, float] = (0.5, 2.0),
        seed: int = 0,
    ) -> None:
        super().__init__(num, size, objects=objects, speed=speed, seed=seed)

    def __getitem__(self, index: int) -> Item:
        numbers = self._numbers(index)
        label = int(numbers.integers(len(SHAPES)))
        clip = np.zeros((self.size[0], 3, *self.size[1:]), np.float32)
        for _ in range(self.objects):
            colour = _colour(numbers.random())
            side = numbers.uniform(0.25, 0.45) * min(self.size[1:])
            shape = _turned(_shape(label), numbers.uniform(-0.5, 0.5), 0.0)
            cover = self._flight(shape, side, numbers)[:, None]
            clip = clip * (1 - cover) + colour * cover  # later objects lie above earlier ones
        return Item((clip * 255 + 0.5).astype(np.uint8), label)


@lru_cache
def _digit(digit: int, font: int, thickness: int) -> np.ndarray:
    """uint8 (64, 64), white on black."""
    picture = np.zeros((DRAWN, DRAWN), np.uint8)
    width = THICKNESSES[thickness]
    (w, h), _ = cv2.getTextSize(str(digit), FONTS[font], 1, 1)
    scale = (0.8 * DRAWN - width) / max(w, h)
    (w, h), _ = cv2.getTextSize(str(digit), FONTS[font], scale, width)
    corner = (DRAWN - w) // 2, (DRAWN + h) // 2  # of the text, at the left and below
    cv2.putText(picture, str(digit), corner, FONTS[font], scale, 255, width, cv2.LINE_AA)
    return picture


@lru_cache
def _shape(label: int) -> np.ndarray:
    """uint8 (64, 64), white on black."""
    picture, middle, radius = np.zeros((DRAWN, DRAWN), np.uint8), DRAWN // 2, int(0.42 * DRAWN)
    if SHAPES[label] == "disc":
        cv2.circle(picture, (middle, middle), radius, 255, -1, cv2.LINE_AA)
        return picture
    corners = {"square": 4, "triangle": 3}[SHAPES[label]]
    angles = (np.arange(corners) + 0.5) * 2 * np.pi / corners + np.pi / 2
    points = middle + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    cv2.fillPoly(picture, [points.round().astype(np.int32)], 255, cv2.LINE_AA)
    return picture


def _turned(picture: np.ndarray, turn: float, slant: float) -> np.ndarray:
    """A picture turned about its middle by radians, and slanted."""
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, slant], [0, 1]])
    middle = (DRAWN - 1) / 2
    shift = middle - matrix @ np.full(2, middle)
    return cv2.warpAffine(picture, np.column_stack([matrix, shift]), (DRAWN, DRAWN), flags=cv2.INTER_LINEAR)


def _colour(hue: float) -> np.ndarray:
    """RGB (3, 1, 1) in 0..1 of a hue in 0..1, bright."""
    rgb = np.clip(abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (0.25 + 0.75 * rgb).astype(np.float32)[:, None, None]
