import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch import Tensor

from mambavision.restoration.degradations import JPEG, Downsample, GaussianBlur, GaussianNoise, InpaintingMask
from mambavision.restoration.metrics import psnr

ALL = [GaussianNoise((0, 50)), GaussianBlur(), Downsample(4), JPEG((10, 40)), InpaintingMask()]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("degradation", ALL, ids=str)
def test_is_a_function_of_the_seed(degradation, photo: Tensor):
    gt = photo.repeat(3, 1, 1, 1)
    first, same, other = (degradation(gt, _generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert first["lq"].shape[-2:] == tuple(side // degradation.scale for side in gt.shape[-2:])
    assert torch.equal(first["lq"], other["lq"]) == isinstance(degradation, Downsample)
    assert torch.equal(photo, gt[:1]), "gt is not written to"
    with pytest.raises(FrozenInstanceError):
        degradation.scale = 3


@pytest.mark.parametrize("degradation", ALL, ids=str)
def test_a_part_needs_no_more_than_the_margin_around_it(degradation, photo: Tensor):
    if isinstance(degradation, GaussianBlur):
        degradation = GaussianBlur(noise=0)
    elif not isinstance(degradation, Downsample):
        assert degradation.margin == 0
        return
    scale, margin = degradation.scale, degradation.margin
    whole = degradation(photo, _generator())["lq"]
    top, left, side = 40, 60, 64
    part = photo[..., top - margin : top + side + margin, left - margin : left + side + margin]
    part = degradation(part, _generator())["lq"][..., margin // scale :, margin // scale :]
    expected = whole[..., top // scale : (top + side) // scale, left // scale : (left + side) // scale]
    torch.testing.assert_close(part[..., : side // scale, : side // scale], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma,decibel", [(15, 24.61), (25, 20.17), (50, 14.15)])
def test_noise_has_its_level(photo: Tensor, sigma: float, decibel: float):
    noisy = GaussianNoise((sigma, sigma))(photo.repeat(8, 1, 1, 1), _generator())
    assert psnr(noisy["lq"], photo.repeat(8, 1, 1, 1)) == pytest.approx(decibel, abs=0.01)
    torch.testing.assert_close(noisy["sigma"], torch.full((8,), sigma / 255))


def test_noise_levels_differ_within_a_batch(photo: Tensor):
    gt = photo.repeat(64, 1, 1, 1)[..., :64, :64]
    noisy = GaussianNoise((10, 50))(gt, _generator())
    measured = (noisy["lq"] - gt).std((1, 2, 3))
    torch.testing.assert_close(measured, noisy["sigma"], rtol=0.05, atol=0)
    assert 10 / 255 <= noisy["sigma"].min() < 15 / 255 and 45 / 255 < noisy["sigma"].max() <= 50 / 255


def test_a_share_of_the_pictures_is_as_8_bit_files_hold_them():
    gt = torch.linspace(0, 1, 64).expand(200, 1, 8, 64)
    degraded = [GaussianNoise((40, 40), eight_bit=share)(gt, _generator()) for share in (0, 0.3, 1)]
    none, some, all_ = (one["lq"] for one in degraded)
    expected = (none.clamp(0, 1) * 255).round() / 255
    assert torch.equal(all_, expected)
    held = (some == expected).flatten(1).all(1)
    assert 0.2 < held.float().mean() < 0.4 and torch.equal(some[~held], none[~held])
    exact, held = (GaussianNoise((40, 40), eight_bit=share).for_evaluation(gt[:1])["lq"] for share in (0, 1))
    assert torch.equal(held, (exact.clamp(0, 1) * 255).round() / 255)
    with pytest.raises(ValueError, match="all pictures"):
        GaussianNoise((40, 40), eight_bit=0.5).for_evaluation(gt[:1])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_channels_share_a_part_of_the_noise(share: float):
    gt = torch.full((2, 3, 200, 200), 0.5)
    noise = GaussianNoise((25, 25), shared=(share, share))
    for lq in (noise(gt, _generator())["lq"], noise.for_evaluation(gt[:1])["lq"]):
        for picture in (lq - gt[: len(lq)]).flatten(2) * 255:
            assert picture.std().item() == pytest.approx(25, abs=0.3)
            assert torch.corrcoef(picture)[0, 1:].tolist() == pytest.approx([share] * 2, abs=0.02)


def test_a_share_of_the_pictures_shares_noise():
    gt = torch.full((200, 3, 16, 16), 0.5)
    lq = GaussianNoise((25, 25), shared=(1, 1), sharing=0.3)(gt, _generator())["lq"]
    shares = (lq - lq[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert 0.2 < shares.float().mean() < 0.4
    apart = torch.corrcoef((lq - gt)[~shares].transpose(0, 1).flatten(1))[0, 1:]
    assert apart.abs().max() < 0.02


def test_evaluation_noise_is_numpys_of_seed_0(photo: Tensor):
    noisy = GaussianNoise((25, 25)).for_evaluation(photo)
    np.random.seed(0)
    expected = photo[0].permute(1, 2, 0).numpy() + np.random.normal(0, 25 / 255, (*photo.shape[2:], 3))
    np.testing.assert_allclose(noisy["lq"][0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert noisy["sigma"].tolist() == pytest.approx([25 / 255])
    for drawn in (GaussianNoise((0, 50)), JPEG((10, 40))):
        with pytest.raises(ValueError, match="one value"):
            drawn.for_evaluation(photo)


def test_blur_is_the_convolution_with_its_kernel():
    blur = GaussianBlur(sigma=3.0)
    kernel = blur.kernel()
    assert kernel.sum().item() == pytest.approx(1) and len(kernel) == 37  # cut off at 6 sigma, within 61 taps
    assert torch.equal(kernel, kernel.flip(0)) and kernel[18] / kernel[21] == pytest.approx(math.exp(0.5))
    for shape in ((40, 51), (5, 60), (1, 7)):  # also where reflection goes to and fro
        x = np.random.default_rng(0).random(shape)
        padded = np.pad(x, 18, mode="reflect")
        k = kernel.numpy()
        expected = sum(k[i] * k[j] * padded[i : i + shape[0], j : j + shape[1]] for i in range(37) for j in range(37))
        np.testing.assert_allclose(blur.blur(torch.from_numpy(x)).numpy(), expected, atol=1e-12)


def test_blur_and_its_gradient_are_adjoint():
    blur = GaussianBlur(sigma=2.0)
    x, y = torch.rand(2, 2, 30, 23, dtype=torch.float64)
    x.requires_grad_()
    product = (blur.blur(x) * y).sum()
    (transposed,) = torch.autograd.grad(product, x)
    assert (x * transposed).sum().item() == pytest.approx(product.item(), rel=1e-12)
    # away from the border the operator is symmetric
    inner = torch.zeros(1, 80, 80, dtype=torch.float64)
    inner[:, 30:50, 30:50] = torch.rand(20, 20, dtype=torch.float64)
    inner.requires_grad_()
    (transposed,) = torch.autograd.grad((blur.blur(inner) * inner.detach()).sum(), inner)
    torch.testing.assert_close(transposed, blur.blur(inner.detach()))


def test_mask_blackens_strokes_only(photo: Tensor):
    gt = photo.repeat(4, 1, 1, 1) * 0.5 + 0.5
    thin, thick = (InpaintingMask((5, 5), (width, width)) for width in (2.0, 20.0))
    lq, mask = thin(gt, _generator())["lq"], thin.mask(gt, _generator())
    assert torch.equal(lq, gt * ~mask)
    assert 0 < mask.float().mean() < thick.mask(gt, _generator()).float().mean() < 0.8


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianNoise((50, 10)),
        lambda: GaussianNoise((0, 300)),
        lambda: GaussianNoise((0, 50), eight_bit=50),
        lambda: GaussianNoise((0, 50), shared=(0, 2)),
        lambda: GaussianNoise((0, 50), shared=(0, 1), sharing=2),
        lambda: GaussianBlur(taps=60),
        lambda: Downsample(1),
        lambda: JPEG((0, 40)),
        lambda: InpaintingMask(width=(-1, 2)),
        lambda: Downsample(8)(torch.zeros(1, 3, 5, 40)),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ValueError):
        make()


def assert_same_but_for_ties(got: Tensor, expected: Tensor):
    """8-bit photos: sums in another order may round a value half way between two levels to the other one."""
    levels = ((got - expected) * 255).abs()
    assert levels.max() < 1.001 and (levels > 0.5).float().mean() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("degradation", ALL, ids=str)
def test_gpu_follows_the_cpu(degradation, photo: Tensor):
    gt = photo.repeat(16, 1, 1, 1)
    generator = torch.Generator("cuda").manual_seed(3)
    got = {key: value.cpu() for key, value in degradation(gt.cuda(), generator).items()}
    again = degradation(gt.cuda(), torch.Generator("cuda").manual_seed(3))
    assert all(torch.equal(got[key], again[key].cpu()) for key in got)
    cpu = degradation(gt, _generator())
    if isinstance(degradation, Downsample):
        assert_same_but_for_ties(got["lq"], cpu["lq"])
    difference = (got["lq"].mean() - cpu["lq"].mean()).abs()
    assert got["lq"].shape == cpu["lq"].shape and difference < (
        0.1 if isinstance(degradation, InpaintingMask) else 5e-3
    )
