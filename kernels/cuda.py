"""The scan in CUDA C++ (scan.cu), compiled at first use by NVRTC."""

import ctypes
import functools
import math
import pathlib
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from mambavision.kernels import nvrtc

_SOURCE = pathlib.Path(__file__).with_name("scan.cu")
_ENTRIES = {
    "scan_forward": "forward<false>",
    "scan_starts": "forward<true>",
    "scan_reach": "reach<false>",
    "scan_reach_back": "reach<true>",
    "scan_carry": "carry<false>",
    "scan_carry_back": "carry<true>",
    "scan_backward": "backward<>",
    "scan_sum": "sums",
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VIEWED = ("x", "delta", "B", "C", "dy")
# scan.cu's Call: x delta B C dy, A D bias, initial gradient, order, ends sums, starts, y dx ddelta, last, dA dD dbias,
# dB dC; then its views and sizes
_POINTERS = struct.Struct("23P")
_REST = struct.Struct("qqii" * len(_VIEWED) + "qqqqqqi0q")
_JOB = struct.Struct("PPqqqqii")
_SUM = struct.Struct(f"{6 * _JOB.size}s")


class Plan(NamedTuple):
    """How a scan is laid over the GPU: ``split`` lanes a channel hold ``states`` each, ``tile`` steps at once."""

    states: int
    split: int
    tile: int
    threads: int
    segment: int
    polynomial: int = 0
    keep_decay: bool = False
    resident: int = 1

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.threads // self.split


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tile(N: int) -> int:
    """Steps of a backward's tile, which begins at a kept state."""
    return 8 if N == 1 else 16


@functools.cache
def plan(batch: int, length: int, scans: int, channels: int, N: int, processors: int, *, backward: bool) -> Plan:
    """Few lanes a channel while that fills the GPU with 8 warps a processor; then segments of time; then more lanes."""
    padded, wanted = _power_of_two(N), 8 * processors
    fewest, most = max(1, padded // 16), min(padded, 16)

    def warps(split: int) -> float:
        return batch * scans * channels * split / 32

    split = min(most, max(fewest, padded // (4 if backward and padded > 4 else 2 if backward else 16)))
    while split < most and padded // split > 4 and warps(split) < wanted:
        split *= 2
    segments = max(1, min(math.ceil(wanted / warps(split)), length // 256))
    while split < most and segments == 1 and warps(split) < wanted:
        split *= 2
    states = padded // split
    tile = _tile(N) if backward else 8 if states == 16 else 16
    blocks = -(-channels * split // (32 if backward and padded > 64 else 128))  # 48 KB of shared memory hold them
    threads = -(-channels * split // (32 * blocks)) * 32
    segment = -(-length // (segments * tile)) * tile
    lone = backward and N == 1
    resident = (480 if lone else 384 if backward else 512) // threads
    return Plan(states, split, tile, threads, segment, keep_decay=lone, resident=resident)


def unavailable() -> str | None:
    """Why CUDA kernels cannot be compiled here, or None if they can."""
    return nvrtc.unavailable()


@functools.cache
def _kernel(name: str, device: int, threads: int, *defines: tuple[str, int]) -> ctypes.c_void_p:
    values = {"KERNEL": name, "ENTRY": _ENTRIES[name], "ARGUMENT": "Sum" if name == "scan_sum" else "Call"}
    values |= dict.fromkeys(("N", "STATES", "SPLIT", "VECTOR", "RESIDENT"), 1) | {"TILE": 16, "THREADS": threads}
    values |= dict.fromkeys(("POLYNOMIAL", "KEEP_DECAY", "SOFTPLUS", "EVERY", "START_TYPE"), 0)
    values |= {f"{n.upper()}_{what}": 0 for n in _VIEWED for what in ("TYPE", "BY_TOKEN")}
    return nvrtc.kernel(_SOURCE, name, tuple(f"{n}={v}" for n, v in (values | dict(defines)).items()), device)


class _View(NamedTuple):
    """How a (batch, L, K, inner) tensor lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def bytes(self) -> tuple[int, int, int, int]:
        """Strides along batch, K, L and inner in bytes, 0 along axes of size 1."""
        size = self.dtype.itemsize
        batch, token, scan, inner = (s * size if n > 1 else 0 for s, n in zip(self.strides, self.shape, strict=True))
        if max(token, inner) >= 2**31:
            raise ValueError(f"strides {self.strides} of a {self.dtype} tensor reach 2^31 bytes: make it contiguous")
        return batch, scan, token, inner

    def defines(self, name: str) -> list[tuple[str, int]]:
        """Its type, and whether its tokens are neighbours in memory."""
        _, _, token, inner = self.bytes()
        by_token = token == self.dtype.itemsize != inner
        return [(f"{name.upper()}_TYPE", _TYPES[self.dtype]), (f"{name.upper()}_BY_TOKEN", int(by_token))]


class _Layout(NamedTuple):
    """All of a call but its addresses.

    Kernels and their blocks; the end of their argument; the floats of a scratch buffer and the byte where each of its
    parts begins; the sums that follow: kernel, blocks, the end of each job.
    """

    launches: tuple[tuple[ctypes.c_void_p, int], ...]
    rest: bytes
    scratch: int
    offsets: tuple[int, ...]
    sums: tuple[ctypes.c_void_p, int, tuple[tuple[int, ...], ...]] | None


_SUM_THREADS = 256


@functools.lru_cache(4096)
def _layout(
    plan: Plan,
    backward: bool,
    merge: bool,
    device: int,
    shape: tuple[int, ...],
    N: int,
    softplus: bool,
    every: int,
    start_type: torch.dtype,
    kept: bool,
    *views: tuple | None,
) -> _Layout:
    """Over delta's ``shape``; ``views``: shape, strides, dtype of each of _VIEWED.

    ``every``: steps from a kept state to the next, 0 for none; ``kept``: the backward has them.
    """
    batch, length, K, channels = shape
    segments, blocks = -(-length // plan.segment), -(-channels // plan.channels)
    defines = {"N": N, "STATES": plan.states, "SPLIT": plan.split, "TILE": plan.tile, "RESIDENT": plan.resident}
    defines |= {"POLYNOMIAL": plan.polynomial, "KEEP_DECAY": int(plan.keep_decay), "SOFTPLUS": int(softplus)}
    values = []
    for name, view in zip(_VIEWED, views, strict=True):
        values += _View(*view).bytes() if view else (0,) * 4
        defines |= _View(*view).defines(name) if view else {}
    if backward:
        names = ("scan_reach_back", "scan_carry_back", "scan_backward")
        names = names if kept else ("scan_reach", "scan_carry", "scan_starts", *names)
    else:
        names = ("scan_reach", "scan_carry", "scan_forward")
    launches = []
    for name in names:
        whole = blocks * K * segments * batch
        chains = name in ("scan_carry", "scan_carry_back")
        if chains:
            whole = -(-batch * K * channels * N // plan.threads)
        if segments == 1 and (chains or "reach" in name):
            continue
        # what a kernel does not look at shall not compile it again
        keeps = {} if chains or "reach" in name else {"EVERY": every, "START_TYPE": _TYPES[start_type]}
        launches.append((_kernel(name, device, plan.threads, *(defines | keeps).items()), whole))
    sizes = (batch, length, K, channels, segments, plan.segment, K * channels)

    states, tokens, f32 = batch * K * channels, batch * length * K, torch.float32
    x, _, B, C, _ = (torch.float32 if view is None else view[2] for view in views)
    floats = [states * segments * N * (segments > 1), states * segments * (segments > 1)]  # ends, sums
    jobs = []  # outer, terms, inner, type, type of the sum
    if backward:
        pieces, row = batch * segments, K * channels
        floats += [0 if kept else states * -(-length // every) * N, *[blocks * tokens * N] * 2]  # starts, dB, dC
        floats += [pieces * row * N, pieces * row, pieces * row]  # dA, dD, dbias
        jobs = [(1, blocks, tokens * N, f32, B), (1, blocks, tokens * N, f32, C)]
        jobs += [(1, pieces, row * N, f32, f32), (1, pieces, row, f32, f32), (1, pieces, row, f32, f32)]
    if merge:
        floats.append(-(-tokens * channels * x.itemsize // 4))  # y or dx
        jobs.append((batch * length, K, channels, x, x))
    offsets = [0]
    for count in floats:
        offsets.append(offsets[-1] + -(-count // 64) * 256)
    return _Layout(
        tuple(launches), _REST.pack(*values, *sizes), offsets[-1] // 4, tuple(offsets), _summing(device, jobs)
    )


def _summing(device: int, jobs: list[tuple]) -> tuple | None:
    if not jobs:
        return None
    vector = math.gcd(16 // max(source.itemsize for *_, source, _ in jobs), *(inner for _, _, inner, _, _ in jobs))
    rests = []
    for outer, terms, inner, source, out in jobs:
        blocks = -(-outer * inner // (vector * _SUM_THREADS))
        rests.append((outer, terms, inner, blocks, _TYPES[source], _TYPES[out]))
    function = _kernel("scan_sum", device, _SUM_THREADS, ("VECTOR", vector), ("RESIDENT", 4))
    return function, sum(rest[3] for rest in rests), tuple(rests)


def _sum(layout: _Layout, device: int, sources: tuple[int, ...], *sums: Tensor) -> None:
    """The layout's sums, from addresses to tensors."""
    function, blocks, rests = layout.sums
    jobs = [_JOB.pack(a, v.data_ptr(), *rest) for a, v, rest in zip(sources, sums, rests, strict=True)]
    nvrtc.launch(function, blocks, _SUM_THREADS, _SUM.pack(b"".join(jobs)), device)


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _parameter(v: Tensor | None) -> Tensor | None:
    if v is None or (v.dtype is torch.float32 and v.is_contiguous()):
        return v
    return v.float().contiguous()


def _order(order: Tensor | None) -> Tensor | None:
    if order is None or (order.dtype is torch.int32 and order.is_contiguous()):
        return order
    return order.to(torch.int32).contiguous()


def _signature(v: Tensor) -> tuple:
    return v.shape, v.stride(), v.dtype


def kept_states(x: Tensor, delta: Tensor, A: Tensor) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and type of the states that :func:`scan` keeps if asked: (batch, K, ceil(L / tile of the backward), D, N).

    None where they would take more memory than x and delta, which are kept anyway.
    """
    batch, length, K, channels = delta.shape
    N = A.shape[-1]
    every = _tile(N)
    inputs = every * (delta.dtype.itemsize + x.dtype.itemsize * (1 / K if x.shape[2] == 1 else 1))
    if N * 4 <= inputs:
        dtype = torch.float32
    elif x.dtype is torch.bfloat16 and N * 2 <= inputs:
        dtype = torch.bfloat16
    else:
        return None
    return (batch, K, -(-length // every), channels, N), dtype


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
    merge: bool,
    *,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`reference.scan`, for float32, bfloat16 and float16 on an NVIDIA GPU, N up to 128.

    ``starts``: an empty tensor of :func:`kept_states`, filled for :func:`scan_backward`.
    """
    device, shape, N = x.get_device(), delta.shape, A.shape[-1]
    batch, length, K, channels = shape
    A, D, bias, initial = _parameter(A), _parameter(D), _parameter(delta_bias), _parameter(initial_state)
    order = _order(order)
    every, start_type = 0, torch.float32
    if starts is not None:
        every, start_type = 8 if starts.shape[2] == -(-length // 8) else 16, starts.dtype
    chosen = plan(batch, length, K, channels, N, _processors(device), backward=False)
    sums, views = merge and K > 1, (_signature(x), _signature(delta), _signature(B), _signature(C), None)
    layout = _layout(chosen, False, sums, device, shape, N, delta_softplus, every, start_type, False, *views)
    y = x.new_empty((batch, length, channels) if merge else shape)
    last = A.new_empty((batch, K, channels, N))
    scratch = A.new_empty(layout.scratch) if layout.scratch else None
    base, offsets = _address(scratch), layout.offsets
    y_each = base + offsets[2] if sums else y.data_ptr()
    argument = _POINTERS.pack(
        x.data_ptr(), delta.data_ptr(), B.data_ptr(), C.data_ptr(), 0, A.data_ptr(), _address(D), _address(bias),
        _address(initial), 0, _address(order), base, base + offsets[1], _address(starts), y_each, 0, 0, last.data_ptr(),
        0, 0, 0, 0, 0,
    )  # fmt: skip
    for function, blocks in layout.launches:
        nvrtc.launch(function, blocks, chosen.threads, argument + layout.rest, device)
    if sums:
        _sum(layout, device, (y_each,), y)
    return y, last


def scan_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
    merge: bool,
    *,
    starts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of x, delta, A, B, C, D, delta_bias and initial_state.

    ``starts``: the states that :func:`scan` kept; without them they are computed again.
    """
    device, shape, N = x.get_device(), delta.shape, A.shape[-1]
    batch, length, K, channels = shape
    A, D, bias, initial = _parameter(A), _parameter(D), _parameter(delta_bias), _parameter(initial_state)
    order = _order(order)
    gradient = _parameter(grad_state)
    chosen = plan(batch, length, K, channels, N, _processors(device), backward=True)
    every, start_type, kept = chosen.tile, torch.float32, False
    if starts is not None and starts.shape[2] == -(-length // every):
        start_type, kept = starts.dtype, True
    dy = _signature(grad_y)
    if merge:
        (_, _, _), (outer, token, inner), dtype = dy
        dy = (batch, length, 1, channels), (outer, token, 0, inner), dtype
    merges, views = x.shape[2] == 1 and K > 1, (_signature(x), _signature(delta), _signature(B), _signature(C), dy)
    layout = _layout(chosen, True, merges, device, shape, N, delta_softplus, every, start_type, kept, *views)

    scratch = A.new_empty(layout.scratch)
    base = scratch.data_ptr()
    ends, sums, starts_at, *parts = (base + offset for offset in layout.offsets[:-1])
    if kept:
        starts_at = starts.data_ptr()
    dx, ddelta = x.new_empty((batch, length, x.shape[2], channels)), delta.new_empty(shape)
    dA, dinitial = A.new_empty((K, channels, N)), A.new_empty((batch, K, channels, N))
    dD, dbias = A.new_empty((K, channels)), A.new_empty((K, channels))
    dB, dC = B.new_empty((batch, length, K, N)), C.new_empty((batch, length, K, N))
    dB_parts, dC_parts, dA_parts, dD_parts, dbias_parts = parts[:5]
    dx_each = parts[5] if merges else dx.data_ptr()
    argument = _POINTERS.pack(
        x.data_ptr(), delta.data_ptr(), B.data_ptr(), C.data_ptr(), grad_y.data_ptr(), A.data_ptr(), _address(D),
        _address(bias), _address(initial), _address(gradient), _address(order), ends, sums, starts_at, 0, dx_each,
        ddelta.data_ptr(), dinitial.data_ptr(), dA_parts, dD_parts, dbias_parts, dB_parts, dC_parts,
    )  # fmt: skip
    for function, blocks in layout.launches:
        nvrtc.launch(function, blocks, chosen.threads, argument + layout.rest, device)
    _sum(layout, device, parts, dB, dC, dA, dD, dbias, *((dx,) if merges else ()))
    return dx, ddelta, dA, dB, dC, dD, dbias, dinitial
