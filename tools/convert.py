#!/usr/bin/env python
"""Convert an official Mamba-YOLO checkpoint to a weights file that `tools/detect.py --weights` takes.

    python tools/convert.py mamba_yolo_t.pth mamba_yolo_t.safetensors

IN holds plain tensors under the official names. A checkpoint of the official trainer holds a pickled model instead,
which could run code and is refused; where the official code is installed, write its state dict first:

    torch.save(torch.load("best.pt")["model"].float().state_dict(), "mamba_yolo_t.pth")
"""

import argparse
from pathlib import Path

from mambavision.detection.convert import from_official, identify, unwrap
from mambavision.detection.weights import save_weights
from mambavision.engine import checkpoint
from mambavision.engine.cli import run
from mambavision.engine.files import check_file


def main() -> None:
    """Read IN, write OUT; wrong input raises ValueError or OSError before anything is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="IN", help="official state dict: a .pth or .pt file of plain tensors")
    parser.add_argument("output", metavar="OUT", help="file to write, *.safetensors")
    parser.add_argument("--classes", help="text file with one class name a line (default: COCO's for 80 classes)")
    parser.add_argument("--input-size", type=int, default=640, help="side of the network input in pixels (default 640)")
    args = parser.parse_args()
    check_file(args.output, "OUT")

    lines = Path(args.classes).read_text().splitlines() if args.classes else []
    classes = [line.strip() for line in lines if line.strip()] or None
    state = unwrap(checkpoint.load(args.input))
    detector = from_official(state, classes=classes)
    size, variant, count = identify(state)
    names = detector.dataset_meta["classes"]
    extra = {"source": f"converted from {Path(args.input).name}"}
    save_weights(
        detector, args.output, size=size, variant=variant, classes=names, input_size=args.input_size, extra=extra
    )
    print(f"{args.output}: Mamba-YOLO-{size.upper()} ({variant}), {count} classes: {', '.join(names[:3])}, ...")


if __name__ == "__main__":
    run(main)
