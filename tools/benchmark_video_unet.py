"""Throughput and peak memory of the temporal layers of VideoUNet against the number of frames; on an NVIDIA GPU or CPU.

    python tools/benchmark_video_unet.py --out-dir runs/video_unet

Times a forward pass and a training step (forward, backward) of the U-Net, and of one temporal layer alone at its first
level, under bfloat16 autocast; on a GPU as CUDA graphs, without the host's time, where these fit the memory. Prints
tables, and for each layer two fits to the longest three lengths: the exponent p of time or memory ~ frames^p, and the
share of the squared term of a frames + b frames^2 at the longest; writes frames.csv and frames.png. Calls that were
launched one by one, by a host that may be slower than the GPU, are marked by a star, in the picture by a hollow point.
What is in frames.csv already is not measured again.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mambavision.backbones import video_unet
from mambavision.backbones.video_unet import OverFrames, Temporal
from mambavision.engine.cli import choose_device, run
from mambavision.engine.files import atomic_path
from mambavision.engine.memory import free_memory, is_out_of_memory

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tools/bench, from whatever folder this is run
from bench.timing import Graph, allocated_mb, in_turn, sample

SIZES = {size: getattr(video_unet, f"video_unet_{size}") for size in ("t", "s", "b", "l", "debug")}
PARTS = ("U-Net", "layer")
ROOM = 1.2  # a CUDA graph keeps memory of its own: so much more than a call must be free


class Line(NamedTuple):
    """One measurement: of a forward pass or training step of the U-Net or the layer; memory beyond the inputs.

    ``how`` is "graph" or "eager": launched one by one, by a host that may be slower than the GPU.
    """

    device: str
    part: str
    temporal: str
    frames: int
    batch: int
    call: str
    ms: float
    clips_per_s: float
    memory_mb: float | None
    how: str


def forward(net: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad(), torch.autocast(arguments[0].device.type, torch.bfloat16):
        return net(*arguments)


def training_step(net: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.autocast(arguments[0].device.type, torch.bfloat16):
        loss = net(*arguments).float().square().mean()
    return list(torch.autograd.grad(loss, list(net.parameters())))


CALLS = {"forward": forward, "training step": training_step}


def milliseconds(
    call: Callable[[], object], device: torch.device, budget_s: float, memory_mb: float | None
) -> tuple[float, str]:
    """Of a call, and how it was timed, as in :class:`Line`."""
    if device.type == "cpu":
        return in_turn({"": call}, "cpu", budget_s)[""].median, "eager"
    torch.cuda.empty_cache()
    if free_memory(device) < ROOM * memory_mb * 1e6:
        return sample(call, "cuda", 3), "eager"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.empty_cache()
    return in_turn({"": Graph(call, stream)}, "cuda", budget_s)[""].median, "graph"


class Biased(nn.Module):
    """A temporal layer with the bias of the U-Net around it."""

    def __init__(self, layer: OverFrames, bias: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.bias is None else self.layer(x, self.bias(x.shape[1]))


def build(
    args: argparse.Namespace, part: str, temporal: str, frames: int, device: torch.device
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The U-Net or the layer, and the arguments of its call."""
    torch.manual_seed(0)
    with device:
        net = SIZES[args.size]((frames, args.side, args.side), in_channels=args.channels, temporal=temporal)
    if part == "layer":
        net, dim = Biased(net.init_temporal_layer.fn.fn, net.time_rel_pos_bias), net.config["dim"]
        return net, (torch.randn(args.batch, frames, args.side, args.side, dim, device=device),)
    clips = torch.randn(args.batch, args.channels, frames, args.side, args.side, device=device)
    return net, (clips, torch.rand(args.batch, device=device) * 1000)


def measure(call: Callable[[], object], device: torch.device, budget_s: float) -> tuple[float, float | None, str]:
    """Milliseconds, peak memory in MB and how it was timed."""
    call()  # compiles what is compiled at first use
    memory = allocated_mb(call) if device.type == "cuda" else None
    ms, how = milliseconds(call, device, budget_s, memory)
    return ms, memory, how


def exponent(frames: list[int], values: list[float]) -> float:
    """p of values ~ frames^p by least squares over the longest three lengths."""
    return float(np.polyfit(np.log(frames[-3:]), np.log(values[-3:]), 1)[0])


def squared_share(frames: list[int], values: list[float]) -> float:
    """Share of b frames^2 at the longest, of the fit a frames + b frames^2 to the longest three lengths."""
    powers = np.power.outer(np.array(frames[-3:], float), [1, 2])
    fit = np.linalg.lstsq(powers / np.array(values[-3:])[:, None], np.ones(len(powers)), rcond=None)[0]
    return float(fit[1] * powers[-1, 1] / (fit @ powers[-1]))


def read(path: Path) -> list[Line]:
    """The lines of a file of :func:`write`, none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = csv.reader(file)
        if tuple(next(rows, ())) != Line._fields:
            raise ValueError(f"{path} is no CSV of this tool: its first line is not {','.join(Line._fields)}")
        return [
            Line(*r[:3], *map(int, r[3:5]), r[5], *map(float, r[6:8]), float(r[8]) if r[8] else None, r[9])
            for r in rows
        ]


def table(lines: list[Line], part: str, call: str, figure: str) -> list[str]:
    """Rows of layers, columns of frames, and the two fits of time (for clips/s) or memory; "*": launched eagerly."""
    chosen = [line for line in lines if (line.part, line.call) == (part, call) and getattr(line, figure) is not None]
    if not chosen:
        return []
    lengths = sorted({line.frames for line in chosen})
    unit = {"clips_per_s": "clips/s", "memory_mb": "peak memory, MB"}[figure]
    rows = [f"| {part}, {call}: {unit} | {' | '.join(map(str, lengths))} | exponent | squared |"]
    rows.append("|---" * (len(lengths) + 3) + "|")
    for temporal in dict.fromkeys(line.temporal for line in chosen):
        own = {line.frames: line for line in chosen if line.temporal == temporal}
        slow = {n for n, v in own.items() if figure == "clips_per_s" and v.device != "cpu" and v.how == "eager"}
        cells = [f"{getattr(own[n], figure):.4g}{'*' * (n in slow)}" if n in own else "-" for n in lengths]
        costs = [own[n].memory_mb if figure == "memory_mb" else own[n].ms for n in sorted(own)]
        fits = ["-", "-"]
        if len(own) > 2:
            fits = [f"{exponent(sorted(own), costs):.2f}", f"{max(squared_share(sorted(own), costs), 0):.0%}"]
        rows.append(f"| {temporal} | {' | '.join([*cells, *fits])} |")
    return rows


def plot(lines: list[Line], path: Path) -> None:
    """Time of a training step, and its peak memory, against frames, for the U-Net and the layer alone."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    parts = list(dict.fromkeys(line.part for line in lines))
    colours = {temporal: f"C{i}" for i, temporal in enumerate(get_args(Temporal))}
    figure, axes = pyplot.subplots(len(parts), 2, figsize=(10, 4 * len(parts)), squeeze=False, constrained_layout=True)
    for row, part in zip(axes, parts, strict=True):
        for axis, what in zip(row, ("ms", "memory_mb"), strict=True):
            chosen = [v for v in lines if (v.part, v.call) == (part, "training step") and getattr(v, what) is not None]
            curves = {
                temporal: sorted((v.frames, getattr(v, what) / v.batch) for v in chosen if v.temporal == temporal)
                for temporal in dict.fromkeys(v.temporal for v in chosen)
            }
            for temporal, points in curves.items():
                axis.plot(*zip(*points, strict=True), marker="o", color=colours[temporal], label=temporal)
                slow = [v for v in chosen if (v.temporal, v.how) == (temporal, "eager") and v.device != "cpu"]
                if what == "ms" and slow:
                    axis.plot(
                        [v.frames for v in slow], [v.ms / v.batch for v in slow], "o", color=colours[temporal],
                        markerfacecolor="white", zorder=3,
                    )  # fmt: skip
            lengths = np.array(sorted({v.frames for v in chosen}))
            low = min((points[0][1] for points in curves.values()), default=0) / 2
            for p, style in ((1, ":"), (2, "--")) if curves else ():
                curve = low * (lengths / lengths[0]) ** p
                axis.plot(lengths, curve, style, color="gray", linewidth=1, label=f"~ frames^{p}")
            axis.set(xscale="log", yscale="log", xlabel="frames", title=f"{part}, training step")
            axis.set_ylabel("ms a clip" if what == "ms" else "peak memory, MB a clip")
            axis.set_xticks(lengths)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        row[0].legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    pyplot.close(figure)


def write(lines: list[Line], path: Path) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(Line._fields)
        rows.writerows(
            tuple("" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in row) for row in lines
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out-dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="b")
    default = ["bi_s4d", "bi_s6", "attention", "rotary_attention", "linear_attention"]
    parser.add_argument("--temporal", nargs="+", choices=get_args(Temporal), default=default)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 32, 64, 128, 200, 400])
    parser.add_argument("--side", type=int, default=32, help="of a square frame, pixels")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2, help="clips")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds to time a call")
    parser.add_argument("--device")
    args = parser.parse_args()
    if min(*args.frames, args.batch, args.channels) < 1:
        raise ValueError("--frames, --batch and --channels must be at least 1")
    device = choose_device(args.device)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    lines = read(args.out_dir / "frames.csv")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for part in args.parts:
        for frames in sorted(args.frames):
            for temporal in args.temporal:
                this = (part, temporal, frames, args.batch)
                known = {v.call for v in lines if (v.part, v.temporal, v.frames, v.batch) == this}
                if known == set(CALLS):
                    continue
                if lines and lines[0].device != name:
                    raise ValueError(
                        f"{args.out_dir}/frames.csv holds measurements of {lines[0].device}, this is {name}: "
                        "name another --out-dir"
                    )
                net, arguments = build(args, part, temporal, frames, device)
                for call in (call for call in CALLS if call not in known):
                    what = f"{part}, {temporal}, {frames} frames, {call}"
                    try:
                        ms, mb, how = measure(partial(CALLS[call], net, arguments), device, args.budget)
                    except RuntimeError as error:
                        if not is_out_of_memory(error):
                            raise
                        print(f"{what}: out of memory", flush=True)
                        continue
                    print(f"{what}: {ms:.2f} ms{'' if mb is None else f', {mb:.0f} MB'}", flush=True)
                    rate = args.batch / ms * 1e3
                    lines.append(Line(name, part, temporal, frames, args.batch, call, ms, rate, mb, how))
                    write(lines, args.out_dir / "frames.csv")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    plot(lines, args.out_dir / "frames.png")
    print(f"{lines[0].device if lines else name}, torch {torch.__version__}, {args.batch} clips of size {args.size}")
    for part in args.parts:
        for call in CALLS:
            for figure in ("clips_per_s", "memory_mb"):
                print("\n".join(["", *table(lines, part, call, figure)]))


if __name__ == "__main__":
    run(main)
