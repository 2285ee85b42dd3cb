"""Gate, clocks and floors over rows: what `tools/benchmark.py ops` runs."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from bench import cold
from bench.problem import Contender, Problem, refusal, results, solve
from bench.report import Line
from bench.roofs import Roofs
from bench.rows import FIRST_CALLS, Row
from bench.timing import Graph, Times, allocated_mb, in_turn

PEERS = {"vs_reference": "reference", "vs_mamba_ssm": "mamba_ssm", "vs_sdpa": "SDPA"}
REFUSED = "not timed"
SLOW_MS = 50.0  # a graph would tell nothing else


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Host(NamedTuple):
    """Where and how: the same on all lines of a run."""

    device: str
    dtype: torch.dtype
    budget_s: float
    roofs: Roofs | None = None

    def line(self, op: str, row: str, shape: str, implementation: str, call: str, mode: str, times: Times) -> Line:
        on_gpu = self.device == "cuda"
        return Line(
            date=datetime.date.today().isoformat(),
            gpu_name=torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            torch=torch.__version__,
            triton=_triton_version(),
            copy_tb_s=self.roofs and self.roofs.bandwidth / 1e12,
            exp2_t_s=self.roofs and self.roofs.exp2_rate / 1e12,
            op=op, row=row, shape=shape, dtype=f"{self.dtype}".removeprefix("torch."), implementation=implementation,
            call=call, mode=mode, median_ms=times.median, p20_ms=times.low, p80_ms=times.high,
        )  # fmt: skip


@cache
def _triton_version() -> str:
    if find_spec("triton") is None:
        return ""
    import triton

    return triton.__version__


class Entrant(NamedTuple):
    """A contender that passed the gate, with its inputs laid out."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return self.run(*self.leaves)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        y = results(self.run(*self.leaves))
        return torch.autograd.grad(y, self.leaves, [torch.empty_like(v) for v in y])

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """A backward that can be called again and again."""
        y = results(self.run(*self.leaves))
        return partial(torch.autograd.grad, y, self.leaves, [torch.randn_like(v) for v in y], retain_graph=True)

    def again(self) -> "Entrant":
        """With leaves that no other graph knows: a captured backward must not meet one that ran on another stream."""
        return Entrant(self.run, [v.detach().requires_grad_() for v in self.leaves])


def gate(problems: list[tuple[Problem, dict[str, Contender]]], what: str, names: set[str] | None) -> dict[str, Entrant]:
    """Those whose result and gradients are right; the others are said to be not timed, and why."""
    passed = {}
    for problem, contenders in problems:
        if names is not None:
            contenders = {name: c for name, c in contenders.items() if name in names}
        solution = solve(problem) if contenders else None
        for name, contender in contenders.items():
            if wrong := refusal(contender, problem, solution):
                say(f"{what}: {name}: {REFUSED}, {wrong}")
                continue
            with torch.no_grad():
                leaves = contender.prepare(*problem.inputs.values())
            passed[name] = Entrant(contender.run, [v.detach().requires_grad_() for v in leaves])
    return passed


def check_yardstick(row: Row, device: str) -> None:
    """The gate of a row compares with `chunked` in float64, so that one has to agree with the definition."""
    (problem, contenders), *_ = row.problems(device, torch.float64, sliced=False)
    problem = problem._replace(inputs={name: v.double() for name, v in problem.inputs.items()})
    exact = contenders.get("chunked") or Contender(problem.exact)
    if wrong := refusal(exact, problem, solve(problem)):
        raise RuntimeError(f"{row.op}: chunked in float64 is no yardstick: {wrong}")


def _captured(entrants: dict[str, Entrant], what: str) -> dict[str, dict[str, Graph]]:
    """Forward and backward of each as a CUDA graph, where it can be captured."""
    stream, found = torch.cuda.Stream(), {"forward": {}, "backward": {}}
    stream.wait_stream(torch.cuda.current_stream())
    for name, entrant in entrants.items():
        entrant = entrant.again()
        for call, calls in found.items():
            try:
                with torch.cuda.stream(stream):
                    run = entrant.forward if call == "forward" else entrant.backward()
                    run()
                calls[name] = Graph(run, stream)
            except RuntimeError as error:
                say(f"{what}: {name}: {call} not captured in a graph: {error}".partition("\n")[0])
    return found


def measure(row: Row, name: str, host: Host, entrants: dict[str, Entrant]) -> list[Line]:
    """Times of all in turn; on a GPU also in a graph, with memory and launches."""
    forward = {n: e.forward for n, e in entrants.items()}
    backward = {n: e.backward() for n, e in entrants.items()}
    times = {
        (call, "eager"): in_turn(runs, host.device, host.budget_s)
        for call, runs in (("forward", forward), ("backward", backward))
    }
    counts, memory, floors = {}, {}, {}
    if host.device == "cuda":
        del backward
        steps = {"forward": "forward", "backward": "step"}
        memory = {c: {n: allocated_mb(getattr(e, step)) for n, e in entrants.items()} for c, step in steps.items()}
        slow = {n for of_all in times.values() for n, t in of_all.items() if t.median > SLOW_MS}
        for call, graphs in _captured({n: e for n, e in entrants.items() if n not in slow}, name).items():
            counts[call] = {n: graph.launches() for n, graph in graphs.items()}
            times[call, "graph"] = in_turn(graphs, host.device, host.budget_s)
        floors = {call: host.roofs.floor_ms(*work) for call, work in row.work(host.dtype.itemsize).items()}
    lines = []
    for (call, mode), of_all in times.items():
        for n, t in of_all.items():
            ratios = {key: of_all[peer].median / t.median for key, peer in PEERS.items() if peer in of_all}
            floor = floors.get(call) if n != "SDPA" else None  # the floor of another operator
            line = host.line(row.op, name, f"{row}", n, call, mode, t)
            lines.append(
                line._replace(
                    floor_ms=floor,
                    over_floor=floor and t.median / floor,
                    **ratios,
                    memory_mb=memory.get(call, {}).get(n),
                    launches=counts.get(call, {}).get(n),
                )
            )
    return lines


def run(rows: dict[str, Row], first_calls: list[str], host: Host, only: set[str] | None = None) -> Iterator[list[Line]]:
    """Lines of one row after the other, of contenders named in ``only``. A row that fails is reported and left out."""
    for op in first_calls:
        try:
            seconds = cold.measure(op, host.device)
        except RuntimeError as error:
            say(f"first call of {op}: {REFUSED}, {error}")
            continue
        say(f"first call of {op}: " + ", ".join(f"{what} {s:.2f} s" for what, s in seconds.items()))
        shape = f"{FIRST_CALLS[op]}"
        yield [
            host.line("first call", op, shape, "default", call, "eager", Times(*[1e3 * s] * 3))
            for call, s in seconds.items()
        ]
    right: dict[tuple, set[str]] = {}  # who passed at a small row of the same kind
    for name, row in rows.items():
        small, started = row.small(), time.perf_counter()
        try:
            if (row.op, small) not in right:
                check_yardstick(small, host.device)
                passed = gate(small.problems(host.device, host.dtype, sliced=False), f"{row.op} {small}", only)
                right[row.op, small] = set(passed)
            names = right[row.op, small]
            entrants = gate(row.problems(host.device, host.dtype, sliced=True), name, names)
            if not entrants:
                continue
            gated = time.perf_counter()
            lines = measure(row, name, host, entrants)
        except Exception as error:  # out of memory, a launch that failed: the other rows are still worth their time
            say(f"{name}: {REFUSED}, {type(error).__name__}: {error}".partition("\n")[0])
            continue
        if host.device == "cuda":
            torch.cuda.empty_cache()  # graphs had pools of their own
        say(f"{name}: {gated - started:.1f} s for the gate, {time.perf_counter() - gated:.1f} s for the times")
        for n in entrants:
            parts = [f"{v.call} {v.mode} {v.median_ms:.3f}" for v in lines if v.implementation == n]
            say(f"{name}: {n}: {', '.join(parts)} ms")
        yield lines
