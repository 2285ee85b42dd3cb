import math

import pytest
import torch
import torch.nn.functional as F

from mambavision.layers import LabelEmbedding, TimestepEmbedding, patch_grid, patchify, sincos_positions, unpatchify
from mambavision.layers.adaln import Condition, Modulation, modulated_norm


@pytest.mark.parametrize("size", [(6, 4), (3, 6, 4)])
def test_patches_are_those_of_a_convolution(size):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *size), torch.randn(5, 3, 2, 2)
    tokens = patchify(x, 2) @ weight.flatten(1).T
    frames = x if len(size) == 2 else x.transpose(1, 2).flatten(0, 1)
    expected = F.conv2d(frames, weight, stride=2).flatten(2).mT
    torch.testing.assert_close(tokens, expected.reshape(tokens.shape))
    assert tokens.shape[1] == math.prod(patch_grid(size, 2))


@pytest.mark.parametrize("size", [(6, 4), (3, 6, 4)])
@pytest.mark.parametrize("patch", [1, 2])
def test_unpatchify_is_the_inverse(size, patch):
    x = torch.randn(2, 3, *size)
    assert torch.equal(unpatchify(patchify(x, patch), patch, size), x)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="9 x 8 cannot be cut into patches of 2 x 2"):
        patch_grid((9, 8), 2)
    with pytest.raises(ValueError, match="input_size"):
        patch_grid((8,), 2)


def test_positions_are_sines_and_cosines_of_each_axis():
    table = sincos_positions(8, (3, 5)).view(3, 5, 8)
    row, col, frequencies = 2, 4, torch.tensor([1, 0.01])
    expected = [f(at * frequencies) for at in (row, col) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(table[row, col], torch.cat(expected))
    video = sincos_positions(16, (2, 3, 5))
    assert video.shape == (30, 16) and len(video.unique(dim=0)) == 30


@pytest.mark.parametrize("channels, grid", [(7, (2, 2)), (4, (2, 2, 2))])
def test_too_few_channels_for_positions_are_refused(channels, grid):
    with pytest.raises(ValueError, match=f"got {channels}"):
        sincos_positions(channels, grid)


def test_times_are_told_apart_in_half_precision():
    torch.manual_seed(0)
    net = TimestepEmbedding(64).bfloat16()
    t = torch.tensor([999.0, 998.5, 0.5, 0.0])
    c = net(t)
    assert c.dtype == torch.bfloat16
    assert len(c.unique(dim=0)) == 4


def test_no_label_is_the_null_class():
    net = LabelEmbedding(10, 8)
    assert torch.equal(net(None, 3), net(torch.full((3,), 10), 3))
    assert net.weight.shape == (11, 8)


def test_labels_of_a_network_without_classes_are_refused():
    condition = Condition(8, 0)
    assert condition(torch.zeros(2), None).shape == (2, 8)
    with pytest.raises(ValueError, match="num_classes 0"):
        condition(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_modulation_starts_as_nothing():
    shift, scale = Modulation(8, 2)(torch.randn(3, 8))
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(modulated_norm(x, shift, scale), F.layer_norm(x, (8,), eps=1e-6))
    shift, scale = torch.randn(2, 3, 1, 8)
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
