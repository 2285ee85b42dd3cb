"""Token mixers and norms as ordinary PyTorch modules, ready to be lifted into another network."""

from mambavision.layers.embeddings import (
    LabelEmbedding,
    TimestepEmbedding,
    patch_grid,
    patchify,
    sincos_positions,
    unpatchify,
)
from mambavision.layers.mamba2 import BiMamba2Mixer, HydraMixer, Mamba2Mixer, init_mamba2
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
    "BiMamba2Mixer",
    "BiMambaMixer",
    "HydraMixer",
    "LabelEmbedding",
    "LayerNorm2d",
    "Mamba2Mixer",
    "MambaMixer",
    "SelectiveSSM",
    "TimestepEmbedding",
    "init_mamba",
    "init_mamba2",
    "init_mamba_yolo",
    "init_vmamba_v1",
    "init_vmamba_v2",
    "patch_grid",
    "patchify",
    "sincos_positions",
    "unpatchify",
]
