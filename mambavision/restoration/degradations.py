"""What makes a low-quality picture `lq` of a clean one `gt`: one small class each, for whole batches on any device.

A degradation is called with gt, float (B, C, H, W) in [0, 1], and a generator on gt's device; it returns
dict(lq=...), with sigma=(B,), the noise level in [0, 1] units, where there is one. For one device and generator seed
the result is always the same. `for_evaluation(gt)` degrades by the field's convention, the same on every machine.

`scale` says how many times smaller lq is. lq's inner part depends on gt up to `margin` pixels outside it, and beyond
the border of the picture gt counts as continued by mirroring of kind `border`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from torch import Tensor

from mambavision.ops.constants import kept_tensors
from mambavision.restoration.jpeg import compress, compress_batch
from mambavision.restoration.resize import imresize, mirror, resample


class Degradation(ABC):
    """From clean to degraded pictures."""

    scale: int = 1
    border: Literal["symmetric", "reflect"] = "reflect"

    @property
    def margin(self) -> int:
        """Pixels of gt around a crop that its lq depends on, a multiple of the scale."""
        return 0

    @abstractmethod
    def __call__(self, gt: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Degrade a batch; gt float (B, C, H, W) in [0, 1]."""

    def for_evaluation(self, gt: Tensor) -> dict[str, Tensor]:
        """Degrade one picture, float (1, C, H, W) on the CPU, the same way at every call.

        Raises:
            ValueError: If the degradation is drawn from a range.
        """
        return self(gt, torch.Generator().manual_seed(0))


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class GaussianNoise(Degradation):
    """lq = gt + n, n ~ N(0, sigma^2); a share of the pictures then clipped and rounded to 8 bits, as a file holds them.

    Args:
        sigma: (lowest, highest) standard deviation, of which each picture draws one, for pixel values 0..255.
        eight_bit: Share of the pictures that become 8-bit, 0 to 1. The field's protocol has none.
        shared: (lowest, highest) share of sigma^2, of which each picture draws one, that is the same noise in all
            channels, 0 to 1: cameras' noise is in part. The field's protocol has none.
        sharing: Share of the pictures that ``shared`` is of, 0 to 1; all, in evaluation.
    """

    sigma: tuple[float, float]
    eight_bit: float = 0.0
    shared: tuple[float, float] = (0.0, 0.0)
    sharing: float = 1.0

    def __post_init__(self) -> None:
        _check_range("sigma", self.sigma, 0, 255)
        for name in ("eight_bit", "sharing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share of 0 to 1, got {getattr(self, name)}")
        _check_range("shared", self.shared, 0, 1)

    def __call__(self, gt: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        sigma = _uniform(self.sigma, len(gt), generator) / 255
        noise = torch.randn(gt.shape, generator=generator, device=gt.device)
        if self.shared[1]:
            share = _uniform(self.shared, len(gt), generator)
            if self.sharing < 1:
                share = share * _drawn(self.sharing, len(gt), generator)
            share = share.view(-1, 1, 1, 1)
            common = torch.randn(gt[:, :1].shape, generator=generator, device=gt.device)
            noise = (1 - share).sqrt() * noise + share.sqrt() * common
        lq = gt + sigma.view(-1, 1, 1, 1) * noise
        if self.eight_bit:
            drawn = _drawn(self.eight_bit, len(gt), generator)
            lq = torch.where(drawn.view(-1, 1, 1, 1), _eight_bit(lq), lq)
        return dict(lq=lq, sigma=sigma)

    def for_evaluation(self, gt: Tensor) -> dict[str, Tensor]:
        """Add np.random.seed(0)'s noise, drawn as (H, W, C), as SwinIR and Restormer do; shared noise is of seed 1."""
        sigma, share = _fixed("sigma", self.sigma) / 255, _fixed("shared", self.shared)
        lq = gt + _standard_noise(gt, sigma * math.sqrt(1 - share))
        if share:
            lq = lq + _standard_noise(gt[:, :1], sigma * math.sqrt(share), seed=1)
        if self.eight_bit not in (0, 1):
            raise ValueError(f"for evaluation all pictures are 8-bit (eight_bit=1) or none (0), got {self.eight_bit}")
        return dict(lq=_eight_bit(lq) if self.eight_bit else lq, sigma=torch.full((1,), sigma))


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class GaussianBlur(Degradation):
    """lq = k * gt + n: a Gaussian k of sum 1, gt continued by reflection, n ~ N(0, noise^2); not clipped, not rounded.

    The standard setting of inverse problems, as in flash-diffusion and dirac-diffusion: 61 taps, cut off at 6 sigma.

    Args:
        taps: Length of the kernel, odd.
        sigma: Standard deviation of the kernel in pixels.
        noise: Standard deviation of the noise, for pixel values in [0, 1].
    """

    taps: int = 61
    sigma: float = 3.0
    noise: float = 0.05

    def __post_init__(self) -> None:
        if self.taps % 2 != 1 or self.sigma <= 0 or self.noise < 0:
            raise ValueError(f"taps must be odd, sigma positive and noise not negative: {self}")

    @property
    def margin(self) -> int:
        return min(self.taps // 2, int(6 * self.sigma + 0.5))

    def kernel(self) -> Tensor:
        """One dimension of the separable kernel, float64 (2 margin + 1,); sums to 1."""
        t = torch.arange(-self.margin, self.margin + 1, dtype=torch.float64)
        weights = torch.exp(-0.5 * (t / self.sigma) ** 2)
        return weights / weights.sum()

    def blur(self, x: Tensor) -> Tensor:
        """k * x, without noise, for float (..., H, W)."""
        for dim in (-2, -1):
            x = resample(x, dim, *_convolution(self, x.shape[dim], x.device))
        return x

    def __call__(self, gt: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(gt.shape, generator=generator, device=gt.device)
        return dict(lq=self.blur(gt) + self.noise * noise)

    def for_evaluation(self, gt: Tensor) -> dict[str, Tensor]:
        """Blur, and add np.random.seed(0)'s noise, drawn as (H, W, C)."""
        return dict(lq=self.blur(gt) + _standard_noise(gt, self.noise))


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class Downsample(Degradation):
    """lq = MATLAB's bicubic imresize(gt, 1 / scale) of 8-bit pixels, to 8-bit pixels, as in the super-resolution sets.

    Sides that are no multiple of the scale are cropped before.
    """

    scale: int
    border = "symmetric"

    def __post_init__(self) -> None:
        if self.scale < 2:
            raise ValueError(f"scale must be at least 2, got {self.scale}")

    @property
    def margin(self) -> int:
        return 2 * self.scale

    def __call__(self, gt: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        h, w = (side // self.scale * self.scale for side in gt.shape[-2:])
        if not h or not w:
            raise ValueError(f"a picture of {tuple(gt.shape[-2:])} pixels cannot be made {self.scale} times smaller")
        return dict(lq=imresize(_to_bytes(gt[..., :h, :w]), scale=1 / self.scale).to(gt.dtype) / 255)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class JPEG(Degradation):
    """lq = gt compressed and decompressed: by OpenCV on the CPU, by batched torch code that follows it elsewhere.

    Args:
        quality: (lowest, highest) quality in 1..100, of which each picture draws one.
    """

    quality: tuple[int, int]

    def __post_init__(self) -> None:
        _check_range("quality", self.quality, 1, 100)

    def __call__(self, gt: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        lowest, highest = self.quality
        quality = torch.randint(lowest, highest + 1, (len(gt),), generator=generator, device=gt.device)
        if gt.device.type != "cpu":
            return dict(lq=compress_batch(gt, quality))
        pictures = _to_bytes(gt).permute(0, 2, 3, 1).numpy()
        lq = np.stack([compress(picture, int(q)) for picture, q in zip(pictures, quality, strict=True)])
        return dict(lq=torch.from_numpy(lq).permute(0, 3, 1, 2).to(gt.dtype) / 255)

    def for_evaluation(self, gt: Tensor) -> dict[str, Tensor]:
        _fixed("quality", self.quality)
        return super().for_evaluation(gt)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class InpaintingMask(Degradation):
    """lq = gt, 0 (black) under random straight strokes with round ends.

    Args:
        strokes: (fewest, most) strokes of a picture.
        width: (narrowest, widest) stroke in pixels.
    """

    strokes: tuple[int, int] = (4, 12)
    width: tuple[float, float] = (2.0, 12.0)

    def __post_init__(self) -> None:
        _check_range("strokes", self.strokes, 1, 1000)
        _check_range("width", self.width, 0, math.inf)

    def mask(self, gt: Tensor, generator: torch.Generator) -> Tensor:
        """Where strokes are: bool (B, 1, H, W)."""
        b, _, h, w = gt.shape
        fewest, most = self.strokes
        count = torch.randint(fewest, most + 1, (b, 1), generator=generator, device=gt.device)
        radius = _uniform(self.width, b * most, generator).view(b, most) / 2
        ends = torch.rand(2, b, most, 2, generator=generator, device=gt.device)
        ends = torch.stack([ends[0] * h, ends[1] * w], -1)  # (b, most, start and end, row and column)
        pixel = torch.stack(
            torch.meshgrid(torch.arange(h, device=gt.device), torch.arange(w, device=gt.device), indexing="ij"), -1
        )
        masked = torch.zeros(b, h, w, dtype=torch.bool, device=gt.device)
        for i in range(most):
            start, end = ends[:, i, 0].view(b, 1, 1, 2), ends[:, i, 1].view(b, 1, 1, 2)
            along = end - start
            position = ((pixel - start) * along).sum(-1) / (along * along).sum(-1).clamp(min=1e-6)
            distance = (pixel - start - position.clamp(0, 1)[..., None] * along).norm(dim=-1)
            masked |= (distance <= radius[:, i].view(b, 1, 1)) & (i < count).view(b, 1, 1)
        return masked[:, None]

    def __call__(self, gt: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return dict(lq=gt.masked_fill(self.mask(gt, generator), 0))


@lru_cache(64)  # made once: a copy to the GPU waits for it
@kept_tensors()
def _convolution(blur: GaussianBlur, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    window = torch.arange(length)[:, None] + torch.arange(-blur.margin, blur.margin + 1)
    return mirror(window, length, "reflect").to(device), blur.kernel().expand(length, -1).to(device)


def _check_range(name: str, bounds: tuple[float, float], lowest: float, highest: float) -> None:
    if len(bounds) != 2 or not lowest <= bounds[0] <= bounds[1] <= highest:
        raise ValueError(f"{name} must be (low, high) with {lowest} <= low <= high <= {highest}, got {bounds}")


def _eight_bit(x: Tensor) -> Tensor:
    """The nearest values an 8-bit file can hold."""
    return x.clamp(0, 1).mul(255).round() / 255


def _fixed(name: str, bounds: tuple[float, float]) -> float:
    if bounds[0] != bounds[1]:
        raise ValueError(f"{name} is drawn from {bounds}; evaluation needs one value, as in ({bounds[0]}, {bounds[0]})")
    return bounds[0]


def _drawn(share: float, count: int, generator: torch.Generator) -> Tensor:
    """True for a share of `count` pictures."""
    return torch.rand(count, generator=generator, device=generator.device) < share


def _uniform(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def _standard_noise(gt: Tensor, sigma: float, seed: int = 0) -> Tensor:
    _, c, h, w = gt.shape
    noise = np.random.RandomState(seed).normal(0, sigma, (h, w, c)).astype(np.float32)
    return torch.from_numpy(noise).permute(2, 0, 1)[None]


def _to_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().byte()
