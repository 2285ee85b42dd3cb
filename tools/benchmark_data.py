#!/usr/bin/env python
"""Time a config's training data on one core: pictures a second, decoding and augmentation included.

    python tools/benchmark_data.py configs/mamba_yolo/mamba_yolo_t_bccd.py
    python tools/benchmark_data.py configs/mamba_yolo/mamba_yolo_t_bccd.py --cfg-options \\
        train_dataloader.dataset.cache=none train_dataloader.dataset.pipeline.0.size=640
"""

import argparse
import time

import cv2
import numpy as np
import torch
from mmengine.registry import DATASETS, init_default_scope

from mambavision.detection.cli import add_data_arguments, load_config
from mambavision.engine.cli import run
from mambavision.engine.runs import add_config_arguments


def main() -> None:
    """Print the time to build the data set and the rate over --count pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--count", type=int, default=300, help="pictures to make (default 300)")
    args = parser.parse_args()
    cfg = load_config(args)
    init_default_scope("mmdet")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    np.random.seed(0)
    start = time.perf_counter()
    data = DATASETS.build(cfg.train_dataloader.dataset)
    built = time.perf_counter() - start
    for i in range(10):
        data[i % len(data)]
    wall, busy = time.perf_counter(), time.process_time()
    for i in range(args.count):
        data[i % len(data)]
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    print(
        f"built in {built:.2f} s; {args.count} pictures: {args.count / wall:.0f} a second, "
        f"{args.count / busy:.0f} a second of processor time"
    )


if __name__ == "__main__":
    run(main)
