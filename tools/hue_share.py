#!/usr/bin/env python
"""Measure how well shapes keep their colours: the share of a clip's coloured pixels near its commonest hues.

    python tools/sample.py --video --num 16 --save npz --out-dir out
    python tools/hue_share.py out/samples.npz
    python tools/hue_share.py configs/video_unet/video_unet_t_bi_s6_shapes32.py --num 16      (of the clips it draws)

A pixel is coloured if its largest channel is above a half of full and a quarter of full above its smallest one. Near is
within 15 degrees. The second hue is the commonest of what the first leaves, and so on.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np

from mambavision.diffusion.evaluation import open_samples
from mambavision.engine.cli import run

REACH = 30  # degrees: near is 15 on either side


def hues(frames: np.ndarray) -> np.ndarray:
    """Hues in degrees of the coloured pixels of uint8 frames (T, 3, H, W), (N,)."""
    rgb = np.moveaxis(frames, 1, 0).reshape(3, -1) / 255.0
    largest, smallest = rgb.max(0), rgb.min(0)
    coloured = (largest > 0.5) & (largest - smallest > 0.25)
    (r, g, b), chroma = rgb[:, coloured], (largest - smallest)[coloured]
    sectors = [((g - b) / chroma) % 6, (b - r) / chroma + 2, (r - g) / chroma + 4]
    return np.choose(rgb[:, coloured].argmax(0), sectors) * 60


def hue_share(frames: np.ndarray, count: int = 2) -> float:
    """The share of the coloured pixels of uint8 frames (T, 3, H, W) near their ``count`` commonest hues, or NaN."""
    every = left = hues(frames)
    if not len(every):
        return float("nan")
    for _ in range(count):
        by_degree = np.bincount(left.astype(int) % 360, minlength=360)
        in_reach = np.convolve(np.tile(by_degree, 2), np.ones(REACH, int))[REACH - 1 :][:360]  # from each degree on
        left = left[(left - in_reach.argmax()) % 360 >= REACH]
    return 1 - len(left) / len(every)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, help=".npz file of clips (tools/sample.py --save npz), or a config")
    parser.add_argument("--num", type=int, help="measure the first NUM clips (default: all)")
    parser.add_argument("--hues", type=int, default=2, help="as many as a clip has objects (default: 2)")
    args = parser.parse_args()
    for value, option in ((args.num, "--num"), (args.hues, "--hues")):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    clips = open_samples(args.samples)
    if len(clips.size) != 3 or clips.channels != 3:
        raise ValueError(f"{args.samples}: {clips.channels} channels of {clips.size} are not clips in colour")
    shares = [hue_share(clips[i].frames, args.hues) for i in islice(range(len(clips)), args.num)]
    found = np.array([share for share in shares if share == share])
    if not len(found):
        raise ValueError(f"{args.samples}: no clip has a coloured pixel")
    mean, lowest, without = 100 * found.mean(), 100 * found.min(), len(shares) - len(found)
    print(f"{len(found)} clips, {without} without colour left out")
    near = f"coloured pixels within {REACH / 2:g} degrees of a clip's {args.hues} commonest hues"
    print(f"{near}: {mean:.1f} %, at the lowest {lowest:.1f} %")


if __name__ == "__main__":
    run(main)
