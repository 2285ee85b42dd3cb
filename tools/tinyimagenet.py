#!/usr/bin/env python
"""Tiny-ImageNet-200 as arrays to train from (pack), or as lossless shards to carry to another machine."""

import argparse

from mambavision.detection.tinyimagenet_pack import pack, shard, unpack
from mambavision.engine.cli import run

COMMANDS = {
    "pack": (pack, "decode the distributed folder tiny-imagenet-200 into a pack folder"),
    "shard": (shard, "write the folder's photos, not re-encoded, into a few files of at most 45 MiB"),
    "unpack": (unpack, "decode such files into a pack folder, on all cores"),
}


def main() -> None:
    """Run one of COMMANDS; a folder that is not the data set raises DatasetError."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", help="folder to read")
        command.add_argument("out", help="folder to write")
    args = parser.parse_args()
    COMMANDS[args.command][0](args.source, args.out)


if __name__ == "__main__":
    run(main)
