"""What every restoration network keeps to: signature, any size, scale, noise level, near identity untrained."""

import json

import pytest
import torch
import torch.nn.functional as F

from mambavision.backbones.conv_unet import ConvUNet, conv_unet
from mambavision.backbones.dncnn import DnCNN, dncnn
from mambavision.backbones.serpent import Serpent, enlarge, pad_to_multiple, serpent_debug
from mambavision.backbones.window_transformer import WindowAttention, WindowTransformer, window_transformer
from mambavision.engine.flops import count_macs

SMALL = {
    Serpent: serpent_debug().config,
    DnCNN: dict(depth=3, dim=8),
    ConvUNet: dict(dims=(8, 16), depths=(1, 1)),
    WindowTransformer: dict(dim=16, depths=(2,), num_heads=2),
}


def small(network, in_channels=3, **changes):
    torch.manual_seed(0)
    return network(**SMALL[network] | dict(in_channels=in_channels) | changes).eval()


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (37, 53)])
@pytest.mark.parametrize(("in_channels", "scale"), [(1, 1), (3, 2), (3, 3), (1, 4), (3, 8)])
def test_any_size_nearly_the_enlarged_input(network, height, width, in_channels, scale):
    x = torch.rand(2, in_channels, height, width)
    y = small(network, in_channels, scale=scale)(x)
    assert y.shape == (2, in_channels, scale * height, scale * width) and y.dtype == torch.float32
    assert (y - enlarge(x, scale)).abs().max() < 0.05


@pytest.mark.parametrize("network", SMALL)
def test_config_is_json_and_builds_it_again(network):
    net = small(network, sigma_input=True)
    again = network(**json.loads(json.dumps(net.config))).eval()
    again.load_state_dict(net.state_dict())
    x, sigma = torch.rand(2, 3, 9, 9), torch.tensor([0.1, 0.2])
    assert torch.equal(again(x, sigma), net(x, sigma)) and again.config == net.config
    torch.testing.assert_close(net(x), net(x, torch.zeros(2)))
    assert not torch.equal(net(x), net(x, sigma))


@pytest.mark.parametrize("network", SMALL)
def test_sigma_without_an_input_for_it_is_refused(network):
    with pytest.raises(ValueError, match="without sigma_input"):
        small(network)(torch.rand(1, 3, 4, 4), torch.rand(1))


@pytest.mark.parametrize("network", SMALL)
def test_gradients_and_autocast_are_finite(network):
    net = small(network).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("network", SMALL)
def test_cost_is_linear_in_pixels(network):
    net = small(network)
    small_picture, large = (count_macs(net, (side, side)) for side in (64, 128))
    assert 3.9 < large / small_picture < 4.05  # shifted windows pay for a border


@pytest.mark.parametrize(("build", "parameters"), [(dncnn, 0.56), (conv_unet, 1.0), (window_transformer, 0.97)])
def test_baselines_have_about_the_parameters_of_serpent_s(build, parameters):
    assert sum(p.numel() for p in build(1).parameters()) / 1e6 == pytest.approx(parameters, rel=0.02)


def test_dncnn_is_the_published_one():
    assert len([m for m in dncnn(1).modules() if isinstance(m, torch.nn.Conv2d)]) == 17
    assert len([m for m in dncnn(3).modules() if isinstance(m, torch.nn.Conv2d)]) == 20


@pytest.mark.parametrize("shift", [0, 1])
def test_window_attention_is_attention_in_each_window(shift):
    torch.manual_seed(0)
    layer = WindowAttention(4, num_heads=2, window=2, shift=shift).double()
    x = torch.randn(1, 4, 6, 4, dtype=torch.float64)
    padded = F.pad(layer.qkv(x), (0, 0, shift, shift, shift, shift))
    y = torch.zeros(1, 4 + 2 * shift, 6 + 2 * shift, 4, dtype=torch.float64)
    places = [(i, j) for i in range(2) for j in range(2)]
    for top in range(0, y.shape[1], 2):
        for left in range(0, y.shape[2], 2):
            tokens = torch.stack([padded[0, top + i, left + j] for i, j in places])
            for head in range(2):
                q, k, v = (tokens[:, 4 * part + 2 * head : 4 * part + 2 * head + 2] for part in range(3))
                bias = torch.stack(
                    [
                        torch.stack([layer.relative_bias[(a - c + 1) * 3 + b - d + 1, head] for c, d in places])
                        for a, b in places
                    ]
                )
                out = torch.softmax(q @ k.T / 2**0.5 + bias, -1) @ v
                for (i, j), value in zip(places, out, strict=True):
                    y[0, top + i, left + j, 2 * head : 2 * head + 2] = value
    expected = layer.proj(y[:, shift : shift + 4, shift : shift + 6])
    torch.testing.assert_close(layer(x), expected)


def test_padding_reflects_where_it_can():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert pad_to_multiple(x, 1) is x
    assert pad_to_multiple(x, 3)[0, 0, :, 0].tolist() == [0, 3, 0]
    assert pad_to_multiple(x, 4)[0, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
