"""LPIPS: how far two pictures are from each other in the features of a network that classifies photos."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import alexnet, vgg16

from mambavision.engine.checkpoint import CheckpointError, load

_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # ReLUs of torchvision's `features` that are compared
_CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


class LPIPS(nn.Module):
    """d(x, y) = sum over taps l of the mean over pixels of w_l . (f_l(x) - f_l(y))^2, f_l of length 1 at each pixel.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018, version 0.1.

    Args:
        network: AlexNet, which the authors recommend as a measure, or VGG-16.
    """

    def __init__(self, network: Literal["alex", "vgg"]) -> None:
        super().__init__()
        if network not in _TAPS:
            raise ValueError(f"LPIPS is of alex or vgg, got {network!r}")
        self.taps = _TAPS[network]
        self.features = {"alex": alexnet, "vgg": vgg16}[network](weights=None).features
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.heads = nn.ParameterList(torch.ones(channels) for channels in _CHANNELS[network])
        # the authors' normalisation of [-1, 1], ImageNet's
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [0, 1]; 0 where they are the same.

        Raises:
            ValueError: If a side is less than 32 pixels.
        """
        if min(x.shape[2:]) < 32:
            raise ValueError(f"LPIPS needs pictures of at least 32 x 32 pixels, got {tuple(x.shape[2:])}")
        count = len(x)
        maps = (2 * torch.cat([x, y]) - 1 - self.shift) / self.scale
        distance = maps.new_zeros(count)
        for index, layer in enumerate(self.features[: self.taps[-1] + 1]):
            maps = layer(maps)
            if index in self.taps:
                unit = maps / (maps.square().sum(1, keepdim=True).sqrt() + 1e-10)
                head = self.heads[self.taps.index(index)].view(-1, 1, 1)
                distance = distance + ((unit[:count] - unit[count:]).square() * head).sum(1).mean((1, 2))
        return distance


def load_lpips(network: Literal["alex", "vgg"], features: str | os.PathLike, heads: str | os.PathLike) -> LPIPS:
    """LPIPS with published weights, which do not come with this project.

    Args:
        network: As in :class:`LPIPS`.
        features: torchvision's ImageNet weights, `alexnet-owt-7be5be79.pth` or `vgg16-397923af.pth`.
        heads: The authors' weights of the taps, `alex.pth` or `vgg.pth` of `lpips/weights/v0.1` in their package.

    Raises:
        FileNotFoundError: If a file is not there.
        CheckpointError: If a file is not what it should be.
    """
    measure = LPIPS(network)
    found = {name.partition(".")[2]: value for name, value in load(features).items() if name.startswith("features.")}
    try:
        measure.features.load_state_dict(found)
    except RuntimeError:
        raise CheckpointError(f"{features}: not torchvision's weights of {network}") from None
    weights = load(heads)
    for tap, head in enumerate(measure.heads):
        weight = weights.get(f"lin{tap}.model.1.weight")
        if weight is None or weight.numel() != head.numel():
            raise CheckpointError(f"{heads}: not LPIPS' weights for {network}, of which tap {tap} has {len(head)}")
        head.data.copy_(weight.flatten())
    return measure.eval().requires_grad_(False)
