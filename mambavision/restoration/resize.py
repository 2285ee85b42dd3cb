"""Resampling of pictures along their rows and columns, and MATLAB's bicubic resize made of it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mambavision.ops.constants import kept_tensors


def imresize(x: Tensor, *, scale: float | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Resize as MATLAB's `imresize(x, scale)` or `imresize(x, size)`: bicubic, antialiased when it shrinks.

    Output pixel i stands at u = (i + 1/2) / s - 1/2 of the input and is the sum of input pixels j weighted by
    k(u - j), normalised to sum 1, with Keys' cubic k of a = -1/2, and s k(s t) in place of k(t) for s < 1. Beyond its
    border the picture is mirrored, the border pixel included. A float result is neither rounded nor clipped; of uint8,
    as in MATLAB, columns are resized first and rounded to uint8 before the rows are.

    Args:
        x: Float or uint8 (..., H, W).
        scale: Factor s; the output has ceil(s H) x ceil(s W) pixels.
        size: Output (H', W') instead; the factors are then H' / H and W' / W.

    Raises:
        ValueError: If not exactly one of scale and size is given, or it asks for less than one pixel.
    """
    if (scale is None) == (size is None):
        raise ValueError(f"imresize takes either scale or size, got scale={scale}, size={size}")
    if size is None:
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        scales = (scale, scale)
        size = (math.ceil(scale * x.shape[-2] - 1e-9), math.ceil(scale * x.shape[-1] - 1e-9))
    elif min(size) < 1:
        raise ValueError(f"the output must have at least one pixel, size={size}")
    else:
        scales = (size[0] / x.shape[-2], size[1] / x.shape[-1])
    for dim in (-2, -1):
        resized = resample(x, dim, *_bicubic(x.shape[dim], size[dim], scales[dim], x.device))
        x = (resized + 0.5).floor().clamp(0, 255).byte() if x.dtype is torch.uint8 else resized
    return x


def resample(x: Tensor, dim: int, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums along one dimension: y_i = sum_p weights[i, p] x[index[i, p]], in full precision.

    Args:
        x: Float of any shape, or uint8, which is summed in float32.
        dim: Negative dimension that is summed along.
        index: int64 (length of the output, P), on x's device.
        weights: Float, the same shape.
    """
    weights = weights.to(x.dtype if x.is_floating_point() else torch.float32)
    shape = list(x.shape)
    shape[dim] = len(index)
    column = (-1, *(1,) * (-dim - 1))
    y = weights.new_zeros(shape)
    # one tap after another: P copies of x at once may not fit, and a matrix product may be rounded to TF32
    for tap in range(index.shape[1]):
        y.addcmul_(x.index_select(dim, index[:, tap]), weights[:, tap].view(column))
    return y


def mirror(index: Tensor, length: int | Tensor, border: Literal["symmetric", "reflect"]) -> Tensor:
    """Indices into a signal continued by its mirror image, mapped into 0 .. length - 1.

    "symmetric" repeats the border value (c b a | a b c), "reflect" does not (c b | a b c).
    """
    if border == "symmetric":
        index = index % (2 * length)
        return torch.minimum(index, 2 * length - 1 - index)
    period = 2 * length - 2
    index = index % (period + (period == 0))
    return torch.minimum(index, period - index)


@lru_cache(64)  # made once: a copy to the GPU waits for it
@kept_tensors()
def _bicubic(length: int, out: int, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    shrink = min(scale, 1.0)
    taps = math.ceil(4 / shrink) + 2
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) / scale - 0.5
    index = (centre - 2 / shrink).floor().long()[:, None] + torch.arange(taps)
    weights = _cubic(shrink * (centre[:, None] - index))
    used = (weights != 0).any(0)
    index, weights = index[:, used], weights[:, used]
    index, weights = mirror(index, length, "symmetric"), weights / weights.sum(1, keepdim=True)
    return index.to(device), weights.to(device)


def _cubic(t: Tensor) -> Tensor:
    t = t.abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t <= 2, far, 0.0))
