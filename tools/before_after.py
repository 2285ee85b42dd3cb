#!/usr/bin/env python
"""Degrade a photo in the way of each task, restore it with the weights that come along, and show crops side by side.

    python tools/before_after.py photo.jpg before_after.jpg --tasks sr_x4 jpeg deblur --corner 60 170 --side 208

A row a task: degraded (enlarged bicubically by super-resolution's factor), restored, and the photo; in gray for a task
of gray photos. The degraded photo is rounded to 8 bits, as a file would hold it. PSNR of the whole photo before and
after is printed, in dB.
"""

import argparse

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from mambavision.engine.cli import run
from mambavision.restoration.datasets import read_photo, to_tensor
from mambavision.restoration.degradations import JPEG, Degradation, Downsample, GaussianBlur, GaussianNoise
from mambavision.restoration.images import PhotoFile, write_photo_file
from mambavision.restoration.inferencer import RestorationInferencer
from mambavision.restoration.metrics import psnr

DEGRADATIONS: dict[str, Degradation] = {
    "denoise_color": GaussianNoise((25, 25)),
    "denoise_gray": GaussianNoise((25, 25)),
    "sr_x2": Downsample(2),
    "sr_x3": Downsample(3),
    "sr_x4": Downsample(4),
    "sr_x8": Downsample(8),
    "deblur": GaussianBlur(),
    "deblur_gray": GaussianBlur(),
    "jpeg": JPEG((10, 10)),
    "jpeg_gray": JPEG((10, 10)),
}


def before_and_after(gt: np.ndarray, task: str, device: str | None) -> tuple[np.ndarray, np.ndarray]:
    """The degraded photo, enlarged to the size of gt, and the restored one; uint8 of the shape of gt (H, W, C) each."""
    lq = DEGRADATIONS[task].for_evaluation(to_tensor(gt)[None])["lq"][0]
    seen = (lq.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    restored = RestorationInferencer(task, device=device)(seen)
    enlarged = cv2.resize(seen, gt.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return enlarged.reshape(gt.shape), restored.reshape(gt.shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photo", help="clean photo in colour")
    parser.add_argument("out", help="picture to write")
    parser.add_argument("--tasks", nargs="+", choices=list(DEGRADATIONS), default=["denoise_color", "sr_x4"])
    parser.add_argument("--corner", type=int, nargs=2, default=(0, 0), metavar=("TOP", "LEFT"), help="of the crops")
    parser.add_argument("--side", type=int, default=208, help="of the crops, pixels")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    args = parser.parse_args()
    photo = read_photo(args.photo).pixels
    if photo.dtype != np.uint8:
        raise ValueError(f"{args.photo}: the photo has 16 bits a channel, 8 are wanted")
    height, width = (side // 24 * 24 for side in photo.shape[:2])  # a multiple of every scale
    top, left = args.corner
    if not (0 <= top <= height - args.side and 0 <= left <= width - args.side and args.side > 0):
        raise ValueError(
            f"a crop of {args.side} pixels at {top} {left} is not within the {width}x{height} of the photo"
        )
    table = Table("task", "PSNR before", "after", title=args.photo)
    rows = []
    for task in args.tasks:
        gt = read_photo(args.photo, gray=task.endswith("gray")).pixels[:height, :width]
        before, after = before_and_after(gt, task, args.device)
        table.add_row(task, *(f"{psnr(to_tensor(picture), to_tensor(gt)):.2f}" for picture in (before, after)))
        crops = [picture[top : top + args.side, left : left + args.side] for picture in (before, after, gt)]
        row = np.concatenate([np.pad(crop, ((2, 2), (2, 2), (0, 0)), constant_values=255) for crop in crops], 1)
        rows.append(np.broadcast_to(row, (*row.shape[:2], 3)))
    write_photo_file(args.out, PhotoFile(np.concatenate(rows)))
    Console().print(table)


if __name__ == "__main__":
    run(main)
