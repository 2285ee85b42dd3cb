#!/usr/bin/env python
"""Parameters, FLOPs (the scan counted), images per second and peak memory of the detectors of some configs.

    python tools/benchmark_detector.py configs/mamba_yolo/mamba_yolo_t_bccd.py configs/rtmdet/rtmdet_tiny_bccd.py \\
        --size 320 --batch 1 32 --device cuda

Each detector gets random weights and random pictures; a time covers the network and the decoding to boxes with NMS
at score 0.3. Medians of repeated calls.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table

import mambavision.detection  # noqa: F401  registers the detectors
from mambavision.engine import cli
from mambavision.engine.flops import count_flops

WARM_UP = 4  # calls: kernels are compiled, CUDA graphs recorded


def build(config: str) -> BaseModel:
    if not Path(config).is_file():
        raise FileNotFoundError(f"no config at {config}")
    settings = Config.fromfile(config)
    init_default_scope(settings.get("default_scope", "mmdet"))
    model = MODELS.build(settings.model).eval()
    (model.bbox_head if hasattr(model, "bbox_head") else model).test_cfg.score_thr = 0.3
    return model


@torch.inference_mode()
def images_per_second(model: BaseModel, size: int, batch: int, device: torch.device, seconds: float) -> float:
    pictures = torch.rand(batch, 3, size, size, device=device)
    meta = dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1.0, 1.0), batch_input_shape=(size, size))

    def call() -> float:
        samples = [DetDataSample(metainfo=meta) for _ in range(batch)]
        before = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            model.predict(pictures, samples)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - before

    for _ in range(WARM_UP):
        call()
    times, started = [call()], time.perf_counter()
    while time.perf_counter() - started < seconds:
        times.append(call())
    return batch / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--size", type=int, default=640, help="side of the square input, pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each figure")
    args = parser.parse_args()
    args.device = cli.choose_device(args.device)
    if args.device.type == "cpu":
        torch.set_num_threads(2)
    table = Table("config", "params M", "GFLOPs", *(f"images/s, batch {b}" for b in args.batch), "peak GB")
    for config in args.configs:
        model = build(config)
        row = [Path(config).stem, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"]
        picture = torch.zeros(1, 3, args.size, args.size)
        row.append(f"{count_flops(partial(model, picture, mode='tensor')) / 1e9:.2f}")
        model.to(args.device)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row += [f"{images_per_second(model, args.size, b, args.device, args.seconds):.1f}" for b in args.batch]
        row.append(f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if args.device.type == "cuda" else "-")
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    cli.run(main)
