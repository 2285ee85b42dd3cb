"""Conditioning of transformer blocks by adaptive layer normalisation that starts as nothing (adaLN-zero).

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748, section 3.2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.embeddings import LabelEmbedding, TimestepEmbedding


class Condition(nn.Module):
    """Embed noise level and class to one vector, silu(time + label), which every block projects for itself.

    Args:
        d_model: channels D.
        num_classes: without the null class; 0 is a network without classes.

    Raises ValueError for fewer.
    """

    def __init__(self, d_model: int, num_classes: int) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, which is a network without classes, got {num_classes}")
        super().__init__()
        self.time = TimestepEmbedding(d_model)
        self.label = LabelEmbedding(num_classes, d_model) if num_classes else None

    def forward(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """t (B,) on the scale 0..1000 and labels (B,) in 0..num_classes, None for the null class, to (B, D).

        Raises ValueError where labels are given to a network without classes.
        """
        c = self.time(t)
        if self.label is not None:
            c = c + self.label(labels, len(t))
        elif labels is not None:
            raise ValueError("labels were given to a network without classes (num_classes 0): pass labels=None")
        return F.silu(c)


class Modulation(nn.Linear):
    """Project a condition (B, D) to `count` vectors, each (B, 1, D): zeros at the start of training."""

    def __init__(self, d_model: int, count: int) -> None:
        super().__init__(d_model, count * d_model)
        self.count = count
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """The `count` vectors."""
        return super().forward(c)[:, None].chunk(self.count, -1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """layer_norm(x) (1 + scale) + shift of tokens x (B, L, D), in x's dtype; shift and scale (B, 1, D)."""
    normal = F.layer_norm(x, x.shape[-1:], eps=eps).to(x.dtype)
    return normal * (1 + scale) + shift


class FinalLayer(nn.Module):
    """Tokens (B, L, D) to (B, L, out_channels): modulated norm, then a projection that is zero at the start.

    Args:
        d_model: D.
        out_channels: channels of a token's output.
    """

    def __init__(self, d_model: int, out_channels: int) -> None:
        super().__init__()
        self.modulation = Modulation(d_model, 2)
        self.linear = nn.Linear(d_model, out_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, L, D), c (B, D)."""
        return self.linear(modulated_norm(x, *self.modulation(c)))
