"""Against rows that were published, and formulas written out."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from torch import Tensor
from torch.utils.data import default_collate

from mambavision.restoration.datasets import CleanFolder, EvaluationSet, EvaluationSets
from mambavision.restoration.degradations import JPEG, GaussianNoise
from mambavision.restoration.metrics import RestorationMetric, nmse, psnr, psnr_b, rgb_to_y, ssim
from mambavision.restoration.resize import imresize
from tests.restoration.conftest import fetched


def _mean(samples, metric: RestorationMetric) -> dict[str, float]:
    for sample in samples:
        metric.process({key: [value] for key, value in sample.items()}, [sample["inputs"]])
    return metric.compute_metrics(metric.results)


@pytest.mark.parametrize("scale,decibel,similarity", [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)])
def test_bicubic_on_set5(shared_dir: Path, scale: int, decibel: float, similarity: float):
    metric, samples = RestorationMetric(crop_border=scale), []
    for photo in CleanFolder(shared_dir / "data" / "set5" / "HR", gray=True, gray_range="limited"):
        y = torch.from_numpy(photo.pixels / 255).permute(2, 0, 1)
        y = y[:, : y.shape[1] // scale * scale, : y.shape[2] // scale * scale]
        samples.append(dict(inputs=imresize(imresize(y, scale=1 / scale), scale=scale), gt=y, path=photo.path))
    means = _mean(samples, metric)
    assert means["PSNR"] == pytest.approx(decibel, abs=0.01)
    assert means["SSIM"] == pytest.approx(similarity, abs=1e-4)


CLASSIC5 = [(10, 27.82, 0.760, 25.21), (20, 30.12, 0.834, 27.50), (30, 31.48, 0.867, 28.94), (40, 32.43, 0.885, 29.92)]
LIVE1 = [(10, 27.77, 0.773, 25.33), (20, 30.07, 0.851, 27.57), (30, 31.41, 0.885, 28.92), (40, 32.35, 0.904, 29.96)]


@pytest.mark.parametrize(
    "name,row", [*(("classic5", row) for row in CLASSIC5), *(("live1", row) for row in LIVE1)], ids=str
)
def test_jpeg_input_rows(name: str, row: tuple[int, float, float, float]):
    quality, decibel, similarity, with_blocks = row
    photos = CleanFolder(fetched(f"test/{name}"), gray=True, gray_range="limited")
    means = _mean(EvaluationSet(photos, JPEG((quality, quality))), RestorationMetric(psnr_b=True))
    assert means["PSNR"] == pytest.approx(decibel, abs=0.01)
    assert means["SSIM"] == pytest.approx(similarity, abs=6e-4)
    assert means["PSNR-B"] == pytest.approx(with_blocks, abs=0.02)


@pytest.mark.parametrize("quality,decibel", [(10, 25.69), (20, 28.06), (30, 29.37), (40, 30.28)])
def test_jpeg_input_rows_in_colour(quality: int, decibel: float):
    samples = EvaluationSet(CleanFolder(fetched("test/live1")), JPEG((quality, quality)))
    assert np.mean([psnr(sample["inputs"], sample["gt"]) for sample in samples]) == pytest.approx(decibel, abs=0.01)


@pytest.mark.parametrize("sigma,decibel", [(15, 24.61), (25, 20.17), (50, 14.15)])
def test_noisy_input_rows(shared_dir: Path, sigma: int, decibel: float):
    photos = CleanFolder(shared_dir / "data" / "set12", gray=True)
    rows = [psnr(sample["inputs"], sample["gt"]) for sample in EvaluationSet(photos, GaussianNoise((sigma, sigma)))]
    # seed 0 again in every picture: 0.03 dB from the mean of the noise
    assert np.mean(rows) == pytest.approx(decibel, abs=0.04) and np.std(rows) < 0.02


def test_formulas():
    generator = torch.Generator().manual_seed(0)
    x, gt = torch.rand(2, 3, 24, 31, generator=generator, dtype=torch.float64)
    assert psnr(x, gt) == pytest.approx(-10 * math.log10(((x - gt) ** 2).mean()))
    assert psnr(gt, gt) == math.inf and ssim(gt, gt) == pytest.approx(1)
    assert nmse(x, gt) == pytest.approx(((x - gt) ** 2).sum().item() / (gt**2).sum().item())
    white, red = torch.ones(3, 1, 1), torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    assert rgb_to_y(white).item() == pytest.approx(235 / 255) and rgb_to_y(red).item() == pytest.approx(81.481 / 255)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(x[:, :10], gt[:, :10])


def test_ssim_is_its_sum():
    generator = np.random.default_rng(0)
    x, gt = generator.random((2, 13, 12))
    t = np.arange(-5, 6)
    window = np.exp(-(t[:, None] ** 2 + t**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(3):
        for left in range(2):
            a, b = (picture[top : top + 11, left : left + 11] for picture in (x, gt))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(luminance * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    assert ssim(torch.from_numpy(x)[None], torch.from_numpy(gt)[None]) == pytest.approx(np.mean(values), abs=1e-12)


def test_psnr_b_counts_block_edges_only():
    gt = torch.full((1, 64, 64), 0.5)
    blocks = gt + 0.1 * (torch.arange(64) // 8 % 2)
    shifted = gt + 0.1 * ((torch.arange(64) + 4) // 8 % 2)
    assert psnr_b(blocks, gt) < psnr(blocks, gt) - 1
    assert psnr_b(shifted, gt) == pytest.approx(psnr(shifted, gt))


def test_metric_rounds_crops_and_names(tmp_path: Path):
    gt = torch.rand(3, 40, 30).mul(255).round() / 255
    restored = gt.clone()
    restored[:, :2] = 0  # in the border that is left out
    restored[:, 20, 15] += 0.4 / 255  # rounded away
    metric = RestorationMetric(crop_border=2, csv=tmp_path / "new" / "set.csv")
    metric.process(dict(gt=[gt, gt], path=["a.png", "b.png"], set=["one", "two"]), [restored, gt * 0.5])
    means = metric.compute_metrics(metric.results)
    assert means["one/PSNR"] == math.inf and means["one/SSIM"] == pytest.approx(1) and means["two/PSNR"] < 20
    rows = list(csv.reader(open(tmp_path / "new" / "set.csv")))
    assert rows[0] == ["set", "path", "PSNR", "SSIM", "NMSE"] and [row[:2] for row in rows[1:]] == [
        ["one", "a.png"],
        ["two", "b.png"],
    ]
    with pytest.raises(ValueError, match="b.png: restored to"):
        metric.process(dict(gt=[gt], path=["b.png"]), [gt[:, 1:]])


def test_mmengine_evaluates_sets_together(shared_dir: Path):
    photos = CleanFolder(shared_dir / "data" / "set12", gray=True)
    sets = EvaluationSets([EvaluationSet(photos, GaussianNoise((s, s)), name=f"sigma{s}") for s in (15, 50)])
    evaluator = Evaluator([dict(type="RestorationMetric")])
    for i in (0, 12):
        batch = default_collate([sets[i]])
        evaluator.process(list(batch["inputs"]), batch)
    means = evaluator.evaluate(len(sets))
    assert means["sigma15/PSNR"] - means["sigma50/PSNR"] == pytest.approx(20 * math.log10(50 / 15), abs=0.5)


def test_y_is_measured_in_bt601():
    gt = torch.rand(3, 32, 32)
    restored = gt.clone()
    restored[2] = (restored[2] + 0.5) % 1  # blue counts little
    values = RestorationMetric(y_only=True).measure(restored, gt)
    assert values["PSNR"] > psnr(restored, gt) + 10
    x, y = (rgb_to_y(p.clamp(0, 1).mul(255).round().double() / 255) for p in (restored, gt))
    assert values["PSNR"] == pytest.approx(psnr(x, y))


def test_noise_is_not_clipped(photo: Tensor):
    lq = GaussianNoise((50, 50)).for_evaluation(photo)["lq"]
    assert lq.min() < 0 and lq.max() > 1
