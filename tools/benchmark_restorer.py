#!/usr/bin/env python
"""Parameters, multiply-accumulates (the scan counted), milliseconds and peak memory of Serpent and its baselines.

    python tools/benchmark_restorer.py --device cuda --csv restorers.csv
    python tools/benchmark_restorer.py --device cpu --size 128 256 --networks serpent_t serpent_s
    python tools/benchmark_restorer.py --device cpu --size 1024 2048 --once           (minutes)

Untrained networks restore one square picture in inference mode, under bfloat16 autocast on a GPU and in float32 on a
CPU; medians of repeated calls. Memory is the most that is allocated (on a CPU: resident) beyond weights and picture.
The exponents p are those of pixels^p fitted (least squares of logarithms) to time and memory from 512 pixels a side on,
where there are two such sizes: 1 is linear in pixels. After them come the first network's time and memory in shares of
the others'. --train adds a training step (forward and backward) on pictures
of 256 pixels. A size that does not fit is a row "out of memory".
"""

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mambavision.backbones.conv_unet import conv_unet
from mambavision.backbones.dncnn import dncnn
from mambavision.backbones.serpent import serpent_b, serpent_l, serpent_s, serpent_t
from mambavision.backbones.window_transformer import window_transformer
from mambavision.engine import cli
from mambavision.engine.files import atomic_path, check_file
from mambavision.engine.flops import count_macs
from mambavision.engine.memory import measure_peak

NETWORKS = {f.__name__: f for f in (serpent_s, window_transformer, conv_unet, dncnn, serpent_t, serpent_b, serpent_l)}
DEFAULT = ("serpent_s", "window_transformer", "conv_unet", "dncnn")
COLUMNS = ("network", "parameters", "MACs/pixel", "what", "side", "ms", "MB", "device")
FEWEST = 3  # calls that are timed


def measure(call: Callable[[], object], device: torch.device, seconds: float | None) -> tuple[float, float]:
    """Median milliseconds of a call and the most MB it holds beyond what was there (NaN where nothing tells).

    Calls are timed for so many seconds, or the one alone whose memory is measured.
    """
    gpu, times = device.type == "cuda", []

    def timed() -> None:
        before = time.perf_counter()
        call()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)

    if gpu:
        timed()  # kernels are compiled
    times.clear()
    peak = measure_peak(timed, device)
    if seconds is not None:
        times.clear()
        while len(times) < FEWEST or sum(times) < seconds:
            timed()
    return 1e3 * statistics.median(times), math.nan if peak is None else peak / 1e6


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def restore(net: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode(), autocast(x.device):
        return net(x)


def train(net: nn.Module, x: Tensor) -> None:
    with autocast(x.device):
        loss = net(x).float().square().mean()
    torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])


def exponent(sides: Sequence[int], values: Sequence[float]) -> float:
    """p of values ~ (side^2)^p, by least squares of logarithms; NaN with fewer than two positive values."""
    points = [(2 * math.log(side), math.log(v)) for side, v in zip(sides, values, strict=True) if v > 0]
    if len(points) < 2:
        return math.nan
    mx, my = (statistics.fmean(v) for v in zip(*points, strict=True))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=DEFAULT)
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512, 1024, 2048], help="sides, pixels")
    parser.add_argument("--channels", type=int, choices=[1, 3], default=3)
    parser.add_argument("--scale", type=int, choices=[1, 2, 3, 4, 8], default=1)
    parser.add_argument("--train", type=int, metavar="BATCH", help="also time training steps of so many pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each figure")
    parser.add_argument("--once", action="store_true", help="time a single call instead")
    parser.add_argument("--csv", help="also write the figures to this file")
    args = parser.parse_args()
    if args.csv:
        check_file(args.csv, "--csv")
    if min(args.size) < 8 or (args.train is not None and args.train < 1) or args.seconds < 0:
        raise ValueError("--size takes 8 pixels or more, --train 1 picture or more, --seconds 0 or more")
    args.device = cli.choose_device(args.device)
    if args.device.type == "cpu":
        torch.set_num_threads(2)
    hardware = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU, 2 threads"
    rows, fits = [], []
    for name in args.networks:
        torch.manual_seed(0)
        net = NETWORKS[name](args.channels, scale=args.scale)
        about = (name, sum(p.numel() for p in net.parameters()), count_macs(net, (64, 64)) // 64**2)
        net.to(args.device)
        cases = [(partial(restore, net.eval()), "restore", 1, side) for side in args.size]
        if args.train:
            cases.append((partial(train, net), "training step", args.train, 256))
        found = []
        for run, what, batch, side in cases:
            net.train(what != "restore")
            try:
                x = torch.rand(batch, args.channels, side, side, device=args.device)
                ms, peak = measure(partial(run, x), args.device, None if args.once else args.seconds)
            except torch.OutOfMemoryError:
                ms = peak = math.inf
                torch.cuda.empty_cache()
            rows.append((*about, what, side, ms, peak, hardware))
            if what == "restore" and side >= 512 and ms < math.inf:
                found.append((side, ms, peak))
        sides, times, peaks = zip(*found, strict=True) if found else ((), (), ())
        fits.append((name, exponent(sides, times), exponent(sides, peaks)))
    report(rows, fits, hardware)
    if args.csv:
        with atomic_path(args.csv) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


def report(rows: Sequence[tuple], fits: Sequence[tuple[str, float, float]], hardware: str) -> None:
    table = Table("network", "params M", "kMACs/pixel", "what", "side", "ms", "peak MB", title=hardware)
    for name, parameters, macs, what, side, ms, peak, _ in rows:
        figures = ("out of memory", "") if ms == math.inf else (f"{ms:.2f}", "-" if math.isnan(peak) else f"{peak:.0f}")
        table.add_row(name, f"{parameters / 1e6:.3f}", f"{macs / 1e3:.0f}", what, str(side), *figures)
    console = Console(width=120)
    console.print(table)
    for name, time_exponent, memory_exponent in fits:
        if not math.isnan(time_exponent):
            console.print(f"{name}: time ~ pixels^{time_exponent:.2f}, memory ~ pixels^{memory_exponent:.2f}")
    measured = {(name, what, side): (ms, peak) for name, _, _, what, side, ms, peak, _ in rows if ms < math.inf}
    first = rows[0][0]
    for (name, what, side), (ms, peak) in measured.items():
        if name != first and (first, what, side) in measured:
            own, own_peak = measured[first, what, side]
            console.print(
                f"{first} / {name}, {what} {side}: {own / ms:.3f} of the time, {own_peak / peak:.3f} of the memory"
            )


if __name__ == "__main__":
    cli.run(main)
