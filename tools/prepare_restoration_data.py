#!/usr/bin/env python
"""Gather the photos that restoration is trained and tested on from clones of the public repositories that hold them.

    git clone --depth 1 https://github.com/BIDS/BSDS500 clones/BSDS500      # one each; run without any to see the list
    python tools/prepare_restoration_data.py --mirror clones --out data/restoration

Counts are checked, and that no test photo is among the training photos.
"""

import argparse

from rich.console import Console
from rich.table import Table

from mambavision.engine.cli import run
from mambavision.restoration.photo_sets import PHOTO_SETS, prepare


def main() -> None:
    """Make the folders; a clone that is missing or not whole raises DatasetError before anything is written."""
    repositories = sorted({photo_set.repository for photo_set in PHOTO_SETS})
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="repositories: " + ", ".join(repositories),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mirror", required=True, help="folder with a clone of each repository, under its short name")
    parser.add_argument("--out", required=True, help="folder to make")
    args = parser.parse_args()
    table = Table("set", "photos", title=args.out)
    for folder, count in prepare(args.mirror, args.out).items():
        table.add_row(folder, str(count))
    Console().print(table)


if __name__ == "__main__":
    run(main)
