#!/usr/bin/env python
"""Write a detector or a restoration network as ONNX, or as a program of torch.export.

    python tools/export.py yolo.onnx --weights weights/mamba_yolo_t_bccd.safetensors
    python tools/export.py denoise.onnx --weights weights/serpent_s_denoise_color.safetensors --size 256 256 --batch 1
    python tools/export.py mine.pt2 --weights work_dirs/mine/epoch_100.pth --config my_config.py

ONNX holds standard operators alone; *.pt2 holds ours, for torch.export.load after `import mambavision.ops`.
The file is run once and compared with the network before it is kept.
"""

import argparse
import time
from pathlib import Path

import torch

from mambavision.detection import export as detection
from mambavision.engine import runs
from mambavision.engine.cli import run
from mambavision.engine.export import Exportable, check_target, export
from mambavision.engine.weights import read_metadata
from mambavision.restoration import export as restoration


def load(args: argparse.Namespace) -> Exportable:
    """The network that the arguments name; raises ValueError where its kind is not exported."""
    if not Path(args.weights).is_file():
        raise FileNotFoundError(f"no weights at {args.weights}; name a file with --weights")
    if args.config is None and Path(args.weights).suffix != ".safetensors":
        raise ValueError(f"{args.weights} does not say what network it is of: pass its --config too")
    task = runs.task_of(args) if args.config else read_metadata(args.weights, ["task"])["task"]
    if task in ("diffusion", "features"):
        raise ValueError(f"{args.config or args.weights}: detectors and restoration networks are exported, not {task}")
    return (detection if task == "detection" else restoration).exportable(args.weights, args.config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", help="file to write, *.onnx or *.pt2")
    parser.add_argument("--weights", required=True, help="published weights, or a checkpoint with its --config")
    parser.add_argument("--config", help="config that a checkpoint was trained by")
    size_help = "height and width of the pictures (default: any multiples of 32 for detectors, of a stride else)"
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help=size_help)
    parser.add_argument("--batch", type=int, metavar="N", help="pictures at a time (default: any number)")
    args = parser.parse_args()

    check_target(args.out)
    what = load(args)
    started = time.perf_counter()
    found = export(what, args.out, size=args.size and tuple(args.size), batch=args.batch)
    seconds, megabytes = time.perf_counter() - started, Path(args.out).stat().st_size / 1e6
    names = f"{' and '.join(what.inputs)} to {' and '.join(what.outputs)}"
    print(f"{args.out}: {names}, {megabytes:.1f} MB, exported and compared in {seconds:.0f} s")
    print(f"largest difference to the network: {found.difference:.1e} of the largest value")
    batch, height, width = found.shape
    times = f"{1e3 * found.seconds:.0f} ms, the network {1e3 * found.network_seconds:.0f} ms"
    threads = torch.get_num_threads()
    print(f"{batch} of {height}x{width} pixels on {threads} CPU thread{'s' * (threads > 1)}: {times}")


if __name__ == "__main__":
    run(main)
