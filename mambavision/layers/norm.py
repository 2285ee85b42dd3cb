"""Normalisation layers."""

from torch import Tensor, nn

from mambavision.ops import norm_gate


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of the channels of an image (B, C, H, W), each pixel on its own.

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W), in its dtype; a channels_last x is not copied."""
        pixels = x.permute(0, 2, 3, 1)
        return norm_gate(pixels, weight=self.weight, bias=self.bias, eps=self.eps).permute(0, 3, 1, 2)
