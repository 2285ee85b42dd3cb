"""DnCNN: a plain stack of 3x3 convolutions that predicts the noise.

Zhang et al., "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising", TIP 2017,
arXiv 1608.03981: 17 layers for gray, 20 for colour.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mambavision.backbones.serpent import enlarge


class DnCNN(nn.Module):
    """Restores images (B, in_channels, H, W) of any size: x - residual(x), on the bicubically enlarged input.

    Args:
        in_channels: 3 for RGB, 1 for gray.
        depth: convolutions; all but the first and the last are followed by BatchNorm.
        dim: channels between them.
        scale: of the output.
        sigma_input: whether forward takes the noise level, as one more channel.

    Attributes:
        config: these arguments, JSON-able.
    """

    def __init__(
        self, in_channels: int = 3, *, depth: int, dim: int = 64, scale: int = 1, sigma_input: bool = False
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, depth=depth, dim=dim, scale=scale, sigma_input=sigma_input
        )
        self.scale, self.sigma_input = scale, sigma_input
        layers = [nn.Conv2d(in_channels + sigma_input, dim, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(dim, in_channels, 3, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.trunc_normal_(self.layers[-1].weight, std=1e-4)  # an untrained network nearly returns its input
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Restore x (B, in_channels, H, W) to (B, in_channels, scale H, scale W); `sigma` as in `Serpent`."""
        if sigma is not None and not self.sigma_input:
            raise ValueError("sigma was given to a network built without sigma_input")
        x = y = enlarge(x, self.scale)
        if self.sigma_input:
            level = x.new_zeros(len(x)) if sigma is None else sigma
            y = torch.cat([x, level[:, None, None, None].expand_as(x[:, :1])], 1)
        return x - self.layers(y.contiguous(memory_format=torch.channels_last)).to(x.dtype)


def dncnn(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> DnCNN:
    """As published: 0.56 M parameters for gray, 0.67 M for colour."""
    return DnCNN(in_channels, depth=17 if in_channels == 1 else 20, scale=scale, sigma_input=sigma_input)
