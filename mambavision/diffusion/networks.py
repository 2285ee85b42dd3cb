"""The networks that denoise: classes, which a weight file names, and functions of one size, which a config names."""

from mambavision.backbones import dim, dit, video_unet

CLASSES = (dim.DiM, dit.DiT, video_unet.VideoUNet)
SIZES = (
    *(dim.dim_s, dim.dim_b, dim.dim_l, dim.dim_xl, dim.dim_debug),
    *(dim.dim_s_2x, dim.dim_b_2x, dim.dim_l_2x, dim.dim_xl_2x),
    *(dim.dim_s_mlp, dim.dim_b_mlp, dim.dim_l_mlp, dim.dim_xl_mlp),
    *(dit.dit_s, dit.dit_b, dit.dit_l, dit.dit_xl, dit.dit_debug),
    *(video_unet.video_unet_t, video_unet.video_unet_s, video_unet.video_unet_b, video_unet.video_unet_l),
    video_unet.video_unet_debug,
)
