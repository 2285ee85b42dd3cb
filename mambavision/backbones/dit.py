"""DiT: the diffusion transformer with attention, the twin of ``dim.py``: all but mixer and MLP is the same.

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748. Differences from the published code:
no variance is predicted, positions may be learned, videos (B, C, T, H, W) attend over all of their space-time tokens.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambavision.layers import patch_grid, patchify, sincos_positions, unpatchify
from mambavision.layers.adaln import Condition, FinalLayer, Modulation, modulated_norm

Positions = Literal["learned", "sincos"]


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, L, D) through ``F.scaled_dot_product_attention``.

    Args:
        d_model: D.
        nheads: heads; each has D / nheads channels.
    """

    def __init__(self, d_model: int, nheads: int) -> None:
        super().__init__()
        self.nheads = nheads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D), same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.nheads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, P)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """Attention and MLP, each under a modulated norm and a gate that is zero at the start of training.

    Args:
        d_model: channels D.
        nheads: heads of the attention.
        mlp_ratio: channels inside the MLP per channel.
    """

    def __init__(self, d_model: int, nheads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.modulation = Modulation(d_model, 6)
        self.attention = Attention(d_model, nheads)
        self.fc1 = nn.Linear(d_model, int(mlp_ratio * d_model))
        self.fc2 = nn.Linear(int(mlp_ratio * d_model), d_model)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, L, D), c (B, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c)
        x = x + gate_a * self.attention(modulated_norm(x, shift_a, scale_a))
        y = self.fc2(F.gelu(self.fc1(modulated_norm(x, shift_m, scale_m)), approximate="tanh"))
        return x + gate_m * y


class DiT(nn.Module):
    """Predict noise, velocity or whatever it is trained for from noisy images or videos, the noise level and a class.

    Args:
        input_size: (H, W) of images or (T, H, W) of videos, in pixels or latents.
        patch_size: side of a patch of a frame.
        in_channels: C of input and output.
        num_classes: without the null class; 0 is a network without classes.
        d_model: channels of a token.
        depth: blocks.
        nheads: heads of the attention.
        mlp_ratio: channels inside the MLP per channel.
        positions: learned ones, or fixed sines and cosines.
        gradient_checkpointing: keep a block's input only, and compute the block again in the backward pass.

    Attributes:
        config: these arguments but the last, JSON-able.

    Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        input_size: Sequence[int],
        *,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 0,
        d_model: int,
        depth: int,
        nheads: int,
        mlp_ratio: float = 4.0,
        positions: Positions = "sincos",
        gradient_checkpointing: bool = False,
    ) -> None:
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
        if nheads < 1 or d_model % nheads:
            raise ValueError(f"d_model {d_model} is not divisible by {nheads} heads")
        input_size = tuple(input_size)
        grid = patch_grid(input_size, patch_size)
        super().__init__()
        self.config: dict[str, Any] = dict(
            input_size=list(input_size), patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
            d_model=d_model, depth=depth, nheads=nheads, mlp_ratio=mlp_ratio, positions=positions,
        )  # fmt: skip
        self.input_size, self.patch_size, self.num_classes = input_size, patch_size, num_classes
        self.in_channels = self.out_channels = in_channels
        self.gradient_checkpointing = gradient_checkpointing
        self.embed = nn.Linear(in_channels * patch_size**2, d_model)
        table = sincos_positions(d_model, grid)
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty_like(table).normal_(std=0.02))
        else:
            self.register_buffer("positions", table, persistent=False)
        self.condition = Condition(d_model, num_classes)
        self.blocks = nn.ModuleList(DiTBlock(d_model, nheads, mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(d_model, in_channels * patch_size**2)
        for block in self.blocks:
            for layer in (block.attention.qkv, block.attention.proj, block.fc1, block.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict from x (B, C, H, W) or (B, C, T, H, W); same shape and dtype.

        Args:
            x: noisy images or videos of ``input_size``.
            t: (B,) noise level on the scale 0..1000.
            labels: (B,) int64 in 0..num_classes, the last one the null class; None is the null class for all. Not
                checked, as a GPU would have to be waited for: others are an IndexError on a CPU, a CUDA error on a GPU.

        Raises ValueError for another size, or labels for a network without classes.
        """
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            size = (self.in_channels, *self.input_size)
            raise ValueError(f"this network takes inputs (B, {', '.join(map(str, size))}), got {tuple(x.shape)}")
        c = self.condition(t, labels)
        h = self.embed(patchify(x, self.patch_size).to(self.embed.weight.dtype))
        h = h + self.positions.to(h.dtype)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c)
        return unpatchify(self.final(h, c), self.patch_size, self.input_size).to(x.dtype)


def dit_s(input_size: Sequence[int], **options: Any) -> DiT:
    """33 M parameters with 1000 classes and patches of 2; options are those of :class:`DiT`."""
    return DiT(input_size, **{"d_model": 384, "depth": 12, "nheads": 6} | options)


def dit_b(input_size: Sequence[int], **options: Any) -> DiT:
    """130 M parameters."""
    return DiT(input_size, **{"d_model": 768, "depth": 12, "nheads": 12} | options)


def dit_l(input_size: Sequence[int], **options: Any) -> DiT:
    """458 M parameters."""
    return DiT(input_size, **{"d_model": 1024, "depth": 24, "nheads": 16} | options)


def dit_xl(input_size: Sequence[int], **options: Any) -> DiT:
    """675 M parameters."""
    return DiT(input_size, **{"d_model": 1152, "depth": 28, "nheads": 16} | options)


def dit_debug(input_size: Sequence[int], **options: Any) -> DiT:
    """Seconds on a CPU, for tests."""
    return DiT(input_size, **{"d_model": 32, "depth": 2, "nheads": 4} | options)
