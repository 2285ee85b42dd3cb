#!/usr/bin/env python
"""Measure how far tiles of several overlaps, and half precision, are from restoring a photo in one piece in fp32.

    python tools/benchmark_tiles.py photos/ --weights weights/serpent_s_denoise_color.safetensors --sigma 25
    python tools/benchmark_tiles.py photos/ --weights weights/serpent_s_sr_x4.safetensors --tile 96 --overlap 0 32 64
    python tools/benchmark_tiles.py live1/ kodak24/ --weights weights/serpent_s_jpeg.safetensors --precision bf16

Clean photos are degraded by the weights' own degradation, seeded; --sigma replaces its range of noise. A table of
each folder: the PSNR against the clean photos, its change from that of one piece in fp32, the largest change of one
photo, in dB, and how many photos came out with values that are not finite.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mambavision.engine.cli import run
from mambavision.restoration import degradations
from mambavision.restoration.datasets import CleanFolder
from mambavision.restoration.inferencer import RestorationInferencer
from mambavision.restoration.metrics import psnr
from mambavision.restoration.tiles import run_tiled


@dataclass
class Case:
    """One way of restoring, and what came out of it; a tile of 0 is the whole photo."""

    inferencer: RestorationInferencer
    tile: int
    overlap: int
    decibel: list[float] = field(default_factory=list)
    not_finite: int = 0

    def restore(self, lq: torch.Tensor, gt: torch.Tensor) -> None:
        """Restore one degraded photo, (C, H, W), and keep its PSNR."""
        done = self.inferencer
        tile = self.tile or max(lq.shape)
        options = dict(tile=tile, overlap=self.overlap, scale=done.scale, device=done.device)
        before = done.redone
        with torch.inference_mode():
            self.decibel.append(psnr(run_tiled(done.restore_tile, lq, **options), gt))
        self.not_finite += done.redone > before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", help="folder of clean photos")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sigma", type=float, help="noise level in units of 1/255; the network is not told it")
    parser.add_argument("--tile", type=int, default=128, help="largest side of a tile, pixels (default: 128)")
    parser.add_argument("--overlap", type=int, nargs="*", default=[0, 16, 32, 64], help="of tiles, in fp32")
    parser.add_argument("--precision", nargs="*", choices=["bf16", "fp16"], default=[], help="of whole photos")
    parser.add_argument("--count", type=int, help="of photos of a folder, the first ones (default: all)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    args = parser.parse_args()

    def inferencer(precision: str = "fp32") -> RestorationInferencer:
        return RestorationInferencer(weights=args.weights, device=args.device, precision=precision)

    full = inferencer()
    kind = dict(full.metadata.get("degradation") or dict(type="GaussianNoise", sigma=(0, 255)))
    if args.sigma is not None:
        if kind["type"] != "GaussianNoise":
            raise ValueError(f"--sigma is for weights against noise, these are against {kind['type']}")
        kind |= dict(sigma=(args.sigma, args.sigma), eight_bit=0)
    degrade = TRANSFORMS.build(kind)
    halves = [inferencer(precision) for precision in args.precision]
    folders = [CleanFolder(folder, gray=full.channels == 1) for folder in args.photos]
    for name, folder in zip(args.photos, folders, strict=True):
        cases = [Case(full, 0, 0)]
        cases += [Case(half, 0, 0) for half in halves]
        cases += [Case(full, args.tile, overlap) for overlap in args.overlap]
        photos = range(len(folder))[: args.count]
        for index in tqdm(photos, unit="photo"):
            gt, lq = degraded(folder[index].pixels, degrade)
            for case in cases:
                case.restore(lq, gt)
        report(cases, f"{len(photos)} photos of {name}, {full.weights.name}, {full.device}")


def report(cases: list[Case], title: str) -> None:
    table = Table("precision", "tile", "overlap", "PSNR", "change", "largest change", "not finite", title=title)
    whole = np.array(cases[0].decibel)
    for case in cases:
        change = np.array(case.decibel) - whole
        row = case.inferencer.precision, str(case.tile or "whole"), str(case.overlap), f"{np.mean(case.decibel):.3f}"
        table.add_row(*row, f"{change.mean():.4f}", f"{np.abs(change).max():.4f}", str(case.not_finite))
    Console(width=120).print(table)


def degraded(pixels: np.ndarray, degrade: degradations.Degradation) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and degraded picture, (C, H, W), of pixels (H, W, C)."""
    gt = torch.from_numpy(pixels).permute(2, 0, 1).float() / np.iinfo(pixels.dtype).max
    height, width = (side // degrade.scale * degrade.scale for side in gt.shape[1:])
    gt = gt[:, :height, :width]
    return gt, degrade(gt[None], torch.Generator().manual_seed(0))["lq"][0]


if __name__ == "__main__":
    run(main)
