"""WindowTransformer: attention in shifted windows at full resolution, the baseline of Serpent with attention.

After SwinIR's light form, Liang et al., "SwinIR: Image Restoration Using Swin Transformer", arXiv 2108.10257: groups of
attention layers, each closed by a 3x3 convolution and a residual. Here 4 heads of 16 channels, so that torch's fused
attention serves, in place of 6 of 10.

Images are (B, C, H, W) in [0, 1]; features are (B, H, W, C).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from mambavision.backbones.serpent import enlarge, on_images, on_pixels, pad_to_multiple


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of `window` x `window` tokens, with a learned bias of relative position.

    Args:
        dim: channels C.
        num_heads: of C / num_heads channels each.
        window: side of a window.
        shift: the grid of windows begins at this token, in each direction; beyond the image keys and values are zeros,
            which spares the masks of windows that wrap around.
    """

    def __init__(self, dim: int, *, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_bias, std=0.02)
        row, col = (v.flatten() for v in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
        apart = [v[:, None] - v[None] + window - 1 for v in (row, col)]
        self.register_buffer("relative_index", apart[0] * (2 * window - 1) + apart[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, H, W, C), H and W multiples of the window; same shape."""
        batch, height, width, _ = x.shape
        w, s = self.window, self.shift
        qkv = self.qkv(x)
        if s:
            qkv = F.pad(qkv, (0, 0, w - s, s, w - s, s))
        down, across = qkv.shape[1] // w, qkv.shape[2] // w
        qkv = qkv.view(batch, down, w, across, w, 3, self.num_heads, -1)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)  # (B windows, heads, w^2, C / heads)
        bias = self.relative_bias[self.relative_index].permute(2, 0, 1).to(q.dtype)  # (heads, w^2, w^2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.view(batch, down, across, self.num_heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6)
        y = y.flatten(3, 4).flatten(1, 2)  # (B, down w, across w, C)
        if s:
            y = y[:, w - s : w - s + height, w - s : w - s + width]
        return self.proj(y)


class WindowBlock(nn.Module):
    """x = x + attention(norm1(x)), then x = x + mlp(norm2(x)), with a hidden layer of 2 C."""

    def __init__(self, dim: int, *, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, num_heads=num_heads, window=window, shift=shift)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), same shape."""
        x = x + self.attention(self.norm1(x).to(x.dtype))
        return x + self.mlp(self.norm2(x).to(x.dtype))


class WindowTransformer(nn.Module):
    """Restores images (B, in_channels, H, W) of any size.

    Args:
        in_channels: 3 for RGB, 1 for gray.
        dim: channels of all layers.
        depths: layers of each group; every second one has shifted windows.
        num_heads, window: of the attention.
        scale: of the output.
        sigma_input: whether forward takes the noise level.

    Attributes:
        config: these arguments, JSON-able.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        dim: int,
        depths: tuple[int, ...],
        num_heads: int,
        window: int = 8,
        scale: int = 1,
        sigma_input: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, dim=dim, depths=list(depths), num_heads=num_heads, window=window, scale=scale,
            sigma_input=sigma_input,
        )  # fmt: skip
        self.scale, self.window = scale, window
        self.embed = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.sigma = nn.Parameter(torch.randn(dim)) if sigma_input else None
        self.groups = nn.ModuleList(
            nn.Sequential(
                *(WindowBlock(dim, num_heads=num_heads, window=window, shift=i % 2 * window // 2) for i in range(depth))
            )
            for depth in depths
        )
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in depths)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Conv2d(dim, in_channels * scale**2, 3, padding=1)
        nn.init.trunc_normal_(self.head.weight, std=1e-4)  # an untrained network nearly returns its input
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Restore x (B, in_channels, H, W) to (B, in_channels, scale H, scale W); `sigma` as in `Serpent`."""
        if sigma is not None and self.sigma is None:
            raise ValueError("sigma was given to a network built without sigma_input")
        height, width = x.shape[-2:]
        y = on_pixels(self.embed, pad_to_multiple(x, self.window).permute(0, 2, 3, 1))
        if sigma is not None:
            y = y + (sigma[:, None] * self.sigma).to(y.dtype)[:, None, None]
        shallow = y
        for group, conv in zip(self.groups, self.convs, strict=True):
            y = y + on_pixels(conv, group(y))
        y = F.pixel_shuffle(on_images(self.head, self.norm(y).to(y.dtype) + shallow), self.scale)
        return y[..., : self.scale * height, : self.scale * width].to(x.dtype) + enlarge(x, self.scale)


def window_transformer(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> WindowTransformer:
    """About the parameters of `serpent_s` and of SwinIR-light."""
    return WindowTransformer(
        in_channels, dim=64, depths=(6, 6, 6, 6), num_heads=4, scale=scale, sigma_input=sigma_input
    )
