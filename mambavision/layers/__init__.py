"""Token mixers and norms as ordinary PyTorch modules, ready to be lifted into another network."""

from mambavision.layers.mixers import BiMambaMixer, MambaMixer
from mambavision.layers.norm import LayerNorm2d
from mambavision.layers.ss2d import SS2D
from mambavision.layers.ssm import (
    SelectiveSSM,
    init_mamba,
    init_mamba_yolo,
    init_vmamba_v1,
    init_vmamba_v2,
)

__all__ = [
    "SS2D",
    "BiMambaMixer",
    "LayerNorm2d",
    "MambaMixer",
    "SelectiveSSM",
    "init_mamba",
    "init_mamba_yolo",
    "init_vmamba_v1",
    "init_vmamba_v2",
]
