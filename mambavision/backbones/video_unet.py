"""VideoUNet: the U-Net of video diffusion whose temporal attention gives way to state-space layers.

After Oshima et al., "SSM Meets Video Diffusion Models: Efficient Long-Term Video Generation with Structured State
Spaces", arXiv 2403.07711: frames are processed by 2-D convolutions and spatial linear attention, and at every level one
temporal layer mixes the frames of each place. Its two published state-space forms, the attention they replace, and
what the papers compare with are choices of `temporal`. Parameter names are those of the paper's code.

Differences: class conditioning (an embedding added to that of the time) is ours; so is attention without the T5 bias.

Videos are (B, C, T, H, W); features are (B, T, H, W, C), so that pixels and frames are tokens without a copy.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambavision.layers.temporal import (
    BiTemporalS4D,
    BiTemporalS6,
    RelativePositionBias,
    TemporalAttention,
    TemporalLinearAttention,
    TemporalS4D,
    TemporalS6,
)
from mambavision.ops import norm_gate

Temporal = Literal["bi_s4d", "s4d", "bi_s6", "s6", "attention", "rotary_attention", "linear_attention"]
"""Layer over frames: one of the state-space layers of :mod:`mambavision.layers.temporal`, or attention, with rotary
positions and T5's bias as in the paper ("attention") or with rotary positions alone."""


class FrameConv(nn.Conv3d):
    """A 2-D convolution of each frame of (B, T, H, W, C), with the weights of a 3-D one of length 1."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__(
            in_channels, out_channels, (1, size, size), stride=(1, stride, stride), padding=(0, padding, padding)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to (B, T, H', W', out_channels)."""
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        y = F.conv2d(frames, self.weight[:, :, 0], self.bias, self.stride[1:], self.padding[1:])
        return y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


class Upsample(nn.ConvTranspose3d):
    """A 4x4 transposed convolution of each frame that doubles its sides."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to (B, T, 2 H, 2 W, C)."""
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        y = F.conv_transpose2d(frames, self.weight[:, :, 0], self.bias, stride=2, padding=1)
        return y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


class Block(nn.Module):
    """silu(group_norm(proj(x)) (1 + scale) + shift), the normalisation over all frames, proj a 3x3 convolution."""

    def __init__(self, dim: int, dim_out: int, groups: int) -> None:
        super().__init__()
        self.proj = FrameConv(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)

    def forward(self, x: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        """x (B, T, H, W, C), scale_shift (B, 2 dim_out); returns (B, T, H, W, dim_out)."""
        return F.silu(_group_norm(self.proj(x), self.norm, scale_shift))


def _group_norm(x: Tensor, norm: nn.GroupNorm, scale_shift: Tensor | None) -> Tensor:
    """Group normalisation of channels-last x and what follows it as one product and sum a channel, in x's dtype."""
    with torch.autocast(x.device.type, enabled=False):
        groups = x.flatten(1, -2).unflatten(-1, (norm.num_groups, -1))  # (B, T H W, groups, C / groups)
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = groups.mean((1, 3), dtype=wide)
        square = torch.linalg.vector_norm(groups, 2, (1, 3), dtype=wide).square() / groups[0, :, 0].numel()
        deviation = (square - mean.square()).clamp(min=0).add(norm.eps).rsqrt()
        mean, deviation = (v.repeat_interleave(groups.shape[-1], 1) for v in (mean, deviation))  # (B, C)
        gain = deviation * norm.weight
        shift = norm.bias - mean * gain
        if scale_shift is not None:
            scale, offset = scale_shift.to(wide).chunk(2, 1)
            gain, shift = gain * (1 + scale), shift * (1 + scale) + offset
        gain, shift = (v.to(x.dtype)[:, None, None, None] for v in (gain, shift))
        return torch.addcmul(shift, x, gain)


class ResnetBlock(nn.Module):
    """block2(block1(x; scale and shift from the time)) + x, x projected where the channels change."""

    def __init__(self, dim: int, dim_out: int, *, time_dim: int | None, groups: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out)) if time_dim else None
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = FrameConv(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (B, T, H, W, C), time (B, time_dim); returns (B, T, H, W, dim_out)."""
        y = self.block1(x, None if self.mlp is None else self.mlp(time))
        return self.block2(y) + self.res_conv(x)


class ChannelNorm(nn.Module):
    """Layer normalisation over channels with a gain and no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C), same shape."""
        return norm_gate(x, weight=self.gamma.flatten(), eps=1e-5)


class PreNorm(nn.Module):
    """fn(norm(x))."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = ChannelNorm(dim)

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """(B, T, H, W, C), same shape."""
        return self.fn(self.norm(x), *args)


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """(B, T, H, W, C), same shape."""
        return self.fn(x, *args) + x


class OverFrames(nn.Module):
    """A layer of sequences on the frames of each place."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        """(B, T, H, W, C), same shape."""
        places = x.permute(0, 2, 3, 1, 4)  # (B, H, W, T, C)
        y = self.fn(places.flatten(0, 2), *args)
        return y.view(places.shape).permute(0, 3, 1, 2, 4).contiguous()


class OverPixels(nn.Module):
    """A layer of sequences on the pixels of each frame."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C), same shape."""
        return self.fn(x.flatten(0, 1).flatten(1, 2)).view(x.shape)


class SpatialLinearAttention(nn.Module):
    """Linear attention over the pixels of each frame: d^-1/2 softmax_d(q) (softmax_HW(k)^T v), heads of d channels.

    The weights are those of 1x1 convolutions.

    Source: Shen et al., "Efficient Attention", arXiv 1812.01243, section 3.
    """

    def __init__(self, dim: int, *, heads: int, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C), same shape."""
        tokens = x.flatten(0, 1).flatten(1, 2)  # (B T, H W, C)
        q, k, v = (F.linear(tokens, weight) for weight in self.to_qkv.weight[..., 0, 0].chunk(3))
        with torch.autocast(x.device.type, enabled=False):
            q = q.unflatten(-1, (self.heads, -1)).softmax(-1)  # in float32 inside; what comes out need not be
            head = torch.arange(v.shape[-1], device=x.device) // q.shape[-1]
            # all pairs of heads and one mask: no head is copied out of its neighbours
            mask = (head[:, None] == head).to(v.dtype) * q.shape[-1] ** -0.5
            y = q.flatten(2) @ ((k.softmax(1).mT @ v) * mask)
        return F.linear(y, self.to_out.weight[..., 0, 0], self.to_out.bias).view(x.shape)


class SpatialAttention(nn.Module):
    """Softmax attention over a sequence (S, L, C) of pixels, without positions."""

    def __init__(self, dim: int, *, heads: int, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(S, L, C), same shape."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Level(nn.Sequential):
    """Two ResNet blocks, spatial attention and the temporal layer of a level; the fifth entry resamples its output."""

    def forward(self, x: Tensor, time: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, H, W, C), time (B, time_dim); returns (B, T, H, W, dim_out), and the same resampled."""
        block1, block2, spatial, over_frames, resample = self
        y = over_frames(spatial(block2(block1(x, time), time)), *bias)
        return y, resample(y)


class TimeEmbedding(nn.Module):
    """[sin(t r), cos(t r)] of dim / 2 rates r from 1 to 1 / 10000."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) to (B, dim), float32 at least."""
        half = self.dim // 2
        rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        angles = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], -1)


class VideoUNet(nn.Module):
    """Denoise videos x_t (B, in_channels, T, H, W) of any number of frames at times t (B,) on the scale 0..1000.

    Args:
        input_size: (T, H, W) it is made for; H and W must be halved len(dim_mults) - 1 times.
        in_channels: of a frame, and of the output.
        dim: channels of the first level, a multiple of `groups`.
        dim_mults: channels of the levels in multiples of dim.
        temporal: the layer over frames.
        d_state: of the state-space layers; None is what the paper has, 512 for S4D and 16 for S6.
        mlp_dim: width of the feed-forward of S4D layers.
        heads, head_dim: of attention over frames; attention over pixels has head_dim 32.
        groups: of group normalisation.
        num_classes: of labels; the label num_classes is that of no class. 0: unconditional.
        gradient_checkpointing: keep of each level only its input, and compute it again in the backward pass.

    Attributes:
        config: these arguments but the last, JSON-able.
        out_channels: in_channels.

    Raises:
        ValueError: arguments that do not fit.
    """

    def __init__(
        self,
        input_size: Sequence[int],
        *,
        in_channels: int = 3,
        dim: int,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        temporal: Temporal = "bi_s6",
        d_state: int | None = None,
        mlp_dim: int = 512,
        heads: int = 8,
        head_dim: int = 64,
        groups: int = 8,
        num_classes: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if temporal not in get_args(Temporal):
            raise ValueError(f"temporal must be one of {', '.join(get_args(Temporal))}, got {temporal!r}")
        if len(input_size) != 3 or min(input_size) < 1:
            raise ValueError(f"input_size must be frames, height and width, at least 1 each, got {list(input_size)}")
        if dim % groups or dim % 2 or dim < 4:
            raise ValueError(f"dim must be even, at least 4 and divisible into {groups} groups, got {dim}")
        if head_dim % 2 and temporal.endswith("attention"):
            raise ValueError(f"head_dim must be even, as rotary positions turn pairs of channels, got {head_dim}")
        if not dim_mults or min(dim_mults) < 1:
            raise ValueError(f"dim_mults must name at least one level, each at least 1, got {list(dim_mults)}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, which is a network without classes, got {num_classes}")
        super().__init__()
        self.config: dict[str, Any] = dict(
            input_size=list(input_size), in_channels=in_channels, dim=dim, dim_mults=list(dim_mults),
            temporal=temporal, d_state=d_state, mlp_dim=mlp_dim, heads=heads, head_dim=head_dim, groups=groups,
            num_classes=num_classes,
        )  # fmt: skip
        self.in_channels = self.out_channels = in_channels
        self.input_size, self.num_classes = tuple(input_size), num_classes
        self.multiple = 2 ** (len(dim_mults) - 1)
        self.gradient_checkpointing = gradient_checkpointing
        self._check_sides(*input_size[1:])

        def over_frames(channels: int) -> Residual:
            layer = _temporal(temporal, channels, d_state=d_state, mlp_dim=mlp_dim, heads=heads, head_dim=head_dim)
            return Residual(PreNorm(channels, OverFrames(layer)))

        def level(channels: int, channels_out: int, resample: nn.Module) -> Level:
            return Level(
                ResnetBlock(channels, channels_out, time_dim=time_dim, groups=groups),
                ResnetBlock(channels_out, channels_out, time_dim=time_dim, groups=groups),
                Residual(PreNorm(channels_out, SpatialLinearAttention(channels_out, heads=heads))),
                over_frames(channels_out),
                resample,
            )

        dims = [dim, *(dim * m for m in dim_mults)]
        pairs = list(zip(dims[:-1], dims[1:], strict=True))
        middle, time_dim = dims[-1], 32 * dim
        self.time_rel_pos_bias = RelativePositionBias(heads) if temporal == "attention" else None
        self.init_conv = FrameConv(in_channels, dim, 7, padding=3)
        self.init_temporal_layer = over_frames(dim)
        self.time_mlp = nn.Sequential(
            TimeEmbedding(dim), nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        )
        self.label_embedding = nn.Embedding(num_classes + 1, time_dim) if num_classes else None
        self.downs = nn.ModuleList(
            level(a, b, FrameConv(b, b, 4, stride=2, padding=1) if i < len(pairs) - 1 else nn.Identity())
            for i, (a, b) in enumerate(pairs)
        )
        self.mid_block1 = ResnetBlock(middle, middle, time_dim=time_dim, groups=groups)
        self.mid_spatial_attn = Residual(PreNorm(middle, OverPixels(SpatialAttention(middle, heads=heads))))
        self.mid_temporal_layer = over_frames(middle)
        self.mid_block2 = ResnetBlock(middle, middle, time_dim=time_dim, groups=groups)
        self.ups = nn.ModuleList(
            level(2 * b, a, Upsample(a) if i else nn.Identity()) for i, (a, b) in reversed(list(enumerate(pairs)))
        )
        self.final_conv = nn.Sequential(
            ResnetBlock(2 * dim, dim, time_dim=None, groups=groups), FrameConv(dim, in_channels, 1)
        )

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (B, in_channels, T, H, W), in x_t's dtype.

        labels: (B,) int64 in 0..num_classes; None is no class. Not checked, as a GPU would have to be waited for:
        others are an IndexError on a CPU, a CUDA error on a GPU.

        Raises:
            ValueError: sides that cannot be halved often enough, or labels for an unconditional network.
        """
        self._check_sides(*x_t.shape[-2:])
        time = self.time_mlp(t)
        if self.label_embedding is not None:
            if labels is None:
                labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            time = time + self.label_embedding(labels)
        elif labels is not None:
            raise ValueError("labels were given to a network built with num_classes=0")
        bias = () if self.time_rel_pos_bias is None else (self.time_rel_pos_bias(x_t.shape[2]),)
        x = first = self.init_temporal_layer(self.init_conv(x_t.permute(0, 2, 3, 4, 1)), *bias)
        skips = []
        for level in self.downs:
            skip, x = self._run(level, x, time, *bias)
            skips.append(skip)
        x = self.mid_temporal_layer(self.mid_spatial_attn(self.mid_block1(x, time)), *bias)
        x = self.mid_block2(x, time)
        for level in self.ups:
            x = self._run(level, torch.cat([x, skips.pop()], -1), time, *bias)[1]
        return self.final_conv(torch.cat([x, first], -1)).permute(0, 4, 1, 2, 3).to(x_t.dtype)

    @property
    def blocks(self) -> list[Level]:
        """The levels, on the way down and up."""
        return [*self.downs, *self.ups]

    def _run(self, level: Level, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(level, *arguments, use_reentrant=False, preserve_rng_state=False)
        return level(*arguments)

    def _check_sides(self, height: int, width: int) -> None:
        if height % self.multiple or width % self.multiple:
            raise ValueError(f"frames of {height}x{width} pixels: both sides must be multiples of {self.multiple}")


def _temporal(
    temporal: Temporal, dim: int, *, d_state: int | None, mlp_dim: int, heads: int, head_dim: int
) -> nn.Module:
    if temporal in ("bi_s4d", "s4d"):
        layer = BiTemporalS4D if temporal == "bi_s4d" else TemporalS4D
        return layer(dim, d_state=512 if d_state is None else d_state, mlp_dim=mlp_dim)
    if temporal in ("bi_s6", "s6"):
        layer = BiTemporalS6 if temporal == "bi_s6" else TemporalS6
        return layer(dim, d_state=16 if d_state is None else d_state)
    layer = TemporalLinearAttention if temporal == "linear_attention" else TemporalAttention
    return layer(dim, heads=heads, head_dim=head_dim)


def video_unet_t(input_size: Sequence[int], **options: Any) -> VideoUNet:
    """3.2 M parameters, attentions of 4 heads of 32 channels: small enough to ship; options are those of the class."""
    return VideoUNet(input_size, **{"dim": 24, "dim_mults": (1, 2, 4), "heads": 4, "head_dim": 32} | options)


def video_unet_s(input_size: Sequence[int], **options: Any) -> VideoUNet:
    """15 M parameters."""
    return VideoUNet(input_size, **{"dim": 32} | options)


def video_unet_b(input_size: Sequence[int], **options: Any) -> VideoUNet:
    """57 M parameters: the width of the paper's versions 1 to 3."""
    return VideoUNet(input_size, **{"dim": 64} | options)


def video_unet_l(input_size: Sequence[int], **options: Any) -> VideoUNet:
    """175 M parameters: the paper's versions 4 and 5 on MineRL."""
    return VideoUNet(input_size, **{"dim": 112, "heads": 14} | options)


def video_unet_debug(input_size: Sequence[int], **options: Any) -> VideoUNet:
    """Seconds on a CPU, for tests."""
    small = {"dim": 8, "dim_mults": (1, 2), "d_state": 4, "mlp_dim": 16, "heads": 2, "head_dim": 8, "groups": 4}
    return VideoUNet(input_size, **small | options)
