from pathlib import Path

import pytest
import torch
from torch import nn

from mambavision.backbones.dim import dim_debug
from mambavision.diffusion.latents import load_autoencoder
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


AUTOENCODER = Path(__file__).with_name("autoencoder")  # trained by train_autoencoder.py; halves both sides


@pytest.fixture
def tiny_autoencoder():
    return load_autoencoder(AUTOENCODER)
