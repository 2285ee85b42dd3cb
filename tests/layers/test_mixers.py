import pytest
import torch
from tests.parity import check_module, load
from torch import nn

from mambavision.layers import SS2D, BiMambaMixer, LayerNorm2d, MambaMixer, init_mamba_yolo


class ChannelsFirst(nn.Module):
    """An image mixer (B, H, W, C) seen as (B, C, H, W), with the mixer's own parameter names."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def named_parameters(self, *args, **kwargs):
        return self.mixer.named_parameters(*args, **kwargs)

    def forward(self, x):
        return self.mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fitted(module: nn.Module, weights: dict) -> nn.Module:
    """Load official weights; a 1x1 convolution's kernel axes are dropped where a linear layer stands in for it."""
    own = module.state_dict()
    module.load_state_dict({k: v.reshape(own[k].shape) if v.shape[2:] == (1, 1) else v for k, v in weights.items()})
    return module


def test_mamba_mixer_is_the_published_block():
    fixture = load("mamba1_d32")
    check_module(fixture, fitted(MambaMixer(32), fixture.weights()), tol=1e-5, grad_tol=5e-5)


def test_bi_mamba_mixer_is_vims_block():
    fixture = load("vim_mamba_v2_d32")
    check_module(fixture, fitted(BiMambaMixer(32), fixture.weights()), tol=1e-5, grad_tol=5e-5)


def test_ss2d_is_vmambas_v0():
    fixture = load("vmamba_ss2d_v0_cl")
    check_module(fixture, fitted(SS2D(32), fixture.weights()), tol=1e-5, grad_tol=5e-5)


def test_ss2d_without_gate_is_vmambas_v05_noz():
    fixture = load("vmamba_ss2d_v05noz_cf")
    ss2d = SS2D(32, d_state=1, expand=1, conv_bias=False, gated=False)
    check_module(fixture, ChannelsFirst(fitted(ss2d, fixture.weights())), tol=1e-5, grad_tol=5e-5)


@pytest.mark.parametrize("name", ["myolo_block_ss2d_d32", "myolo_block_ss2d_d32_ssm8"])
def test_ss2d_is_mamba_yolos(name):
    fixture = load(name)
    ss2d = SS2D(32, act_layer=nn.GELU, init=init_mamba_yolo)
    check_module(fixture, ChannelsFirst(fitted(ss2d, fixture.weights())), tol=1e-5, grad_tol=5e-5)
