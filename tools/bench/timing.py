"""How long calls take, queued one by one or replayed from a CUDA graph, what they launch and what they allocate."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

ROUNDS = 5
SAMPLE_MS = 2.0  # on a GPU a sample is as many calls, one behind the other, as last this long
MOST_CALLS = 20
MOST_SAMPLES = 50  # a round

Call = Callable[[], object]


class Times(NamedTuple):
    """Milliseconds of a call: the median of its samples, and the quantiles at 20 and 80 %."""

    median: float
    low: float
    high: float


def sample(run: Call, device: str, calls: int = 1) -> float:
    """Milliseconds of a call, averaged over some in a row: device events on a GPU, the wall clock on a CPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # keeps the GPU busy while the next is on its way: the clock sees it idle only where the host is slower
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def in_turn(runs: dict[str, Call], device: str, budget_s: float) -> dict[str, Times]:
    """Times of each, ``budget_s`` seconds each.

    They take turns, so that a slow minute of the machine is everybody's.
    """
    turn_s = budget_s / ROUNDS
    calls = dict.fromkeys(runs, 1)
    if device != "cpu":
        for name, run in runs.items():
            calls[name] = min(MOST_CALLS, math.ceil(SAMPLE_MS / sample(run, device)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            first = sample(run, device, calls[name])
            if time.perf_counter() - started >= turn_s:  # too long to matter what the others left in the caches
                samples[name].append(first)
                continue
            turn = [sample(run, device, calls[name])]
            while time.perf_counter() - started < turn_s and len(turn) < MOST_SAMPLES:
                turn.append(sample(run, device, calls[name]))
            samples[name] += turn
    return {name: _times(values) for name, values in samples.items()}


def _times(values: list[float]) -> Times:
    if len(values) == 1:
        return Times(*values * 3)
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return Times(statistics.median(values), low, high)


class Graph:
    """A call captured in a CUDA graph; calling it replays. ``run`` must have run before, on ``stream``."""

    def __init__(self, run: Call, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # torch.cuda.graph would also collect garbage, for a second a graph
            self._graph.capture_begin()
            try:
                self._kept = run()
            finally:
                self._graph.capture_end()
        self._graph.instantiate()

    def __call__(self) -> None:
        self._graph.replay()

    def launches(self) -> int | None:
        """Kernels, copies and fills in it, None if the driver does not tell.

        Not by torch.profiler, which leaves all later launches slower.
        """
        driver = ctypes.CDLL("libcuda.so.1")
        graph, count, kind = ctypes.c_void_p(self._graph.raw_cuda_graph()), ctypes.c_size_t(), ctypes.c_int()
        failed = driver.cuGraphGetNodes(graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        failed = failed or driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count))
        kinds = []
        for node in nodes:
            failed = failed or driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind))
            kinds.append(kind.value)
        return None if failed else sum(kind in (0, 1, 2) for kind in kinds)  # CU_GRAPH_NODE_TYPE_KERNEL, MEMCPY, MEMSET


def allocated_mb(run: Call) -> float:
    """Most memory that a call holds at once beyond what was there, in 10^6 bytes; its result counts."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
