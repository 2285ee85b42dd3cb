"""ConvUNet: a U-Net of NAFNet's convolutional blocks, the baseline of Serpent without a scan.

The block is that of Chen et al., "Simple Baselines for Image Restoration", ECCV 2022, arXiv 2204.04676, with its
channel attention over the whole image; the U-Net around it is Serpent's, so that the two differ in their blocks alone.
The 1x1 convolutions have no biases, as Serpent's.

Images are (B, C, H, W) in [0, 1]; features are (B, H, W, C).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.backbones.serpent import enlarge, on_images, on_pixels, pad_to_multiple
from mambavision.layers.ssm import two_linear
from mambavision.ops import depthwise_conv, norm_gate


class NAFBlock(nn.Module):
    """x = x + beta conv3(attention(gate(dwconv(conv1(norm1(x)))))), then x = x + gamma conv5(gate(conv4(norm2(x)))).

    gate(u) is the product of the two halves of u's channels; attention(u) = u * linear(mean of u over the image).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.conv1 = nn.Linear(dim, 2 * dim, bias=False)
        self.conv2 = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        self.attention = nn.Linear(dim, dim)
        self.conv3 = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.conv4 = nn.Linear(dim, 2 * dim, bias=False)
        self.conv5 = nn.Linear(dim, dim, bias=False)
        self.beta = nn.Parameter(torch.zeros(dim))
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), same shape."""
        y = self.conv1(norm_gate(x, weight=self.norm1.weight, bias=self.norm1.bias, eps=1e-6))
        u, v = depthwise_conv(y, self.conv2.weight, self.conv2.bias).chunk(2, -1)
        y = norm_gate(u, v, activation=None)
        y = y * self.attention(y.mean((1, 2), keepdim=True))
        x = x + F.linear(y, self.conv3.weight * self.beta[:, None])
        u, v = two_linear(norm_gate(x, weight=self.norm2.weight, bias=self.norm2.bias, eps=1e-6), self.conv4)
        y = norm_gate(u, v, activation=None)
        return x + F.linear(y, self.conv5.weight * self.gamma[:, None])


class ConvUNet(nn.Module):
    """Restores images (B, in_channels, H, W) of any size; levels, skips and residual as in `Serpent`.

    Args:
        in_channels: 3 for RGB, 1 for gray.
        dims: channels of each level, the finest first.
        depths: blocks of each level on the way down; all but the last level have as many on the way up.
        refinement: blocks after these, at the finest level.
        scale: of the output.
        sigma_input: whether forward takes the noise level.

    Attributes:
        config: these arguments, JSON-able.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        refinement: int = 0,
        scale: int = 1,
        sigma_input: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, dims=list(dims), depths=list(depths), refinement=refinement, scale=scale,
            sigma_input=sigma_input,
        )  # fmt: skip
        self.scale, self.multiple = scale, 2 ** (len(dims) - 1)

        def blocks(level: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*(NAFBlock(dims[level]) for _ in range(depth)))

        top = range(len(dims) - 1)
        self.embed = nn.Conv2d(in_channels, dims[0], 3, padding=1)
        self.sigma = nn.Parameter(torch.randn(dims[0])) if sigma_input else None
        self.encoder = nn.ModuleList(blocks(i, depths[i]) for i in range(len(dims)))
        self.downs = nn.ModuleList(nn.Conv2d(dims[i], dims[i + 1], 2, 2) for i in top)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(dims[i + 1], dims[i], 2, 2) for i in top)
        self.decoder = nn.ModuleList(blocks(i, depths[i]) for i in top)
        self.refinement = blocks(0, refinement)
        self.head = nn.Conv2d(dims[0], in_channels * scale**2, 3, padding=1)
        nn.init.trunc_normal_(self.head.weight, std=1e-4)  # an untrained network nearly returns its input
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Restore x (B, in_channels, H, W) to (B, in_channels, scale H, scale W); `sigma` as in `Serpent`."""
        if sigma is not None and self.sigma is None:
            raise ValueError("sigma was given to a network built without sigma_input")
        height, width = x.shape[-2:]
        y = on_pixels(self.embed, pad_to_multiple(x, self.multiple).permute(0, 2, 3, 1))
        if sigma is not None:
            y = y + (sigma[:, None] * self.sigma).to(y.dtype)[:, None, None]
        skips = []
        for level, down in zip(self.encoder, self.downs, strict=False):
            skips.append(level(y))
            y = on_pixels(down, skips[-1])
        y = self.encoder[-1](y)
        for i in reversed(range(len(self.ups))):
            y = self.decoder[i](on_pixels(self.ups[i], y) + skips[i])
        y = F.pixel_shuffle(on_images(self.head, self.refinement(y)), self.scale)
        return y[..., : self.scale * height, : self.scale * width].to(x.dtype) + enlarge(x, self.scale)


def conv_unet(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> ConvUNet:
    """About the parameters of `serpent_s`."""
    return ConvUNet(
        in_channels, dims=(48, 64, 96), depths=(3, 6, 6), refinement=3, scale=scale, sigma_input=sigma_input
    )
