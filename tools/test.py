#!/usr/bin/env python
"""Evaluate a checkpoint on a config's test set.

    python tools/test.py configs/mamba_yolo/mamba_yolo_t_bccd.py work_dirs/mamba_yolo_t_bccd/epoch_100.pth
    python tools/test.py configs/mamba_yolo/mamba_yolo_t_1xb32_voc0712.py x.pth --data-root VOCdevkit --out voc.json
    python tools/test.py configs/dim/dim_s_2x_cifar10.py work_dirs/dim_s_2x_cifar10/iter_10000.pth
    python tools/test.py configs/serpent/serpent_s_denoise_gray.py weights/serpent_s_denoise_gray.safetensors

Prints the metrics of the config's evaluator: COCO AP or VOC AP, in 0..1; PSNR in dB and SSIM of each test set, with a
line a photo in test.csv of the work directory; or the loss of a diffusion model on held-out pictures, with noise and
times that are the same for every network.
"""

import argparse
import json

from mmengine.dist import is_main_process
from rich.console import Console
from rich.table import Table

from mambavision.detection import cli as detection
from mambavision.diffusion import runs as diffusion
from mambavision.engine import runs
from mambavision.engine.cli import run
from mambavision.engine.files import atomic_path, check_file
from mambavision.restoration import runs as restoration


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_config_arguments(parser)
    detection.add_data_arguments(parser)
    parser.add_argument("checkpoint", help="checkpoint (.pth) or published weights (.safetensors)")
    parser.add_argument("--out", help="JSON file to write the metrics to")
    args = parser.parse_args()
    if args.out:
        check_file(args.out, "--out")
    task = {"detection": detection, "restoration": restoration, "diffusion": diffusion}[runs.task_of(args)]
    metrics = {name: float(value) for name, value in task.test(task.load_config(args), args.checkpoint).items()}
    if not is_main_process():
        return
    table = Table("metric", "value", title=args.checkpoint)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    if args.out:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
