#!/usr/bin/env python
"""Measure how far tiles of several overlaps are from restoring a photo in one piece.

    python tools/benchmark_tiles.py photos/ --weights weights/serpent_s_denoise_color.safetensors --sigma 25
    python tools/benchmark_tiles.py photos/ --weights weights/serpent_s_sr_x4.safetensors --tile 96 --overlap 0 32 64

Clean photos are degraded by the weights' own degradation, seeded; --sigma replaces its range of noise. In the table are
the PSNR against the clean photos, in one piece and in tiles, and the largest difference of one photo, in dB.
"""

import argparse

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", help="folder of clean photos")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--sigma", type=float, help="noise level in units of 1/255; the network is not told it")
    parser.add_argument("--tile", type=int, default=128, help="largest side of a tile, pixels (default: 128)")
    parser.add_argument("--overlap", type=int, nargs="+", default=[0, 16, 32, 64])
    parser.add_argument("--count", type=int, help="of photos, the first ones (default: all)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    args = parser.parse_args()

    inferencer = RestorationInferencer(weights=args.weights, device=args.device)
    kind = dict(inferencer.metadata.get("degradation") or dict(type="GaussianNoise", sigma=(0, 255)))
    if args.sigma is not None:
        kind["sigma"] = (args.sigma, args.sigma)
    degrade = TRANSFORMS.build(kind)
    gain = dict.fromkeys(args.overlap, 0.0)
    worst = dict.fromkeys(args.overlap, 0.0)
    folder = CleanFolder(args.photos, gray=inferencer.channels == 1)
    photos = range(len(folder))[: args.count]
    total = 0.0
    for index in tqdm(photos, unit="photo"):
        gt, lq = degraded(folder[index].pixels, degrade)
        options = dict(scale=inferencer.scale, device=inferencer.device)
        with torch.inference_mode():
            whole = psnr(run_tiled(inferencer.restore_tile, lq, tile=max(lq.shape), overlap=0, **options), gt)
            total += whole
            for overlap in args.overlap:
                tiled = run_tiled(inferencer.restore_tile, lq, tile=args.tile, overlap=overlap, **options)
                change = psnr(tiled, gt) - whole
                gain[overlap] += change / len(photos)
                worst[overlap] = max(worst[overlap], abs(change))
    title = f"{len(photos)} photos, tiles of {args.tile}, {inferencer.weights.name}"
    table = Table("overlap", "PSNR in one piece", "tiles: change", "largest change", title=title)
    for overlap in args.overlap:
        numbers = total / len(photos), gain[overlap], worst[overlap]
        table.add_row(str(overlap), *(f"{number:.3f}" for number in numbers))
    Console().print(table)


def degraded(pixels: np.ndarray, degrade: degradations.Degradation) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and degraded picture, (C, H, W), of pixels (H, W, C)."""
    gt = torch.from_numpy(pixels).permute(2, 0, 1).float() / np.iinfo(pixels.dtype).max
    height, width = (side // degrade.scale * degrade.scale for side in gt.shape[1:])
    gt = gt[:, :height, :width]
    return gt, degrade(gt[None], torch.Generator().manual_seed(0))["lq"][0]


if __name__ == "__main__":
    run(main)
