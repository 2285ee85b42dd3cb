"""Temporal layers of video networks: each mixes sequences (S, F, C) of F frames, one for each place of a frame.

State-space layers after Oshima et al., "SSM Meets Video Diffusion Models", arXiv 2403.07711, and the attention layers
that they replace. S sequences, F frames, C channels. Only the attentions are told the positions of the frames.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.mixers import mamba_direction
from mambavision.layers.s4d import S4D, fft_conv
from mambavision.layers.ssm import init_mamba, two_linear
from mambavision.ops import norm_gate

THETA = 10000.0  # base of the wave lengths of rotary positions
MOST_SEQUENCES = 65535  # of one call of attention: CUDA grids of torch's kernels go no further


class TemporalS4D(nn.Module):
    """S4D over frames and a feed-forward: fc2(GELU(fc1(s4d(x)))), causal.

    Parameter names are those of the paper's code.

    Args:
        dim: channels C.
        d_state: N of the S4D.
        mlp_dim: width of the feed-forward.
    """

    def __init__(self, dim: int, *, d_state: int = 512, mlp_dim: int = 512) -> None:
        super().__init__()
        self.s4d = S4D(dim, d_state=d_state)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (S, F, C); same shape."""
        return self.fc2(F.gelu(self.fc1(self.s4d(x))))


class BiTemporalS4D(TemporalS4D):
    """Two S4D, one from each end, and a feed-forward: fc2(GELU(fc1(s4d(x) + s4d_rev(x)))).

    The paper's first form (versions 1 to 3; "bi-s4d", version 8 of its code), and its parameter names.

    Args: as :class:`TemporalS4D`.
    """

    def __init__(self, dim: int, *, d_state: int = 512, mlp_dim: int = 512) -> None:
        super().__init__(dim, d_state=d_state, mlp_dim=mlp_dim)
        self.s4d_rev = S4D(dim, d_state=d_state)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (S, F, C); same shape."""
        kernels = self.s4d.kernel(x.shape[1]), self.s4d_rev.kernel(x.shape[1])
        past, future = fft_conv(x.mT, *kernels, reverse=(False, True))
        return self.fc2(F.gelu(self.fc1(self.s4d.after(past, x) + self.s4d_rev.after(future, x))))


class _S6(nn.Module):
    """Parameters of one direction's selective SSM."""

    def __init__(self, d_inner: int, d_state: int) -> None:
        super().__init__()
        dt_rank = math.ceil(d_inner / 16)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        init_mamba(self.A_log, self.D, self.dt_proj.weight, self.dt_proj.bias)


class TemporalS6(nn.Module):
    """Mamba block over frames: fc_out(s6(silu(conv(x))) * silu(z)) with [x, z] = fc_init(input), causal.

    Parameters are used, not the modules that hold them (but fc_out): hooks on these do not run.

    Args:
        dim: channels C; x and z have 2 C.
        d_state: N, states per channel.
        d_conv: width of the causal convolution.
    """

    def __init__(self, dim: int, *, d_state: int = 16, d_conv: int = 4) -> None:
        super().__init__()
        self.fc_init = nn.Linear(dim, 4 * dim)
        self.conv = nn.Conv1d(2 * dim, 2 * dim, d_conv, groups=2 * dim)
        self.s6 = _S6(2 * dim, d_state)
        self.fc_out = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (S, F, C); same shape."""
        x, z = two_linear(x, self.fc_init)
        return self.fc_out(norm_gate(_direction(x, self.conv, self.s6), z))


class BiTemporalS6(TemporalS6):
    """The same with a second convolution and SSM from the last frame to the first: fc_out((y + y_rev) * silu(z)).

    The paper's second form (versions 4 and 5; "bi-s6", version 20 of its code), and its parameter names: Vim's block
    with the sum of both directions, not its half.

    Args: as :class:`TemporalS6`.
    """

    def __init__(self, dim: int, *, d_state: int = 16, d_conv: int = 4) -> None:
        super().__init__(dim, d_state=d_state, d_conv=d_conv)
        self.conv_rev = nn.Conv1d(2 * dim, 2 * dim, d_conv, groups=2 * dim)
        self.s6_rev = _S6(2 * dim, d_state)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (S, F, C); same shape."""
        x, z = two_linear(x, self.fc_init)
        y = _direction(x, self.conv, self.s6) + _direction(x, self.conv_rev, self.s6_rev, reverse=True)
        return self.fc_out(norm_gate(y, z))


def _direction(x: Tensor, conv: nn.Conv1d, s6: _S6, *, reverse: bool = False) -> Tensor:
    return mamba_direction(x, conv, s6.x_proj, s6.dt_proj, s6.A_log, s6.D, reverse=reverse)


def rotate(x: Tensor, channels: int) -> Tensor:
    """Turn pairs of the first ``channels`` of x (..., F, d) by angles that grow with the frame, in x's dtype.

    Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2.
    """
    rates = THETA ** (-torch.arange(0, channels, 2, device=x.device) / channels)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates  # (F, channels / 2)
    rest = (0, x.shape[-1] - channels)
    cos = F.pad(angles.cos().repeat_interleave(2, -1), rest, value=1.0).to(x.dtype)
    sin = F.pad(torch.stack([-angles.sin(), angles.sin()], -1).flatten(-2), rest).to(x.dtype)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class RelativePositionBias(nn.Module):
    """T5's bias of attention: a learned number for each head and bucket of the distance between two frames.

    Source: Raffel et al., "T5", arXiv 1910.10683, section 2.1; bidirectional buckets, half of them for single
    distances and half growing with the logarithm up to max_distance.

    Args:
        heads: of the attention.
        num_buckets: over both directions.
        max_distance: from here on distances share the last bucket.
    """

    def __init__(self, heads: int, *, num_buckets: int = 32, max_distance: int = 32) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def buckets(self, frames: int, device: torch.device | None = None) -> Tensor:
        """The bucket of each pair of frames (query, key), int64 (F, F)."""
        position = torch.arange(frames, device=device)
        past = position[:, None] - position
        half = self.num_buckets // 2
        exact = half // 2
        distance = past.abs()
        scale = (half - exact) / math.log(self.max_distance / exact)
        far = exact + ((distance.clamp(min=1) / exact).log() * scale).long()
        return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (past < 0)

    def forward(self, frames: int) -> Tensor:
        """The bias (heads, F, F)."""
        weight = self.relative_attention_bias.weight
        return F.embedding(self.buckets(frames, weight.device), weight).permute(2, 0, 1)


class TemporalAttention(nn.Module):
    """Softmax attention over frames with rotary positions, and the bias of :class:`RelativePositionBias` if given.

    Through ``F.scaled_dot_product_attention``: without a bias no F x F matrix is kept; with one, its gradient is.

    Args:
        dim: channels C.
        heads, head_dim: of the attention.
    """

    def __init__(self, dim: int, *, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.heads, self.rotary = heads, min(32, head_dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix x (S, F, C), bias (heads, F, F); same shape."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, S, heads, F, d)
        (q, k), v = rotate(qkv[:2], self.rotary), qkv[2]
        mask = None if bias is None else bias.to(q.dtype)
        parts = [
            F.scaled_dot_product_attention(
                *part, attn_mask=None if mask is None else mask.expand(len(part[0]), -1, -1, -1)
            )
            for part in zip(*(tensor.split(MOST_SEQUENCES) for tensor in (q, k, v)), strict=True)
        ]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.to_out(y.transpose(1, 2).flatten(2))


class TemporalLinearAttention(nn.Module):
    """Linear attention over frames: softmax_d(q) (softmax_F(k)^T v), q and k turned by rotary positions after that.

    Source: Shen et al., "Efficient Attention", arXiv 1812.01243, section 3; rotary positions on its features as in
    RoFormer, arXiv 2104.09864, section 3.3: without them the layer could not know the order of the frames.

    Args: as :class:`TemporalAttention`.
    """

    def __init__(self, dim: int, *, heads: int = 8, head_dim: int = 64) -> None:
        super().__init__()
        self.heads, self.rotary = heads, min(32, head_dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (S, F, C); same shape."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (S, heads, F, d) each
        with torch.autocast(x.device.type, enabled=False):  # softmax is in float32 inside; its output need not be
            q = rotate(F.softmax(q, -1) * q.shape[-1] ** -0.5, self.rotary)
            k = rotate(F.softmax(k, -2), self.rotary)
            y = q @ (k.mT @ v)
        return self.to_out(y.transpose(1, 2).flatten(2))
