import pytest
import torch

from mambavision.layers import BiMamba2Mixer, HydraMixer, Mamba2Mixer
from tests.parity import check_module, load


def test_mamba2_mixer_is_the_published_block():
    fixture = load("mamba2_d32")
    mixer = Mamba2Mixer(32, d_state=16, headdim=8)
    mixer.load_state_dict(fixture.weights())
    check_module(fixture, mixer, tol=1e-5, grad_tol=1e-4)


def test_hydra_mixer_is_the_published_block():
    fixture = load("hydra_d32")
    mixer = HydraMixer(32, d_state=16, headdim=8)
    mixer.load_state_dict(fixture.weights())
    check_module(fixture, mixer, tol=1e-5, grad_tol=1e-4)


def test_both_directions_are_the_sum_of_two_scans():
    """A token's output without out_proj is rms_norm((one + other) silu(z)): it lies in the plane of the two alone."""
    torch.manual_seed(0)
    both, one = BiMamba2Mixer(16, d_state=8, headdim=8, d_conv=1), Mamba2Mixer(16, d_state=8, headdim=8, d_conv=1)
    torch.nn.init.zeros_(both.D)
    one.load_state_dict(both.state_dict())
    both.out_proj = one.out_proj = torch.nn.Identity()
    x = torch.randn(2, 13, 16)
    basis, expected = torch.stack([one(x), one(x.flip(1)).flip(1)], -1), both(x)
    weights = torch.linalg.lstsq(basis, expected[..., None]).solution
    assert (weights > 0).all()
    torch.testing.assert_close((basis @ weights)[..., 0], expected, rtol=1e-3, atol=1e-4)


def test_reversed_tokens_and_convolution_give_the_reversed_output():
    torch.manual_seed(0)
    mixer, mirror = BiMamba2Mixer(16, d_state=8, headdim=8), BiMamba2Mixer(16, d_state=8, headdim=8)
    mirror.load_state_dict(mixer.state_dict() | {"conv1d.weight": mixer.conv1d.weight.flip(-1)})
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(mirror(x.flip(1)).flip(1), mixer(x))


def test_the_causal_mixer_does_not_look_ahead_and_the_other_does():
    torch.manual_seed(0)
    x = torch.randn(1, 9, 16)
    later = x.clone()
    later[:, 5:] += 1
    for kind, seen in ((Mamba2Mixer, False), (BiMamba2Mixer, True)):
        mixer = kind(16, d_state=8, headdim=8)
        assert torch.allclose(mixer(x)[:, :5], mixer(later)[:, :5]) is not seen


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="40 channels cannot be heads of 64"):
        Mamba2Mixer(20)
    with pytest.raises(ValueError, match="40 channels cannot be heads of 64"):
        HydraMixer(20)


def test_gradients_are_finite_in_bfloat16():
    torch.manual_seed(0)
    mixer = BiMamba2Mixer(16, d_state=8, headdim=8).bfloat16()
    x = (30 * torch.randn(2, 50, 16)).bfloat16().requires_grad_()
    mixer(x).float().square().sum().backward()
    assert all(v.grad.isfinite().all() for v in (x, *mixer.parameters()))
