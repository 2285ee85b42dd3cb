import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.restoration.resize import imresize, mirror
from tests.restoration.conftest import bytes_of


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_equals_matlab_on_bytes(set5: list[Path], scale: int):
    for path in set5:
        lr = path.parents[1] / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png"
        gt = bytes_of(path)
        h, w = (side // scale * scale for side in gt.shape[1:])
        assert torch.equal(imresize(gt[:, :h, :w], scale=1 / scale), bytes_of(lr))


def test_equals_matlab_on_floats(set5: list[Path]):
    for path in set5:  # these were resized as floats and rounded once
        lr = path.parents[1] / "LR_bicubic" / "X8" / f"{path.stem}x8.png"
        gt = bytes_of(path)
        h, w = (side // 8 * 8 for side in gt.shape[1:])
        assert torch.equal(imresize(gt[:, :h, :w].double(), scale=1 / 8).clamp(0, 255).round(), bytes_of(lr).double())


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", ["Set5", "Set14", "BSD100"])
def test_equals_the_small_photos_of_selfexsr(name: str, scale: int):
    root = Path(os.environ.get("RESTORATION_CLONES", "clones"), "SelfExSR", "data", name, f"image_SRF_{scale}")
    if not root.is_dir():
        pytest.skip(f"{root} is not here: RESTORATION_CLONES names a folder with a clone of jbhuang0604/SelfExSR")
    photos = sorted(root.glob("*_HR.png"))
    assert len(photos) == {"Set5": 5, "Set14": 14, "BSD100": 100}[name]
    border = 4
    for path in photos[:5]:
        gt, lr = bytes_of(path), bytes_of(path.with_name(path.name.replace("_HR", "_LR")))
        assert torch.equal(_inner(imresize(gt, scale=1 / scale), border), _inner(lr, border))
        # theirs has the outermost pixels repeated instead of mirrored
        repeated = F.pad(gt[None].double(), [border * scale] * 4, mode="replicate")[0].byte()
        assert torch.equal(_inner(imresize(repeated, scale=1 / scale), border), lr)


def _inner(x: Tensor, border: int) -> Tensor:
    return x[:, border:-border, border:-border]


def _by_definition(signal: np.ndarray, out: int, scale: float) -> np.ndarray:
    def keys(t: float) -> float:
        t = abs(t)
        if t <= 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    n, shrink = len(signal), min(scale, 1)
    result = []
    for i in range(out):
        u = (i + 0.5) / scale - 0.5
        weights = {j: keys(shrink * (u - j)) for j in range(math.floor(u - 3 / shrink), math.ceil(u + 3 / shrink) + 1)}
        mirrored = {j: j % (2 * n) if j % (2 * n) < n else 2 * n - 1 - j % (2 * n) for j in weights}
        result.append(sum(w * signal[mirrored[j]] for j, w in weights.items()) / sum(weights.values()))
    return np.array(result)


@pytest.mark.parametrize("length,scale", [(7, 0.5), (9, 1 / 3), (5, 2.0), (11, 1.7), (3, 0.2), (1, 4.0), (13, 0.77)])
def test_equals_the_sum_of_its_definition(length: int, scale: float):
    signal = np.random.default_rng(0).random(length)
    x = torch.from_numpy(signal).expand(2, 6, length)
    got = imresize(x, scale=scale)
    assert got.shape == (2, math.ceil(6 * scale), math.ceil(length * scale))
    expected = _by_definition(signal, got.shape[-1], scale)
    np.testing.assert_allclose(got.numpy(), np.broadcast_to(expected, got.shape), atol=1e-12)


def test_size_and_scale_agree():
    x = torch.rand(1, 12, 20)
    assert torch.equal(imresize(x, scale=0.25), imresize(x, size=(3, 5)))
    assert imresize(x, size=(24, 5)).shape == (1, 24, 5)
    for wrong in (dict(), dict(scale=2, size=(1, 1)), dict(scale=0), dict(size=(0, 4))):
        with pytest.raises(ValueError):
            imresize(x, **wrong)


@pytest.mark.parametrize("border,pad", [("symmetric", "symmetric"), ("reflect", "reflect")])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_mirror_continues_as_numpy_pads(border, pad, length: int):
    expected = np.pad(np.arange(length), 12, mode=pad)
    assert mirror(torch.arange(-12, length + 12), length, border).tolist() == expected.tolist()
    assert mirror(torch.arange(-12, length + 12), torch.tensor(length), border).tolist() == expected.tolist()
