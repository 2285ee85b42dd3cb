"""What a diffusion transformer embeds: noise levels, classes, positions and patches. B batch, L tokens, D channels."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int] | tuple[int, int, int]
"""(H, W) or (T, H, W)."""


class TimestepEmbedding(nn.Module):
    """Embed the noise level t (B,), on the scale 0..1000: cosines and sines of t, then Linear, SiLU, Linear; (B, D).

    Frequencies fall geometrically from 1 to 1 / max_period, as in Ho et al., "Denoising Diffusion Probabilistic
    Models", arXiv 2006.11239; the two layers are those of Peebles and Xie's DiT, arXiv 2212.09748.

    Args:
        d_model: D.
        frequencies: how many cosines, and how many sines.
        max_period: largest period over 2 pi.
    """

    def __init__(self, d_model: int, frequencies: int = 128, max_period: float = 10_000) -> None:
        super().__init__()
        self.frequencies, self.max_period = frequencies, max_period
        self.fc1 = nn.Linear(2 * frequencies, d_model)
        self.fc2 = nn.Linear(d_model, d_model)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, D), in the parameters' dtype or autocast's; angles are float32 (t up to 1000 needs it)."""
        steps = torch.arange(self.frequencies, dtype=torch.float32, device=t.device) / self.frequencies
        angles = t.float()[:, None] * torch.exp(-math.log(self.max_period) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.fc2(F.silu(self.fc1(waves.to(self.fc1.weight.dtype))))


class LabelEmbedding(nn.Embedding):
    """Embed labels 0..num_classes, of which num_classes is the null class that guidance subtracts.

    Args:
        num_classes: number of classes without the null class.
        d_model: D.
    """

    def __init__(self, num_classes: int, d_model: int) -> None:
        super().__init__(num_classes + 1, d_model)
        self.num_classes = num_classes
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, labels: Tensor | None, batch: int) -> Tensor:
        """labels (B,) int64 to (B, D); None is the null class for all."""
        if labels is None:
            return self.weight[self.num_classes].expand(batch, -1)
        return super().forward(labels)


def sincos_positions(d_model: int, grid: Sequence[int]) -> Tensor:
    """Fixed positions of a grid's tokens, row-major: a (L, D) float32 tensor of sines and cosines of each coordinate.

    Every axis of the grid, (H, W) or (T, H, W), has a block of channels: as many as the others, the last one also the
    rest. In a block of 2 n: n sines, then n cosines, of the coordinate over 10000^(i / n). For (H, W) these are DiT's
    and MAE's (arXiv 2111.06377) with the row's block first.

    Raises ValueError where D is not even, or has no pair of channels for each axis.
    """
    pairs, axes = d_model // 2, len(grid)
    if d_model % 2 or pairs < axes:
        raise ValueError(f"positions of {axes} axes need an even d_model of at least {2 * axes}, got {d_model}")
    blocks = []
    for axis, (size, (first, last)) in enumerate(
        zip(grid, pairwise([i * (pairs // axes) for i in range(axes)] + [pairs]), strict=True)
    ):
        n = last - first
        frequencies = 10_000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
        angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
        block = torch.cat([angles.sin(), angles.cos()], -1)
        shape = [1] * axes + [2 * n]
        shape[axis] = size
        blocks.append(block.view(shape).expand(*grid, 2 * n))
    return torch.cat(blocks, -1).flatten(0, -2).float()


def patch_grid(size: Size, patch_size: int) -> Size:
    """Tokens along the axes of an input of size (H, W) or (T, H, W); frames are not joined.

    Raises ValueError where H or W is not a multiple of the patch.
    """
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"input_size must be (H, W) or (T, H, W) with positive sizes, got {tuple(size)}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    height, width = size[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height} x {width} cannot be cut into patches of {patch_size} x {patch_size}")
    return *size[:-2], height // patch_size, width // patch_size


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) or (B, C, T, H, W) into tokens (B, L, C p p): row-major, a token channels first."""
    p = patch_size
    x = x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # (B, C, [T,] H / p, p, W / p, p)
    x = x.movedim(-3, -2)  # (B, C, [T,] H / p, W / p, p, p)
    return x.movedim(1, -3).flatten(1, -4).flatten(2)


def unpatchify(tokens: Tensor, patch_size: int, size: Size) -> Tensor:
    """The inverse of :func:`patchify`: tokens (B, L, C p p) to (B, C, *size)."""
    p = patch_size
    x = tokens.unflatten(1, patch_grid(size, p)).unflatten(-1, (-1, p, p))
    x = x.movedim(-3, 1).movedim(-3, -2)  # (B, C, [T,] H / p, p, W / p, p)
    return x.flatten(-2).flatten(-3, -2)
