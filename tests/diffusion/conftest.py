import pytest
import torch
from torch import nn

from mambavision.backbones.dim import dim_debug
from mambavision.diffusion.objectives import RectifiedFlow
from mambavision.diffusion.pipeline import DiffusionPipeline


def untrained_network(make=dim_debug, size=(8, 8), **options):
    """A tiny network with random weights: none of them the zeros of one before its training."""
    torch.manual_seed(0)
    network = make(size, **{"in_channels": 3} | options)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def untrained(make=dim_debug, size=(8, 8), *, objective=None, class_names=("cat", "dog", "fox"), **options):
    """A pipeline of such a network."""
    network = untrained_network(make, size, **{"num_classes": len(class_names or ())} | options)
    return DiffusionPipeline(network, objective or RectifiedFlow(), class_names=class_names)


@pytest.fixture
def make_pipeline():
    return untrained


def small_autoencoder():
    """A diffusers AutoencoderKL that halves both sides, random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    ).eval()  # fmt: skip


@pytest.fixture
def tiny_autoencoder():
    return small_autoencoder()
