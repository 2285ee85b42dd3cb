"""JPEG compression: by OpenCV, and for batches on a GPU by torch code that follows it to about a grey level.

Baseline JPEG with Annex K's tables, scaled by quality as libjpeg does, colour in full-range YCbCr with 4:2:0 chroma.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops.constants import kept_tensors

# ITU-T T.81, tables K.1 and K.2
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# JFIF: R, G, B to Y, Cb, Cr around 0
_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def compress(picture: np.ndarray, quality: int) -> np.ndarray:
    """Compress and decompress by OpenCV: uint8 (H, W, 1) gray or (H, W, 3) RGB, quality 1..100."""
    gray = picture.shape[2] == 1
    ok, data = cv2.imencode(".jpg", picture if gray else picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise RuntimeError(f"OpenCV could not compress a picture of shape {picture.shape}")
    if gray:
        return cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)[..., None]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def compress_batch(x: Tensor, quality: Tensor) -> Tensor:
    """What :func:`compress` gives, for float (B, 1 or 3, H, W) in [0, 1] on any device; quality int (B,).

    It differs where libjpeg's integer transforms round another way: by less than a grey level in the mean.
    """
    h, w = x.shape[-2:]
    x = (x.float().clamp(0, 1) * 255).round()
    if x.shape[1] == 1:
        y = _quantise(_pad(x - 128, 8), _LUMA, quality) + 128
        return y.round().clamp(0, 255)[..., :h, :w] / 255
    ycbcr = _mix(x, _TO_YCBCR).round()
    luma = _quantise(_pad(ycbcr[:, :1] - 128, 8), _LUMA, quality) + 128
    chroma = F.avg_pool2d(_pad(ycbcr[:, 1:], 16), 2).round()
    chroma = _upsample(_quantise(chroma, _CHROMA, quality).round()[..., : math.ceil(h / 2), : math.ceil(w / 2)])
    decoded = torch.cat([luma[..., :h, :w].round(), chroma[..., :h, :w].round()], 1).clamp(-128, 255)
    return _mix(decoded, _TO_RGB).round().clamp(0, 255) / 255


def _quantise(x: Tensor, table: tuple, quality: Tensor) -> Tensor:
    """Quantise the DCT coefficients of 8 x 8 blocks; sides are multiples of 8."""
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality).view(-1, 1, 1, 1, 1, 1)
    table, dct = _constants(table, x.device)
    steps = ((table * scale + 50) / 100).floor().clamp(1, 255)
    b, c, h, w = x.shape
    blocks = x.view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    # sums instead of matrix products, which may be rounded to TF32
    coefficients = _transform(blocks, dct)
    coefficients = (coefficients / steps).round() * steps
    return _transform(coefficients, dct.T).transpose(3, 4).reshape(b, c, h, w)


def _transform(blocks: Tensor, matrix: Tensor) -> Tensor:
    """matrix @ block @ matrix.T of each block (..., 8, 8)."""
    rows = (matrix[:, :, None] * blocks[..., None, :, :]).sum(-2)
    return (rows[..., None, :] * matrix).sum(-1)


@lru_cache  # made once: a copy to the GPU waits for it
@kept_tensors()
def _constants(table: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """A quantisation table and the matrix of the orthonormal DCT."""
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return torch.tensor(table).float().to(device), matrix.float().to(device)


def _pad(x: Tensor, multiple: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


def _upsample(x: Tensor) -> Tensor:
    """Twice the size, 3/4 of the nearer and 1/4 of the farther sample in each dimension: libjpeg's fancy upsampling."""
    for dim in (-2, -1):
        n = x.shape[dim]
        nearer = torch.arange(2 * n, device=x.device) // 2
        farther = (nearer + torch.arange(2 * n, device=x.device) % 2 * 2 - 1).clamp(0, n - 1)
        x = 0.75 * x.index_select(dim, nearer) + 0.25 * x.index_select(dim, farther)
    return x


def _mix(x: Tensor, matrix: tuple) -> Tensor:
    rows = [sum(factor * x[:, i] for i, factor in enumerate(row)) for row in matrix]
    return torch.stack(rows, 1)
