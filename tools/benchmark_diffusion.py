#!/usr/bin/env python
"""Images per second and peak memory of DiM and its twin DiT by number of tokens, and what a block launches.

    python tools/benchmark_diffusion.py --device cuda --csv diffusion.csv            # DiM-XL against DiT-XL
    python tools/benchmark_diffusion.py --device cuda --orders raster cross          # and what another order costs
    python tools/benchmark_diffusion.py --device cuda --graphs                       # each call as a CUDA graph
    python tools/benchmark_diffusion.py --device cuda --profile --tokens 256 4096    # kernels of a block, with times

Class-conditional networks on latents of 4 channels in patches of 2 x 2. "forward" is a prediction without gradients,
weights in bfloat16; "training step" is forward, mean squared error, backward and AdamW, weights in float32 under
bfloat16 autocast; both in float32 on a CPU. Every block is compiled (torch.compile, whole) on a GPU. With --graphs
forward, loss and backward are one CUDA graph, as in training on one GPU (CudaGraphHook): what the host takes to launch
them is left out. Networks take turns at every number of tokens, DiM once for each of its orders; medians. Memory is the
most that is allocated beyond weights, moments and inputs. What does not fit is a row "out of memory".
"""

import argparse
import csv
import functools
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mambavision.backbones import dim, dit
from mambavision.engine import cli
from mambavision.engine.files import atomic_path, check_file

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (
        dit.dit_xl, dim.dim_xl_2x, dim.dim_xl_mlp, dim.dim_xl, dit.dit_l, dim.dim_l_2x, dim.dim_l_mlp, dim.dim_l,
        dit.dit_b, dim.dim_b_2x, dim.dim_b_mlp, dim.dim_b, dit.dit_s, dim.dim_s_2x, dim.dim_s_mlp, dim.dim_s,
        dit.dit_debug, dim.dim_debug,
    )
}  # fmt: skip
TOKENS = {256: 64, 1024: 16, 4096: 4, 16384: 1}  # and the batch: as many tokens in all
PHASES = ("forward", "training step")
COLUMNS = (
    "network", "mixer", "orders", "blocks", "parameters", "what", "tokens", "batch", "ms", "images/s", "MB", "device",
)  # fmt: skip
WARM_UP, FEWEST, ROUNDS = 3, 3, 3


def contenders(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Networks and their orders; attention has none, ""."""
    return [(name, orders) for name in args.networks for orders in (args.orders if name.startswith("dim") else [""])]


def build(name: str, orders: str, tokens: int, device: torch.device, args: argparse.Namespace) -> nn.Module:
    """A network for so many tokens, blocks compiled on a GPU; no layer is zero, so that no work can be left out."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"--tokens {tokens} is no square")
    options = {"mixer": args.mixer, "orders": orders} if orders else {}
    torch.manual_seed(0)
    with torch.device(device):
        net = NETWORKS[name]((2 * side, 2 * side), num_classes=1000, **options)
        net.blocks = net.blocks[: args.blocks]
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    if device.type == "cuda" and not args.eager:
        for block in net.blocks:
            block.compile(fullgraph=True)
    return net


def calls_of(net: nn.Module, batch: int, phase: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """A phase's work, which a CUDA graph can hold, and what follows it: AdamW, whose moments are there already."""
    device = next(net.parameters()).device
    x = torch.randn(batch, net.in_channels, *net.input_size, device=device)
    t, labels = torch.rand(batch, device=device) * 1000, torch.randint(1000, (batch,), device=device)
    if phase == "forward":
        net.eval()
        if device.type == "cuda":
            net.bfloat16()
            x = x.bfloat16()

        def forward() -> None:
            with torch.no_grad():
                net(x, t, labels)

        return forward, lambda: None
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=device.type == "cuda")
    target = torch.randn_like(x)

    def gradients() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = (net(x, t, labels).float() - target).square().mean()
        loss.backward()

    return gradients, optimizer.step


def record(work: Callable[[], None], stream: torch.cuda.Stream, pool: tuple[int, int]) -> Callable[[], None]:
    """Replays of the work as a graph; graphs that are replayed one after another may share a pool of memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return functools.partial(_replay, graph, work)


def _replay(graph: torch.cuda.CUDAGraph, work: Callable[[], None]) -> None:
    """The graph reads the work's tensors where they lie: it is held as long as the graph."""
    graph.replay()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_mb(call: Callable[[], None], device: torch.device, stream: torch.cuda.Stream | None = None) -> float:
    """The most MB that a call, on a stream of its own if given, holds beyond what was there; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    wait(device)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.stream(stream):
        call()
    wait(device)
    return (torch.cuda.max_memory_allocated() - held) / 1e6


def median_ms(
    calls: dict[tuple[str, str], Callable[[], None]], device: torch.device, seconds: float
) -> dict[tuple[str, str], float]:
    """Median milliseconds of a call among calls in a row; contenders take turns."""
    samples: dict[tuple[str, str], list[float]] = {contender: [] for contender in calls}
    for _ in range(ROUNDS):
        for contender, call in calls.items():
            call()
            wait(device)
            begin = time.perf_counter()
            count = 0
            while count < FEWEST or time.perf_counter() - begin < seconds / ROUNDS:
                for _ in range(FEWEST):
                    call()
                wait(device)
                count += FEWEST
                samples[contender].append((time.perf_counter() - begin) / count)
    return {contender: 1e3 * statistics.median(values) for contender, values in samples.items()}


def kernels_of(call: Callable[[], None]) -> list[tuple[str, int, float]]:
    """Kernels and copies that one call launches, longest first: name, how many, microseconds in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return sorted(((name, len(us), sum(us)) for name, us in found.items()), key=lambda row: -row[2])


def measure(phase: str, tokens: int, batch: int, device: torch.device, args: argparse.Namespace) -> list[tuple]:
    """A row of COLUMNS for each network; with --profile, its kernels are printed too."""
    calls, about, memory = {}, {}, {}
    pool = torch.cuda.graph_pool_handle() if args.graphs else None
    stream = torch.cuda.Stream(device) if args.graphs else None  # what runs before a recording runs where it is made
    for contender in contenders(args):
        net = work = follow = None
        try:
            net = build(*contender, tokens, device, args)
            about[contender] = (len(net.blocks), sum(p.numel() for p in net.parameters()))
            work, follow = calls_of(net, batch, phase)
            wait(device)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    work()
                    follow()
            net.zero_grad()
            memory[contender] = peak_mb(work, device, stream)
            if args.graphs:
                net.zero_grad()
                work = record(work, stream, pool)
            calls[contender] = lambda work=work, follow=follow: (work(), follow())
            if args.profile:
                title = f"{' '.join(contender)}, {phase}, {batch} x {tokens} tokens"
                report_kernels(title, kernels_of(calls[contender]), len(net.blocks))
        except torch.OutOfMemoryError:
            memory[contender] = math.inf
            net = work = follow = None
            gc.collect()
            torch.cuda.empty_cache()
    times = median_ms(calls, device, args.seconds)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = []
    for contender in contenders(args):
        name, orders = contender
        ms = times.get(contender, math.inf)
        mixer = args.mixer if orders else "attention"
        what = f"{phase}, graph" if args.graphs else phase
        figures = (what, tokens, batch, ms, 1e3 * batch / ms, memory[contender], hardware)
        rows.append((name, mixer, orders, *about.get(contender, (0, 0)), *figures))
    return rows


def report_kernels(title: str, rows: Sequence[tuple[str, int, float]], blocks: int) -> None:
    total, launches = sum(us for *_, us in rows), sum(count for _, count, _ in rows)
    print(f"\n{title}: {launches / blocks:.1f} launches and {total / blocks:.0f} us a block (all kernels over blocks)")
    for name, count, us in rows:
        if us > 0.003 * total:
            print(f"  {us / blocks:8.1f} us  {count / blocks:5.2f} x  {name[:110]}", flush=True)


def report(rows: Sequence[tuple], device: torch.device) -> None:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    headers = (
        "what", "tokens", "batch", "network", "mixer", "orders", "blocks", "params M", "ms", "images/s", "peak MB",
        "ratio",
    )  # fmt: skip
    table = Table(*headers, title=hardware)
    first: dict[tuple, float] = {}
    for *about, blocks, parameters, phase, tokens, batch, ms, rate, memory, _ in rows:
        base = first.setdefault((phase, tokens), rate)  # of the first network
        figures = ("out of memory", "", "", "")
        if ms < math.inf:
            peak = "-" if math.isnan(memory) else f"{memory:.0f}"
            figures = (f"{ms:.2f}", f"{rate:.1f}", peak, f"{rate / base:.2f}" if base else "-")
        table.add_row(phase, str(tokens), str(batch), *about, str(blocks), f"{parameters / 1e6:.0f}", *figures)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["dit_xl", "dim_xl_2x", "dim_xl_mlp"])
    parser.add_argument("--mixer", choices=["mamba", "ssd"], default="ssd", help="of DiM")
    parser.add_argument("--orders", nargs="+", choices=list(dim.CYCLES), default=["cross"], help="of DiM")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--batch", type=int, help="images; by default as many as make 16384 tokens, at least 1")
    parser.add_argument("--what", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--blocks", type=int, help="the first so many blocks alone, to try things out")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--graphs", action="store_true", help="replay all but AdamW as one CUDA graph")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of every network")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N; by default cuda where there is one")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure")
    parser.add_argument("--csv", help="also write the figures to this file")
    args = parser.parse_args()
    if args.csv:
        check_file(args.csv, "--csv")
    if min(*args.tokens, 1 if args.batch is None else args.batch) < 1:
        raise ValueError("--tokens and --batch must be at least 1")
    device = cli.choose_device(args.device)
    for option, does in (("profile", "lists kernels"), ("graphs", "records launches")):
        if getattr(args, option) and device.type != "cuda":
            raise ValueError(f"--{option} {does} of an NVIDIA GPU: pass --device cuda")
    rows = []
    for tokens in args.tokens:
        for phase in args.what:
            found = measure(phase, tokens, args.batch or max(1, 16384 // tokens), device, args)
            for name, _, orders, *_, ms, rate, memory, _ in found:
                figures = f"{ms:.2f} ms, {rate:.1f} images/s, {memory:.0f} MB"
                print(f"{phase}, {tokens} tokens, {name} {orders}: {figures}", file=sys.stderr, flush=True)
            rows += found
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch._dynamo.reset()
    report(rows, device)
    if args.csv:
        with atomic_path(args.csv) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    cli.run(main)
