"""PSNR, SSIM, PSNR-B and NMSE as the restoration literature computes them, and mmengine's metric of them and LPIPS."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from mambavision.engine.files import atomic_path
from mambavision.restoration.lpips import load_lpips

_BLOCK = 8  # of JPEG


def psnr(x: Tensor, gt: Tensor) -> float:
    """Peak signal-to-noise ratio 10 log10(1 / mean((x - gt)^2)) in dB of pictures in [0, 1]; neither is clipped."""
    return _decibel((x.double() - gt.double()).square().mean().item())


def psnr_b(x: Tensor, gt: Tensor) -> float:
    """PSNR that also counts the block edges of JPEG left in x, (C, H, W) in [0, 1], the mean over channels in dB.

    10 log10(1 / (mse + bef)), where bef is the mean squared step across the edges of 8 x 8 blocks less that between
    other neighbours, if positive, times log2(8) / log2(min(H, W)). Yim and Bovik, "Quality assessment of deblocked
    images", TIP 2011.
    """
    x, gt = x.double(), gt.double()
    mse = (x - gt).square().mean((1, 2))
    across, elsewhere, edges, others = 0, 0, 0, 0
    for picture in (x, x.mT):
        h, w = picture.shape[1:]
        steps = picture.diff(dim=2).square().sum(1)
        at_edge = torch.arange(w - 1, device=x.device) % _BLOCK == _BLOCK - 1
        across, elsewhere = across + steps[:, at_edge].sum(1), elsewhere + steps[:, ~at_edge].sum(1)
        count = h * (w // _BLOCK - 1)
        edges, others = edges + count, others + h * (w - 1) - count
    bef = (across / max(edges, 1) - elsewhere / others).clamp(min=0)
    bef = bef * (math.log2(_BLOCK) / math.log2(min(x.shape[1:])))
    return float(np.mean([_decibel(value) for value in (mse + bef).tolist()]))


def ssim(x: Tensor, gt: Tensor) -> float:
    """Structural similarity of pictures (C, H, W) in [0, 1]: mean over positions, then over channels.

    Gaussian window of 11 x 11 and sigma 1.5 where it fits wholly, K1 = 0.01, K2 = 0.03, biased variances. Wang et al.,
    "Image quality assessment: from error visibility to structural similarity", TIP 2004.

    Raises:
        ValueError: If a side is less than 11 pixels.
    """
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels, got {tuple(x.shape[-2:])}")
    x, gt = x.double(), gt.double()
    mean_x, mean_gt, xx, yy, xy = _window_means(torch.stack([x, gt, x * x, gt * gt, x * gt]))
    var_x, var_gt, cov = xx - mean_x**2, yy - mean_gt**2, xy - mean_x * mean_gt
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_gt + c1) * (2 * cov + c2)
    similarity = similarity / ((mean_x**2 + mean_gt**2 + c1) * (var_x + var_gt + c2))
    return similarity.mean((1, 2)).mean().item()


def _window_means(x: Tensor) -> Tensor:
    weights = [math.exp(-0.5 * (t / 1.5) ** 2) for t in range(-5, 6)]
    for dim in (-2, -1):
        means = torch.zeros_like(x.narrow(dim, 5, x.shape[dim] - 10))
        for i, weight in enumerate(weights):
            means.add_(x.narrow(dim, i, means.shape[dim]), alpha=weight / sum(weights))
        x = means
    return x


def nmse(x: Tensor, gt: Tensor) -> float:
    """Normalised error sum((x - gt)^2) / sum(gt^2); infinite where gt is black."""
    energy = gt.double().square().sum().item()
    return (x.double() - gt.double()).square().sum().item() / energy if energy else math.inf


def rgb_to_y(x: Tensor) -> Tensor:
    """Y of BT.601 in 16/255..235/255, (..., 1, H, W), of RGB (..., 3, H, W) in [0, 1]."""
    weights = x.new_tensor([65.481, 128.553, 24.966]).view(3, 1, 1)
    return ((x * weights).sum(-3, keepdim=True) + 16) / 255


@METRICS.register_module()
class RestorationMetric(BaseMetric):
    """PSNR, SSIM and NMSE of restored pictures, and on request PSNR-B and LPIPS: means over each test set.

    Pictures are clipped and rounded to 8 bits first, as the literature's are by being saved. Names of results are
    "PSNR", "SSIM" and so on, after "<set>/" where samples name their `set`.

    Args:
        crop_border: Pixels left out on each side; super-resolution leaves out its scale.
        y_only: Measure Y of BT.601 instead of RGB.
        psnr_b: Measure PSNR-B, for JPEG.
        lpips: Arguments of :func:`~mambavision.restoration.lpips.load_lpips`; measured in RGB, whole.
        csv: File to write a line per picture to.
        collect_device: As in mmengine.
    """

    default_prefix = ""

    def __init__(
        self,
        *,
        crop_border: int = 0,
        y_only: bool = False,
        psnr_b: bool = False,
        lpips: dict | None = None,
        csv: str | Path | None = None,
        collect_device: str = "cpu",
    ) -> None:
        super().__init__(collect_device=collect_device)
        self.crop_border, self.y_only, self.psnr_b, self.csv = crop_border, y_only, psnr_b, csv
        self.lpips = load_lpips(**lpips) if lpips else None

    def process(self, data_batch: dict, data_samples: Sequence[Tensor]) -> None:
        """Measure restored pictures, (C, H, W) each, against data_batch["gt"]; "path" and "set" name them.

        Raises:
            ValueError: If a picture is not as large as its gt.
        """
        paths = data_batch["path"]
        sets = data_batch.get("set", [""] * len(paths))
        for restored, gt, path, name in zip(data_samples, data_batch["gt"], paths, sets, strict=True):
            if restored.shape != gt.shape:
                raise ValueError(f"{path}: restored to {tuple(restored.shape)}, expected {tuple(gt.shape)}")
            self.results.append((name, str(path), self.measure(restored, gt.to(restored.device))))

    def measure(self, restored: Tensor, gt: Tensor) -> dict[str, float]:
        """The measures of one picture, (C, H, W) each."""
        x, gt = (picture.float().clamp(0, 1).mul(255).round() / 255 for picture in (restored, gt))
        values = {"LPIPS": self._lpips(x, gt)} if self.lpips else {}
        if self.y_only and x.shape[0] == 3:
            x, gt = rgb_to_y(x.double()), rgb_to_y(gt.double())
        if self.crop_border:
            inner = slice(self.crop_border, -self.crop_border)
            x, gt = x[:, inner, inner], gt[:, inner, inner]
        values = {"PSNR": psnr(x, gt), "SSIM": ssim(x, gt), "NMSE": nmse(x, gt), **values}
        return {**values, "PSNR-B": psnr_b(x, gt)} if self.psnr_b else values

    @torch.inference_mode()
    def _lpips(self, x: Tensor, gt: Tensor) -> float:
        pictures = (picture.expand(3, -1, -1)[None] for picture in (x, gt))
        return self.lpips.to(x.device)(*pictures).item()

    def compute_metrics(self, results: list[tuple[str, str, dict[str, float]]]) -> dict[str, float]:
        """Means over each set; writes the CSV file."""
        if self.csv:
            self._write_csv(results)
        columns: dict[str, list[float]] = defaultdict(list)
        for name, _, values in results:
            for metric, value in values.items():
                columns[f"{name}/{metric}" if name else metric].append(value)
        return {column: float(np.mean(values)) for column, values in columns.items()}

    def _write_csv(self, results: list[tuple[str, str, dict[str, float]]]) -> None:
        Path(self.csv).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.csv) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["set", "path", *results[0][2]])
            for name, path, values in results:
                writer.writerow([name, path, *(f"{value:.6g}" for value in values.values())])


def _decibel(mse: float) -> float:
    return -10 * math.log10(mse) if mse > 0 else math.inf
