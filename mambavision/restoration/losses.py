"""Pixel losses of restored pictures."""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class CharbonnierLoss(nn.Module):
    """mean(sqrt((x - gt)^2 + eps^2)): L1 that is smooth at 0.

    Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed imaging", ICIP 1994.

    Args:
        eps: Errors well below it count as squares. In pixel units of [0, 1].
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, gt: Tensor) -> Tensor:
        """The loss of restored x and clean gt, (B, C, H, W) each; a scalar."""
        return ((x - gt).square() + self.eps**2).sqrt().mean()


@MODELS.register_module()
class L1Loss(nn.L1Loss):
    """mean(|x - gt|)."""


@MODELS.register_module()
class PSNRLoss(nn.Module):
    """Mean over pictures of 10 log10(mean((x - gt)^2) + eps): minus the PSNR in dB.

    Chen et al., "Simple baselines for image restoration" (NAFNet), ECCV 2022.

    Args:
        eps: Bounds the loss of a perfect picture; 1e-8 is 80 dB.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, gt: Tensor) -> Tensor:
        """The loss of restored x and clean gt, (B, C, H, W) each; a scalar."""
        return 10 * torch.log10((x - gt).square().mean((1, 2, 3)) + self.eps).mean()
