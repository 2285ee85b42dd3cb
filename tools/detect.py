#!/usr/bin/env python
"""Detect objects in a photo, a folder of photos, a video or a webcam.

    python tools/detect.py photo.jpg --out-dir out
    python tools/detect.py photos/ --out-dir smears --weights weights/mamba_yolo_t_bccd.safetensors --score-thr 0.4
    python tools/detect.py clip.mp4 --out-dir film --config my_config.py --weights work_dirs/my_config/epoch_100.pth
    python tools/detect.py 0 --out-dir webcam       (webcam 0, until Ctrl-C)

Writes the annotated pictures, or video, and detections.json into the output folder. Boxes are xyxy in input pixels.
"""

import argparse
from pathlib import Path

from mambavision.detection import cli
from mambavision.detection.media import detect_photos, detect_video
from mambavision.engine.cli import run
from mambavision.engine.files import check_folder
from mambavision.engine.photos import find_photos
from mambavision.engine.video import is_video

DEFAULT_WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "mamba_yolo_t_tinyimagenet.safetensors"
DEFAULT_HELP = f"default: weights/{DEFAULT_WEIGHTS.name}, which finds few of its 200 classes on real photos"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="photo, folder of photos, video, or the number of a webcam")
    parser.add_argument("--out-dir", required=True, help="folder for the annotated pictures and detections.json")
    parser.add_argument("--config", help="config of the detector; needed for .pth checkpoints")
    parser.add_argument("--weights", default=DEFAULT_WEIGHTS, help=DEFAULT_HELP)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--score-thr", type=float, default=0.25, help="least score of a box (default: 0.25)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    args = parser.parse_args()

    check_folder(args.out_dir, "--out-dir")
    # look at the input before the weights: the quicker answer first
    video = int(args.input) if args.input.isdecimal() and not Path(args.input).exists() else args.input
    if isinstance(video, str) and not is_video(video):
        photos, video = find_photos(video, exclude=args.out_dir), None
    inferencer = cli.load_inferencer(args.config, args.weights, device=args.device, score_thr=args.score_thr)
    if video is None:
        detect_photos(inferencer, photos, args.out_dir, overwrite=args.overwrite)
    else:
        detect_video(inferencer, video, args.out_dir, overwrite=args.overwrite)


if __name__ == "__main__":
    run(main)
