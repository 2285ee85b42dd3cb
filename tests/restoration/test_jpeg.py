from pathlib import Path

import numpy as np
import pytest
import torch

from mambavision.restoration.jpeg import compress, compress_batch
from tests.restoration.conftest import bytes_of


@pytest.mark.parametrize("channels,mean_difference", [(1, 0.35), (3, 0.8)])
def test_batch_follows_opencv(set5: list[Path], channels: int, mean_difference: float):
    for path in set5:
        picture = bytes_of(path)[:channels]
        qualities = [5, 10, 20, 40, 75, 95]
        batch = picture[None].float().repeat(len(qualities), 1, 1, 1) / 255
        got = compress_batch(batch, torch.tensor(qualities)).permute(0, 2, 3, 1).numpy() * 255
        for mine, quality in zip(got, qualities, strict=True):
            expected = compress(picture.permute(1, 2, 0).numpy(), quality).astype(float)
            assert np.abs(mine - expected).mean() < mean_difference, f"{path.stem}, quality {quality}"
            assert abs((mine - expected).mean()) < 0.15


@pytest.mark.parametrize("shape", [(1, 1), (7, 19), (16, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(shape: tuple[int, int], channels: int):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(1, channels, 1, 1, generator=generator) + 0.05 * torch.rand(
        1, channels, *shape, generator=generator
    )
    picture = (smooth.clamp(0, 1) * 255).byte()
    got = compress_batch(picture.float() / 255, torch.tensor([90]))
    expected = compress(picture[0].permute(1, 2, 0).numpy(), 90)
    assert got.shape == picture.shape and expected.shape == (*shape, channels)
    assert np.abs(got[0].permute(1, 2, 0).numpy() * 255 - expected).mean() < 1.5
