"""Mamba-YOLO: backbone and neck of a detector whose blocks mix pixels with 2-D selective scans.

Wang et al., "Mamba YOLO: A Simple Baseline for Object Detection with State Space Model", AAAI 2025, arXiv 2406.05835.
Two published forms exist, see `Variant`. Images and features are (B, C, H, W), in channels_last memory inside.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers import SS2D, LayerNorm2d, init_mamba_yolo

Size = Literal["t", "b", "l", "debug"]
Variant = Literal["released", "aaai"]
"""released: the public code (the paper's first version), with LSBlock. aaai: the AAAI-25 paper, without."""


def set_batch_norm(module: nn.Module) -> None:
    """Give every BatchNorm2d in `module` the constants of the whole detector: eps 1e-3, momentum 0.03."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 1e-3, 0.03


class ConvBNSiLU(nn.Module):
    """SiLU(BN(conv(x))), 'same' padding for an odd kernel.

    Args:
        in_channels, channels: of input and output.
        kernel_size, stride: of the convolution.
        bias: whether the convolution has one.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, *, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=bias)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / stride, W / stride), rounded up."""
        return F.silu(self.bn(self.conv(x)))


class SimpleStem(nn.Module):
    """Two 3x3 convolutions of stride 2: an image (B, 3, H, W) becomes (B, channels, H / 4, W / 4)."""

    def __init__(self, channels: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.GELU(),
            nn.Conv2d(channels // 2, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / 4, W / 4)."""
        return self.conv(x)


class VisionClueMerge(nn.Module):
    """Halve an image by mixing its four sub-grids of even and odd pixels: SiLU(BN(linear of 2 x 2 x in_channels)).

    The published layer concatenates the sub-grids and applies a 1x1 convolution; a 2x2 convolution of stride 2 is the
    same map without the copies.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 2, 2)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H / 2, W / 2); raises ValueError unless H and W are even."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"VisionClueMerge needs an even height and width, got {x.shape[2]} x {x.shape[3]}")
        return F.silu(self.bn(self.conv(x)))


class LSBlock(nn.Module):
    """Local spatial block: x + fc3(GELU(fc2(BN(depth-wise 3x3(x))))), with a shortcut; shape is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.fc2 = nn.Conv2d(channels, channels, 1)
        self.fc3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W), same shape."""
        return x + self.fc3(F.gelu(self.fc2(self.norm(self.fc1(x)))))


class RGBlock(nn.Module):
    """Residual gated feed-forward: fc2(GELU(depth-wise 3x3(x) + x) * v) with [x, v] = fc1(input); shape is kept.

    Args:
        channels: of input and output.
        mlp_ratio: x and v have int(2 / 3 * mlp_ratio * channels) channels each.
    """

    def __init__(self, channels: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(2 * (channels * mlp_ratio) / 3)
        self.fc1 = nn.Conv2d(channels, 2 * hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W), same shape."""
        x, v = self.fc1(x).chunk(2, 1)
        return self.fc2(F.gelu(self.dwconv(x) + x) * v)


class ODSSBlock(nn.Module):
    """Object-detection state-space block of the backbone.

    ::

        x = proj_conv(input)       x = x + SS2D(norm(local(x)))       output = x + RGBlock(norm2(x))

    where local is LSBlock or nothing; the shortcut is x, not local(x).

    Args:
        in_channels, channels: of input and output.
        local: whether LSBlock is there.
    """

    def __init__(self, in_channels: int, channels: int, *, local: bool) -> None:
        super().__init__()
        self.proj_conv = ConvBNSiLU(in_channels, channels, bias=True)
        self.lsblock = LSBlock(channels) if local else nn.Identity()
        self.norm = LayerNorm2d(channels)
        self.op = _ss2d(channels)
        self.norm2 = LayerNorm2d(channels)
        self.mlp = RGBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        x = self.proj_conv(x)
        x = x + _on_pixels(self.op, self.norm(self.lsblock(x)))
        return x + self.mlp(self.norm2(x))


class XSSBlock(nn.Module):
    """State-space block of the neck: as :class:`ODSSBlock` with `depth` SS2D in a chain, and no bias in the projection.

    Args:
        in_channels, channels: of input and output; the projection is left out where they are equal.
        depth: number of SS2D.
        local: whether LSBlock is there.
    """

    def __init__(self, in_channels: int, channels: int, depth: int = 1, *, local: bool) -> None:
        super().__init__()
        self.in_proj = ConvBNSiLU(in_channels, channels) if in_channels != channels else nn.Identity()
        self.lsblock = LSBlock(channels) if local else nn.Identity()
        self.norm = LayerNorm2d(channels)
        self.ss2d = nn.Sequential(*(_ss2d(channels) for _ in range(depth)))
        self.norm2 = LayerNorm2d(channels)
        self.mlp = RGBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, channels, H, W)."""
        x = self.in_proj(x)
        x = x + _on_pixels(self.ss2d, self.norm(self.lsblock(x)))
        return x + self.mlp(self.norm2(x))


def _ss2d(channels: int) -> SS2D:
    return SS2D(channels, act_layer=nn.GELU, init=init_mamba_yolo)


def _on_pixels(mixer: nn.Module, x: Tensor) -> Tensor:
    return mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SPPF(nn.Module):
    """Fast spatial pyramid pooling: cv2(cat(y, p(y), p(p(y)), p(p(p(y))))), y = cv1(x), p a 5x5 maximum; shape is kept.

    Args:
        channels: of input and output.
        kernel_size: of the maximum, odd.
    """

    def __init__(self, channels: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.cv1 = ConvBNSiLU(channels, channels // 2)
        self.cv2 = ConvBNSiLU(2 * channels, channels)
        self.pool = nn.MaxPool2d(kernel_size, 1, kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W), same shape."""
        ys = [self.cv1(x)]
        for _ in range(3):
            ys.append(self.pool(ys[-1]))
        return self.cv2(torch.cat(ys, 1))


class MambaYOLOBackbone(nn.Module):
    """Mamba-YOLO's backbone: an image (B, 3, H, W) becomes features (C3, C4, C5) at strides 8, 16 and 32.

    Args:
        size: "t", "b", "l", or "debug" (tiny, for tests).
        variant: which published form, see `Variant`.

    Attributes:
        out_channels: channels of C3, C4 and C5.
    """

    def __init__(self, size: Size, variant: Variant = "aaai") -> None:
        super().__init__()
        spec = mamba_yolo_size(size)
        depths, local = spec.depths(variant), variant == "released"
        c = spec.channels
        self.out_channels = c[1:]
        self.stem = SimpleStem(c[0])
        self.merges = nn.ModuleList(VisionClueMerge(c[i], c[i + 1]) for i in range(3))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ODSSBlock(c[i], c[i], local=local) for _ in range(depths[i]))) for i in range(4)
        )
        self.sppf = SPPF(c[3])
        set_batch_norm(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (C3, C4, C5) of x (B, 3, H, W); raises ValueError unless H and W are multiples of 32."""
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f"image height and width must be multiples of 32, got {x.shape[2]} x {x.shape[3]}")
        x = self.stages[0](self.stem(x.contiguous(memory_format=torch.channels_last)))
        features = []
        for merge, stage in zip(self.merges, self.stages[1:], strict=True):
            x = stage(merge(x))
            features.append(x)
        return features[0], features[1], self.sppf(x)


class MambaYOLOPAFPN(nn.Module):
    """Mamba-YOLO's path-aggregation neck: (C3, C4, C5) become (P3, P4, P5) of the same shapes.

    Down the pyramid, then up, each level mixed by an :class:`XSSBlock` after concatenation.
    Source: Liu et al., "Path Aggregation Network", arXiv 1803.01534.

    Args:
        size, variant: as the backbone's.

    Attributes:
        out_channels: channels of P3, P4 and P5.
    """

    def __init__(self, size: Size, variant: Variant = "aaai") -> None:
        super().__init__()
        spec = mamba_yolo_size(size)
        _, c3, c4, c5 = spec.channels
        depth, local = spec.neck_depth, variant == "released"
        self.out_channels = (c3, c4, c5)
        self.top_down4 = XSSBlock(c5 + c4, c4, depth, local=local)
        self.top_down3 = XSSBlock(c4 + c3, c3, depth, local=local)
        self.down3 = ConvBNSiLU(c3, c3, 3, 2)
        self.bottom_up4 = XSSBlock(c3 + c4, c4, depth, local=local)
        self.down4 = ConvBNSiLU(c4, c4, 3, 2)
        self.bottom_up5 = XSSBlock(c4 + c5, c5, depth, local=local)
        set_batch_norm(self)

    def forward(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (P3, P4, P5) of (C3, C4, C5), each half the height and width of the one before."""
        c3, c4, c5 = features
        t4 = self.top_down4(torch.cat([_upsample(c5), c4], 1))
        p3 = self.top_down3(torch.cat([_upsample(t4), c3], 1))
        p4 = self.bottom_up4(torch.cat([self.down3(p3), t4], 1))
        p5 = self.bottom_up5(torch.cat([self.down4(p4), c5], 1))
        return p3, p4, p5


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


@dataclass(frozen=True)
class MambaYOLOSize:
    """Widths and depths of one size.

    `channels` at strides 4, 8, 16 and 32; ODSSBlocks per stage in the two variants; SS2D per block of the neck.
    """

    channels: tuple[int, int, int, int]
    released: tuple[int, int, int, int]
    aaai: tuple[int, int, int, int]
    neck_depth: int

    def depths(self, variant: Variant) -> tuple[int, int, int, int]:
        """ODSSBlocks per stage of `variant`; raises ValueError for an unknown one."""
        if variant not in ("released", "aaai"):
            raise ValueError(f"variant must be 'released' or 'aaai', got {variant!r}")
        return self.released if variant == "released" else self.aaai


def mamba_yolo_size(size: Size) -> MambaYOLOSize:
    """Widths and depths of a size; raises ValueError for an unknown one."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return SIZES[size]


SIZES: dict[Size, MambaYOLOSize] = {
    "t": MambaYOLOSize((32, 64, 128, 256), released=(1, 1, 3, 1), aaai=(1, 2, 2, 1), neck_depth=1),
    "b": MambaYOLOSize((64, 128, 256, 512), released=(1, 1, 3, 1), aaai=(1, 2, 2, 1), neck_depth=1),
    "l": MambaYOLOSize((96, 192, 384, 576), released=(2, 2, 6, 2), aaai=(2, 4, 4, 2), neck_depth=2),
    "debug": MambaYOLOSize((8, 16, 24, 32), released=(1, 1, 1, 1), aaai=(1, 1, 1, 1), neck_depth=1),
}
