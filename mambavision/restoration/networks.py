"""The networks that restore: classes, which a weight file names, and functions of one size, which a config names."""

from mambavision.backbones.conv_unet import ConvUNet, conv_unet
from mambavision.backbones.dncnn import DnCNN, dncnn
from mambavision.backbones.serpent import Serpent, serpent_b, serpent_debug, serpent_l, serpent_s, serpent_t
from mambavision.backbones.window_transformer import WindowTransformer, window_transformer

CLASSES = (Serpent, DnCNN, ConvUNet, WindowTransformer)
SIZES = (serpent_t, serpent_s, serpent_b, serpent_l, serpent_debug, dncnn, conv_unet, window_transformer)
