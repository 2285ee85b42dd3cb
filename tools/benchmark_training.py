#!/usr/bin/env python
"""Measure training steps of a restoration or diffusion config: eager and through CUDA graphs.

    python tools/benchmark_training.py configs/serpent/serpent_s_denoise_gray25.py --amp bf16
    python tools/benchmark_training.py configs/dim/dim_t_cifar10.py --amp bf16

The real loop, data and optimiser, without validation and checkpoints; the second half of the iterations is timed.
"""

import argparse
import copy
import statistics
import tempfile
import time

import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import HOOKS
from mmengine.visualization import Visualizer
from rich.console import Console
from rich.table import Table

from mambavision.diffusion import runs as diffusion
from mambavision.engine import runs
from mambavision.engine.cli import run
from mambavision.restoration import runs as restoration


@HOOKS.register_module(force=True)
class Stopwatch(Hook):
    """Seconds that the second half of a training takes."""

    priority = "VERY_LOW"

    def __init__(self, first: int) -> None:
        self.first = first

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Look at the clock once before the first timed iteration, and after the last."""
        if batch_idx + 1 in (self.first, runner.max_iters):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.start, self.seconds = time.perf_counter(), time.perf_counter() - getattr(self, "start", 0)


def measure(task, cfg, iters: int, amp: str | None, graphs: bool) -> list[str]:
    """A row of the table."""
    cfg = copy.deepcopy(cfg)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_cfg.max_iters, cfg.param_scheduler = iters, None  # a schedule may not fit so few iterations
    cfg.default_hooks.checkpoint = cfg.default_hooks.logger = None  # mmengine's logger sets the peak of memory back
    cfg.log_level = "ERROR"
    kept = ("EMAHook", "CudaGraphHook") if graphs else ("EMAHook",)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type in kept]
    cfg.custom_hooks.append(dict(type="Stopwatch", first=iters // 2))
    for named in (MMLogger, MessageHub, Visualizer):  # or a second run would go on in the first one's
        named._instance_dict.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = task.train(cfg, amp=amp, seed=0)
    (watch,) = (hook for hook in runner.hooks if isinstance(hook, Stopwatch))
    timed = iters - iters // 2
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    gigabytes = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    figures = timed / watch.seconds, watch.seconds / timed * 1e3, gigabytes, statistics.mean(losses[-20:])
    return [f"{value:{form}}" for value, form in zip(figures, (".1f", ".2f", ".2f", ".5f"), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_config_arguments(parser)
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("--amp", choices=["bf16"])
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table("step", "iterations/s", "ms", "peak GB", "loss of the last 20", title=f"{args.config}, {device}")
    tasks = {"restoration": restoration, "diffusion": diffusion}
    if (name := runs.task_of(args)) not in tasks:
        raise ValueError(f"{args.config} is for {name}: tools/benchmark_detector.py measures detectors")
    task = tasks[name]
    for graphs in (True, False) if torch.cuda.is_available() else (False,):
        row = measure(task, task.load_config(args), args.iters, args.amp, graphs)
        print("CUDA graph" if graphs else "eager", *row, flush=True)  # what is known, should the next one not end
        table.add_row("CUDA graph" if graphs else "eager", *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    run(main)
