#!/usr/bin/env python
"""Gather the photos that restoration is trained and tested on from clones of the public repositories that hold them.

    for r in BIDS/BSDS500 tegg89/SRCNN-Tensorflow developer0hye/COCO128 MathLee/EOR-VOS cszn/FFDNet cszn/DnCNN \\
             majedelhelou/denoising_datasets JingyunLiang/SwinIR; do
        git clone --depth 1 https://github.com/$r clones/${r#*/}
    done
    python tools/prepare_restoration_data.py --mirror clones --out data/restoration

Training photos: bsd400 (BSDS500's train and test, but two that Set5 and Set12 were cut from), t91, coco128.
Validation photos, by which checkpoints are chosen: davis, 16 frames of videos.
Test photos: set12, bsd68, cbsd68, kodak24 (500x500), mcmaster, urban100, set5, set14, bsd100, classic5, live1; set5_lr
is MATLAB's bicubic. Counts are checked, and that no test photo is among the training photos.
"""

import argparse

from rich.console import Console
from rich.table import Table

from mambavision.engine.cli import run
from mambavision.restoration.photo_sets import prepare


def main() -> None:
    """Make the folders; a clone that is missing or not whole raises DatasetError before anything is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mirror", required=True, help="folder of the clones")
    parser.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args()
    table = Table("set", "photos", title=args.out)
    for folder, count in prepare(args.mirror, args.out).items():
        table.add_row(folder, str(count))
    Console().print(table)


if __name__ == "__main__":
    run(main)
