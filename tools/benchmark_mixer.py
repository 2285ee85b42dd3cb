"""What one mixer layer launches, and the SS2D core against the same computed on four permuted copies; on an NVIDIA GPU.

    python tools/benchmark_mixer.py kernels   # every kernel of SS2D and BiMambaMixer, forward and training step
    python tools/benchmark_mixer.py core      # times and memory of projections, K = 4 scans and their sum

`core` compares with the pipeline of published code: four permuted copies of x, projections of every copy, one scan of
4 D channels, inverse permutations and a sum. Its scan is mamba_ssm's where installed, else ours in its layout. Nothing
is timed before both pipelines agree.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers import SS2D, BiMambaMixer, LayerNorm2d, init_mamba_yolo
from mambavision.layers.ssm import init_mamba, ssm_scan
from mambavision.ops import selective_scan

ROUNDS, CALLS = 5, 5


class Core(NamedTuple):
    """One SS2D core: batch, grid, channels, states and rank."""

    B: int
    H: int
    W: int
    D: int
    N: int
    R: int


CORES = {
    "VMamba-T stage 1": Core(64, 56, 56, 192, 1, 6),
    "Mamba-YOLO P3": Core(16, 80, 80, 256, 16, 16),
    "Mamba-YOLO P2": Core(16, 160, 160, 128, 16, 8),
}


class Normalised(nn.Module):
    """A norm of images and a mixer of pixels (B, H, W, C)."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SS2D, VMamba-T stage 1": (
        partial(SS2D, 96, d_state=1, expand=2, conv_bias=False, gated=False),
        (64, 56, 56, 96),
    ),
    "LayerNorm2d and SS2D, Mamba-YOLO P3": (
        lambda: Normalised(LayerNorm2d(128), SS2D(128, act_layer=nn.GELU, init=init_mamba_yolo)),
        (16, 80, 80, 128),
    ),
    "BiMambaMixer, Vim-S": (partial(BiMambaMixer, 384), (64, 197, 384)),
}


class CrossScan(torch.autograd.Function):
    """x (B, D, H, W) copied into four sequences (B, 4, D, L): rows, columns, and both from the end."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        xs = x.new_empty(x.shape[0], 4, x.shape[1], x.shape[2] * x.shape[3])
        xs[:, 0] = x.flatten(2)
        xs[:, 1] = x.transpose(2, 3).flatten(2)
        xs[:, 2:] = xs[:, :2].flip(-1)
        return xs

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return merged(grad, ctx.shape)


class CrossMerge(torch.autograd.Function):
    """The adjoint: four sequences (B, 4, D, L) summed into an image."""

    @staticmethod
    def forward(ctx, ys: Tensor, shape: torch.Size) -> Tensor:
        return merged(ys, shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return CrossScan.forward(ctx, grad), None


def merged(ys: Tensor, shape: torch.Size) -> Tensor:
    batch, channels, height, width = shape
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    columns = ys[:, 1].reshape(batch, channels, width, height).transpose(2, 3)
    return ys[:, 0].reshape(shape) + columns


def public_scan() -> tuple[str, Callable[..., Tensor]]:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # an extension built for another torch fails in many ways
        print(f"mamba_ssm cannot be imported ({type(error).__name__}: {error})".splitlines()[0], file=sys.stderr)
        return "our selective_scan", selective_scan
    return "mamba_ssm", selective_scan_fn


def materialised(
    x: Tensor, x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    *, scan: Callable[..., Tensor], einsum: bool,
) -> Tensor:  # fmt: skip
    """The core of published SS2D code; x and the result (B, D, H, W)."""
    (batch, channels, height, width), (K, _, R), N = x.shape, dt_weight.shape, A_log.shape[-1]
    length = height * width
    xs = CrossScan.apply(x)  # (B, K, D, L)
    if einsum:
        dt, B, C = torch.einsum("bkdl,kcd->bkcl", xs, x_proj).split([R, N, N], 2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_weight)
    else:
        projected = F.conv1d(xs.flatten(1, 2), x_proj.reshape(-1, channels, 1), groups=K)
        dt, B, C = projected.view(batch, K, -1, length).split([R, N, N], 2)
        delta = F.conv1d(dt.contiguous().flatten(1, 2), dt_weight.reshape(-1, R, 1), groups=K)
    ys = scan(
        xs.flatten(1, 2), delta.reshape(batch, -1, length), -torch.exp(A_log.float()).flatten(0, 1),
        B.contiguous(), C.contiguous(), D.float().flatten(), delta_bias=dt_bias.float().flatten(), delta_softplus=True,
    )  # fmt: skip
    return CrossMerge.apply(ys.view(batch, K, channels, length), x.shape)


def ours(x: Tensor, *parameters: Tensor) -> Tensor:
    """The same by :func:`mambavision.layers.ssm.ssm_scan`; x and the result (B, H, W, D)."""
    return ssm_scan(x.flatten(1, 2), *parameters, orders="cross", grid=tuple(x.shape[1:3])).view(x.shape)


def core_inputs(s: Core, device: str, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """x (B, H, W, D) in bfloat16, and float32 parameters as a new layer has them."""
    torch.manual_seed(seed)
    x = torch.randn(s.B, s.H, s.W, s.D, device=device).bfloat16()
    x_proj = (torch.rand(4, s.R + 2 * s.N, s.D, device=device) * 2 - 1) * s.D**-0.5
    rest = [torch.empty(4, s.D, *n, device=device) for n in ((s.N,), (), (s.R,), ())]
    init_mamba(*rest)
    A_log, D, dt_weight, dt_bias = rest
    return x, [x_proj, dt_weight, dt_bias, A_log, D]


def step(run: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x and of the parameters, under autocast as in training."""
    leaves = [v.detach().requires_grad_() for v in (x, *parameters)]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        y = run(*leaves)
    return y, *torch.autograd.grad(y, leaves, dy)


def disagreement(runs: dict[str, Callable[..., Tensor]], s: Core, device: str) -> str | None:
    """None, or what differs by more than bfloat16 rounding (2 %) between "ours" and another implementation."""
    x, parameters = core_inputs(s._replace(B=2), device, seed=1)
    dy = torch.randn_like(x)
    names = ("y", "x", "x_proj", "dt_weight", "dt_bias", "A_log", "D")
    results = {}
    for name, run in runs.items():
        first = name == "ours"
        turn = (lambda v: v) if first else (lambda v: v.permute(0, 3, 1, 2).contiguous())
        y, dx, *rest = step(run, turn(x), parameters, turn(dy))
        back = (lambda v: v) if first else (lambda v: v.permute(0, 2, 3, 1))
        results[name] = [back(y), back(dx), *rest]
    for name, values in results.items():
        for what, got, want in zip(names, values, results["ours"], strict=True):
            error = ((got.float() - want.float()).norm() / want.float().norm()).item()
            if not error <= 2e-2:
                return f"{name}: {what} is off by {error:.1e}"
    return None


def graph_of(run: Callable[[], object]) -> Callable[[], None]:
    """The same kernels without the host's time: a replay of a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def medians_ms(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of a call; implementations take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            run()
            for _ in range(CALLS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def memory_mb(run: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], dy: Tensor) -> tuple[float, float]:
    """What is kept between forward and backward, y included, and the peak of a training step, beyond the inputs."""
    leaves = [v.detach().requires_grad_() for v in (x, *parameters)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = run(*leaves)
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.grad(y, leaves, dy)
    return kept / 1e6, (torch.cuda.max_memory_allocated() - before) / 1e6


def compare_cores() -> None:
    scan_name, scan = public_scan()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16 autocast; copies scan with {scan_name}")
    print("milliseconds in a CUDA graph, and called eagerly in parentheses")
    print("| shape | pipeline | forward ms | step ms | kept MB | peak MB |\n|---|---|---|---|---|---|")
    runs = {"ours": ours}
    for name, einsum in (("four copies, conv1d", False), ("four copies, einsum", True)):
        runs[name] = partial(materialised, scan=scan, einsum=einsum)
    for shape, s in CORES.items():
        if wrong := disagreement(runs, s, "cuda"):
            print(f"{shape} is not timed: {wrong}", flush=True)
            continue
        x, parameters = core_inputs(s, "cuda")
        calls, steps, memory = {}, {}, {}
        dy = torch.randn_like(x)
        for name, run in runs.items():
            turned = [v if name == "ours" else v.permute(0, 3, 1, 2).contiguous() for v in (x, dy)]

            def forward(run=run, x=turned[0], parameters=parameters):
                with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                    return run(x, *parameters)

            memory[name] = memory_mb(run, turned[0], parameters, turned[1])
            calls[name], steps[name] = forward, partial(step, run, turned[0], parameters, turned[1])
        eager = medians_ms(calls), medians_ms(steps)
        times = [medians_ms({name: graph_of(run) for name, run in each.items()}) for each in (calls, steps)]
        for name in runs:
            row = [f"{t[name]:.3f} ({e[name]:.3f})" for t, e in zip(times, eager, strict=True)]
            print(f"| {shape} | {name} | {' | '.join([*row, *(f'{v:.0f}' for v in memory[name])])} |", flush=True)

        def ratio(t: dict[str, float]) -> float:
            return min(v for name, v in t.items() if name != "ours") / t["ours"]

        kept, peak = (min(memory[name][i] for name in runs if name != "ours") for i in range(2))
        ratios = [f"{ratio(t):.2f} ({ratio(e):.2f})" for t, e in zip(times, eager, strict=True)]
        ratios += [f"{memory['ours'][i] / v:.2f}" for i, v in enumerate((kept, peak))]
        print(f"| {shape} | times faster; part of the memory | {' | '.join(ratios)} |", flush=True)


def kernels_of(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Kernels and copies that one call launches, in order of first appearance: name, how many, microseconds in all."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    events = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    for event in sorted(events, key=lambda e: e.time_range.start):
        found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return [(name, len(times), sum(times)) for name, times in found.items()]


def list_kernels(only: str = "") -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, float32 parameters, bfloat16 autocast")
    for name, (build, shape) in LAYERS.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        layer = build().cuda()
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        leaf = x.clone().requires_grad_()
        dy = torch.randn_like(x)

        def call(gradients: bool, layer=layer, x=x, leaf=leaf, dy=dy):
            with contextlib.nullcontext() if gradients else torch.no_grad():
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    y = layer(leaf if gradients else x)
                if gradients:
                    torch.autograd.grad(y, [leaf, *layer.parameters()], dy)

        for what, run in (("forward", partial(call, False)), ("training step", partial(call, True))):
            rows = kernels_of(run)
            total, launches = sum(us for *_, us in rows), sum(n for _, n, _ in rows)
            ms = medians_ms({what: run})[what]
            print(f"\n{name} {shape}, {what}: {launches} launches, {total:.0f} us of kernels, {1e3 * ms:.0f} us a call")
            for kernel, count, us in rows:
                print(f"  {us:8.1f} us  {count} x  {kernel[:150]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernels", "core"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark_mixer: needs an NVIDIA GPU that torch can use", file=sys.stderr)
        return 2
    list_kernels() if args.what == "kernels" else compare_cores()
    return 0


if __name__ == "__main__":
    sys.exit(main())
