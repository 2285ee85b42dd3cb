"""Time the selective scan of every backend against the plain Python-loop reference, in one run and in turn.

    python tools/benchmark.py ops                     # the 2-core table of the README
    python tools/benchmark.py ops --device cuda       # on a GPU, mamba_ssm's CUDA extension too where it is installed

A backend whose outputs or gradients do not match the float64 reference is not timed.
"""

import argparse
import csv
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mambavision.ops import Backend, describe_backends, multi_scan, selective_scan

ROUNDS = 5
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


class Shape(NamedTuple):
    """One selective scan: batch, channels, tokens, states, and groups of B and C."""

    B: int
    D: int
    L: int
    N: int
    G: int = 1


CPU_SHAPES = (Shape(1, 384, 196, 16), Shape(1, 256, 1600, 16), Shape(1, 96, 16384, 16))
CUDA_SHAPES = (
    Shape(64, 192 * 4, 3136, 1, 4),
    Shape(16, 128 * 4, 25600, 16, 4),
    Shape(16, 256 * 4, 6400, 16, 4),
    Shape(1, 512 * 4, 400, 16, 4),
    Shape(64, 2304, 256, 16),
    Shape(8, 2304, 4096, 16),
)


def inputs(s: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Random u, delta, A, B, C, D and delta_bias with the spread of a trained network."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    u, delta = normal(s.B, s.D, s.L), 0.5 * normal(s.B, s.D, s.L) - 1
    A = -torch.rand(s.D, s.N, generator=g) * 4 - 0.1
    B, C = normal(s.B, s.G, s.N, s.L), normal(s.B, s.G, s.N, s.L)
    D, bias = normal(s.D), 0.1 * normal(s.D)
    typed = [v.to(device, dtype) for v in (u, delta, B, C)]
    kept = [v.to(device) for v in (A, D, bias)]
    return [typed[0], typed[1], kept[0], typed[2], typed[3], kept[1], kept[2]]


def ours(backend: Backend) -> Callable[..., Tensor]:
    return lambda u, dt, A, B, C, D, bias: selective_scan(
        u, dt, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend
    )


def ours_channels_last() -> Callable[..., Tensor]:
    """One group through multi_scan, whose own layout is channels-last."""

    def run(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        batch, channels, length = u.shape
        y = multi_scan(
            u.transpose(1, 2),
            dt.transpose(1, 2).view(batch, length, 1, channels),
            A[None], B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2), D[None],
            orders="unidirectional", grid=(1, length), delta_bias=bias[None],
        )  # fmt: skip
        return y.transpose(1, 2)

    return run


def mamba_ssm_cuda() -> Callable[..., Tensor] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # an extension built for another torch fails in many ways
        print(f"mamba_ssm is not timed: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
        return None
    return lambda u, dt, A, B, C, D, bias: selective_scan_fn(u, dt, A, B, C, D, None, bias, True)


def check(run: Callable[..., Tensor], device: str, dtype: torch.dtype, groups: int) -> str | None:
    """Compare output and gradients with the float64 reference at a small odd size: None, or what is wrong."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    arguments = inputs(Shape(2, 40 * groups, 203, 16, groups), device, dtype, seed=1)
    leaves = [v.detach().requires_grad_() for v in arguments]
    exact = [v.detach().double().cpu().requires_grad_() for v in arguments]
    y, y_exact = run(*leaves), ours("reference")(*exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(y, leaves, dy.to(y))
    grads_exact = torch.autograd.grad(y_exact, exact, dy.double())
    for name, got, want in zip(("y", *NAMES), (y, *grads), (y_exact, *grads_exact), strict=True):
        error = ((got.double().cpu() - want).norm() / want.norm()).item()
        if not error <= tolerance:
            return f"{name} is off by {error:.1e} (allowed {tolerance:.0e})"
    return None


def call_ms(run: Callable[[], object], device: str) -> float:
    """Time of one call in milliseconds: device events on a GPU, the wall clock on a CPU."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def medians_in_turn(runs: dict[str, Callable[[], object]], device: str, budget_s: float) -> dict[str, float]:
    """Median milliseconds a call, ``budget_s`` seconds each.

    They take turns, so that a slow minute of the machine is everybody's.
    """
    turn_s = budget_s / ROUNDS
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            first, started = call_ms(run, device), time.perf_counter()
            if first >= 1e3 * turn_s:  # too long a call to matter what the others left in the caches
                times[name].append(first)
                continue
            turn = [call_ms(run, device)]
            while time.perf_counter() - started < turn_s and len(turn) < 50:
                turn.append(call_ms(run, device))
            times[name] += turn
    return {name: statistics.median(values) for name, values in times.items()}


def time_shape(
    runs: dict[str, Callable[..., Tensor]], s: Shape, device: str, dtype: torch.dtype, budget_s: float
) -> dict[str, tuple[float, float]]:
    """Forward without gradients, and backward alone, of each implementation."""
    arguments = inputs(s, device, dtype)
    with torch.no_grad():
        forward = medians_in_turn({name: partial(run, *arguments) for name, run in runs.items()}, device, budget_s)
    leaves = [v.requires_grad_() for v in arguments]
    outputs = {name: run(*leaves) for name, run in runs.items()}
    dy = torch.randn_like(next(iter(outputs.values())))
    gradients = {name: partial(torch.autograd.grad, y, leaves, dy, retain_graph=True) for name, y in outputs.items()}
    backward = medians_in_turn(gradients, device, budget_s)
    return {name: (forward[name], backward[name]) for name in runs}


def serves(name: str, s: Shape, device: str) -> bool:
    """Whether an implementation is timed at a shape: chunked keeps all states, channels-last takes one group."""
    if name == "chunked" and device == "cuda":
        return s.B * s.D * s.L * s.N <= 2**28
    return s.G == 1 or "channels-last" not in name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ops"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds per figure")
    parser.add_argument("--csv", help="also write the figures to this file")
    args = parser.parse_args()
    if args.csv and not pathlib.Path(args.csv).parent.is_dir():
        print(f"benchmark: no folder to write {args.csv} to", file=sys.stderr)
        return 2
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmark: --device cuda needs an NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    on_cpu = args.device == "cpu"
    shapes = CPU_SHAPES if on_cpu else CUDA_SHAPES
    runs: dict[str, Callable[..., Tensor]] = {"reference": ours("reference")} if on_cpu else {}
    runs["chunked"] = ours("chunked")
    for backend in ("cpu",) if on_cpu else ("triton", "cuda"):
        runs[backend] = ours(backend)
    if not on_cpu:
        runs["cuda, channels-last"] = ours_channels_last()
        if (peer := mamba_ssm_cuda()) is not None:
            runs["mamba_ssm"] = peer
    for name in list(runs):
        groups = 1 if "channels-last" in name else 2
        if wrong := check(runs[name], args.device, dtype, groups):
            print(f"{name}: not timed, {wrong}", file=sys.stderr)
            del runs[name]

    print(describe_backends())
    base = "reference" if on_cpu else "mamba_ssm"
    rows = []
    for s in shapes:
        fitting = {name: run for name, run in runs.items() if serves(name, s, args.device)}
        figures = time_shape(fitting, s, args.device, dtype, args.budget)
        for name, (forward, backward) in figures.items():
            print(f"{tuple(s)} {name}: {forward:.3f} / {backward:.3f} ms", file=sys.stderr, flush=True)
            ratios = [f"{b / f:.1f}x" for b, f in zip(figures.get(base, ()), (forward, backward), strict=False)]
            rows.append([f"{tuple(s)}", name, f"{forward:.3f}", f"{backward:.3f}", *(ratios or ["-", "-"])])
    header = ["(B, D, L, N, G)", "implementation", "forward ms", "backward ms", f"fwd vs {base}", f"bwd vs {base}"]
    print(f"\n{args.device}, {dtype}, medians" + (f", {args.threads} threads" if on_cpu else ""))
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            csv.writer(f).writerows([header, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
