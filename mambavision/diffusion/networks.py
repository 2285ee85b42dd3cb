"""The networks that denoise: classes, which a weight file names, and functions of one size, which a config names."""

from mambavision.backbones.dim import (
    DiM,
    dim_b,
    dim_b_2x,
    dim_debug,
    dim_l,
    dim_l_2x,
    dim_s,
    dim_s_2x,
    dim_xl,
    dim_xl_2x,
)
from mambavision.backbones.dit import DiT, dit_b, dit_debug, dit_l, dit_s, dit_xl

CLASSES = (DiM, DiT)
SIZES = (
    dim_s, dim_b, dim_l, dim_xl, dim_s_2x, dim_b_2x, dim_l_2x, dim_xl_2x, dim_debug, dit_s, dit_b, dit_l, dit_xl,
    dit_debug,
)  # fmt: skip
