import math

import numpy as np
import pytest
import torch
from torch import nn

from mambavision.backbones.video_unet import OverFrames
from mambavision.layers import temporal
from mambavision.layers.temporal import (
    BiTemporalS4D,
    BiTemporalS6,
    RelativePositionBias,
    TemporalAttention,
    TemporalLinearAttention,
    TemporalS4D,
    TemporalS6,
    rotate,
)
from tests import parity

CAUSAL = [lambda: TemporalS4D(8, d_state=4, mlp_dim=12), lambda: TemporalS6(8, d_state=4)]
FREE = [
    lambda: BiTemporalS4D(8, d_state=4, mlp_dim=12),
    lambda: BiTemporalS6(8, d_state=4),
    lambda: TemporalAttention(8, heads=2, head_dim=6),
    lambda: TemporalLinearAttention(8, heads=2, head_dim=6),
]


class Video(nn.Module):
    """A temporal layer on videos (B, C, T, H, W), under the published wrapper's name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fn = layer

    def forward(self, x):
        return OverFrames(self.fn)(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


def test_bi_s6_is_the_published_layer():
    fixture = parity.load("svd_bi_s6_v20")
    layer = Video(BiTemporalS6(8, d_state=16))
    layer.load_state_dict(fixture.weights())
    parity.check_module(fixture, layer, tol=1e-5, grad_tol=1e-4)


LONG = {
    "log_dt": math.log(0.05),
    "log_A_real": math.log(0.5),
    "A_imag": np.float32(np.pi) * np.arange(8, dtype=np.float32),
}


@pytest.mark.parametrize(("name", "shifts"), [("svd_bi_s4d_v8", {}), ("svd_bi_s4d_v8_oppoint", LONG)])
def test_bi_s4d_is_the_published_layer(name, shifts):
    fixture = parity.load(name)
    layer = Video(BiTemporalS4D(8, d_state=16, mlp_dim=24))
    layer.load_state_dict(fixture.weights(shifts))
    parity.check_module(fixture, layer, tol=1e-5, grad_tol=1e-4)


@pytest.mark.parametrize("build", CAUSAL + FREE)
def test_which_frames_a_frame_sees(build):
    torch.manual_seed(0)
    layer = build().double()
    x = torch.randn(3, 9, 8, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y[1, 4].square().sum(), x)
    seen = grad.abs().sum(-1) > 1e-12  # a convolution by FFT leaks what it rounds
    assert not seen[0].any() and not seen[2].any()  # each sequence by itself
    assert seen[1].tolist() == ([True] * 5 + [False] * 4 if build in CAUSAL else [True] * 9)


@pytest.mark.parametrize("build", CAUSAL + FREE)
def test_every_layer_knows_the_order_of_frames(build):
    torch.manual_seed(0)
    layer = build().double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    assert not torch.allclose(layer(x[:, order]), layer(x)[:, order])


@pytest.mark.parametrize("pair", [(TemporalS4D, BiTemporalS4D), (TemporalS6, BiTemporalS6)])
def test_a_bidirectional_layer_with_its_second_direction_s_weights_copied_has_no_direction(pair):
    torch.manual_seed(0)
    layer = pair[1](8, d_state=4).double()
    state = layer.state_dict()
    for name in state:
        if "_rev" in name:
            state[name] = state[name.replace("_rev", "")]
    layer.load_state_dict(state)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x.flip(1)), layer(x).flip(1))


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    products = rotate(q.expand(9, 6), 4) @ rotate(k.expand(9, 6), 4).T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.01
    torch.testing.assert_close(rotate(q.expand(3, 6), 4)[0], q)
    turned = rotate(torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64).expand(9, 6), 4)[8]
    angles = torch.tensor([8.0, 8 / 10_000**0.5], dtype=torch.float64)  # RoFormer's 10000^(-2 i / channels) a frame
    want = torch.stack([angles.cos(), angles.sin()], -1).flatten()
    torch.testing.assert_close(turned, torch.cat([want, turned.new_tensor([1, 0])]))


def test_buckets_of_the_relative_bias():
    bias = RelativePositionBias(2)
    buckets = bias.buckets(64)
    assert buckets[40, 40] == 0 and buckets[10, 3] == 7 and buckets[3, 10] == 16 + 7
    assert buckets[63, 0] == buckets[32, 0] == 15 and buckets[0, 63] == 31  # from max_distance on
    assert torch.equal(buckets[5:, 5:], buckets[:-5, :-5])
    past = buckets[63].flip(0)
    assert (past.diff() >= 0).all() and len(past.unique()) == 16
    values = bias(5)
    assert values.shape == (2, 5, 5) and values[1, 2, 4] == bias.relative_attention_bias.weight[16 + 2, 1]


def test_attention_is_softmax_attention_with_the_bias():
    torch.manual_seed(0)
    layer = TemporalAttention(8, heads=2, head_dim=6).double()
    x, bias = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    q, k, v = layer.to_qkv(x).view(3, 5, 3, 2, 6).permute(2, 0, 3, 1, 4)
    weights = (rotate(q, 6) @ rotate(k, 6).mT / 6**0.5 + bias).softmax(-1)
    torch.testing.assert_close(layer(x, bias), layer.to_out((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("build", CAUSAL + FREE)
def test_autocast_stays_close_to_float32(build):
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(4, 12, 8)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert (y - expected).abs().max() < 0.1 * expected.std()
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("biased", [False, True])
def test_attention_of_many_sequences_goes_in_parts(biased, monkeypatch):
    torch.manual_seed(0)
    layer, x = TemporalAttention(8, heads=2, head_dim=6), torch.randn(7, 5, 8)
    bias = torch.randn(2, 5, 5) if biased else None
    whole = layer(x, bias)
    monkeypatch.setattr(temporal, "MOST_SEQUENCES", 3)
    torch.testing.assert_close(layer(x, bias), whole)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("build", "bias"),
    [
        (lambda: BiTemporalS4D(16, d_state=4, mlp_dim=16), False),
        (lambda: BiTemporalS6(16), False),
        (lambda: TemporalAttention(16, heads=2, head_dim=32), True),
        (lambda: TemporalAttention(16, heads=2, head_dim=32), False),
        (lambda: TemporalLinearAttention(16, heads=2, head_dim=32), False),
    ],
)
def test_more_places_than_a_cuda_grid_is_high(build, bias):
    """64 clips of 32x32 places are 65536 sequences: a grid's second and third sides end at 65535."""
    torch.manual_seed(0)
    layer = build().cuda()
    x = torch.randn(2**16 + 64, 8, 16, device="cuda", requires_grad=True)
    more = (RelativePositionBias(2).cuda()(8),) if bias else ()
    with torch.autocast("cuda", torch.bfloat16):
        y, last = layer(x, *more), layer(x[-64:].detach(), *more)
    torch.testing.assert_close(y[-64:], last, atol=2e-2, rtol=2e-2)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    assert gradient.isfinite().all() and gradient[-64:].abs().amax() > 0
