#!/usr/bin/env python
"""Encode pictures or videos with an AutoencoderKL, once, into latents that diffusion models train on.

    python tools/cache_latents.py data/imagenet/train data/latents256/train --autoencoder sd-vae --size 256 --classes
    python tools/cache_latents.py clips data/latents_clips --autoencoder sd-vae --size 256 --frames 16

The autoencoder is a folder of diffusers (config.json and safetensors weights) on this machine; nothing is downloaded.
With --classes, the folders in the first folder are classes. Mirrored items are encoded too, unless --no-flip. A run
that was interrupted goes on after its last whole shard.
"""

import argparse
import sys

from mambavision.diffusion import latents
from mambavision.diffusion.datasets import ClassFolder, ImageFolder, VideoFolder
from mambavision.engine.cli import choose_device, run
from mambavision.engine.files import check_folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", help="folder of photos or, with --frames, of videos")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--autoencoder", required=True, help="folder of a diffusers AutoencoderKL")
    parser.add_argument("--size", type=int, required=True, help="side of a picture in pixels")
    parser.add_argument("--frames", type=int, help="videos, of which clips of so many frames will be trained on")
    parser.add_argument("--classes", action="store_true", help="the folders in the first folder are classes")
    parser.add_argument("--no-flip", action="store_true", help="mirrored items are not as good")
    parser.add_argument("--batch-size", type=int, default=32, help="frames at a time")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args()
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    check_folder(args.out, "out")
    device = choose_device(args.device)
    size, flip = (args.size, args.size), not args.no_flip
    if args.frames is not None:
        dataset = VideoFolder(args.root, (args.frames, *size), classes=args.classes, flip=flip)
    else:
        dataset = (ClassFolder if args.classes else ImageFolder)(args.root, size, flip=flip)
    autoencoder = latents.load_autoencoder(args.autoencoder).to(device)
    skipped = latents.cache_latents(dataset, autoencoder, args.out, batch_size=args.batch_size)
    if skipped:
        print(f"{len(skipped)} items were left out, first {skipped[0]}", file=sys.stderr)
    found = latents.LatentShards(args.out)
    print(f"{args.out}: {len(found)} items of {found.channels} x {' x '.join(map(str, found.size))}")


if __name__ == "__main__":
    run(main)
