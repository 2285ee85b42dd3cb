#!/usr/bin/env python
"""Restore photos and videos: denoise, deblur, enlarge, remove JPEG artefacts.

    python tools/restore.py photo.jpg                                    (noise of unknown strength; to restored/)
    python tools/restore.py photos/ -o clean/ --side-by-side             (a folder and its subfolders)
    python tools/restore.py "scans/*.tif" -o clean/ --sigma 25           (noise of standard deviation 25 of 255)
    python tools/restore.py small.png -o large.png --task sr_x4
    python tools/restore.py torn.png -o whole.png --task inpaint --weights w.safetensors --mask tears.png
    python tools/restore.py clip.mp4 -o clean.mp4 --device cuda --precision bf16

Files keep their type, bits, transparency and colour profile; JPEG is written at quality 95, GIF and other kinds become
PNG. Gray photos are restored by the weights for gray of the same task. Pictures of any size are restored in overlapping
tiles as memory allows. Videos are written as mp4 without sound.
"""

import argparse

import cv2

from mambavision.engine.cli import run
from mambavision.engine.memory import keep_freed_memory
from mambavision.restoration import cli
from mambavision.restoration.inferencer import OVERLAP, TASKS, RestorationInferencer
from mambavision.restoration.tiles import MIN_TILE


def tile_side(text: str) -> str | int:
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of pixels")
    return text if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="photo, video, folder of photos, or glob pattern")
    out_help = "file to write, or folder where there are several (default: restored/)"
    parser.add_argument("-o", "--out", default="restored/", help=out_help)
    parser.add_argument("--task", choices=TASKS, help="default: that of --weights, or denoise_color")
    parser.add_argument("--weights", help="weights file (default: the largest network's of the task in weights/)")
    parser.add_argument("--sigma", type=float, help="noise level in units of 1/255, for weights that take it")
    mask_help = "for inpaint: photo that is white where to fill, or a folder of them with the inputs' names"
    parser.add_argument("--mask", help=mask_help)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    tile_help = f"largest side of a tile in pixels, at least {MIN_TILE}; 0: no tiles; default: auto, as memory allows"
    parser.add_argument("--tile", type=tile_side, default="auto", help=tile_help)
    parser.add_argument("--overlap", type=int, default=OVERLAP, help=f"of tiles, pixels (default: {OVERLAP})")
    parser.add_argument("--self-ensemble", action="store_true", help="average 8 rotations and flips: 8 times slower")
    luminance_help = "denoise_color: denoise luminance twice, for noise that the channels share; 2 times slower"
    parser.add_argument("--luminance", action="store_true", help=luminance_help)
    parser.add_argument("--side-by-side", action="store_true", help="write *_before_after pictures too")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    args = parser.parse_args()

    keep_freed_memory()
    # what is wrong with a file is said in our one line
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    jobs = cli.plan(args.inputs, args.out, args.mask)  # before the weights: the quicker answer first
    inferencer = RestorationInferencer(
        args.task, weights=args.weights, device=args.device, sigma=args.sigma, tile=args.tile, overlap=args.overlap,
        precision=args.precision, self_ensemble=args.self_ensemble, luminance=args.luminance,
    )  # fmt: skip
    cli.restore_files(inferencer, jobs, compare=args.side_by_side, overwrite=args.overwrite)


if __name__ == "__main__":
    run(main)
