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
EVERY = 16  # steps from one state that the forward keeps to the next


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
    tile = 8 if states == 16 else 16
    blocks = -(-channels * split // (32 if backward and padded > 64 else 128))  # 48 KB of shared memory hold them
    threads = -(-channels * split // (32 * blocks)) * 32
    segment = -(-length // (segments * tile)) * tile
    return Plan(states, split, tile, threads, segment, resident=(384 if backward else 512) // threads)


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
    """All of a call but its addresses: kernels with their blocks, the rest of their argument, sizes."""

    launches: tuple[tuple[ctypes.c_void_p, int], ...]
    rest: bytes
    segments: int
    blocks: int


@functools.lru_cache(4096)
def _layout(
    plan: Plan,
    names: tuple[str, ...],
    device: int,
    shape: tuple[int, ...],
    N: int,
    softplus: bool,
    every: int,
    start_type: torch.dtype,
    *views: tuple | None,
) -> _Layout:
    """For the kernels ``names`` over delta's ``shape``; ``views``: shape, strides, dtype of each of _VIEWED."""
    batch, length, K, channels = shape
    segments, blocks = -(-length // plan.segment), -(-channels // plan.channels)
    defines = {"N": N, "STATES": plan.states, "SPLIT": plan.split, "TILE": plan.tile, "RESIDENT": plan.resident}
    defines |= {"POLYNOMIAL": plan.polynomial, "KEEP_DECAY": int(plan.keep_decay), "SOFTPLUS": int(softplus)}
    defines |= {"START_TYPE": _TYPES[start_type]}
    values = []
    for name, view in zip(_VIEWED, views, strict=True):
        values += _View(*view).bytes() if view else (0,) * 4
        defines |= _View(*view).defines(name) if view else {}
    launches = []
    for name in names:
        whole = blocks * K * segments * batch
        if "carry" in name or "reach" in name:
            if segments == 1:
                continue
            whole = -(-batch * K * channels * N // plan.threads) if "carry" in name else whole
        # what a kernel does not look at shall not compile it again
        kept = every if name in ("scan_forward", "scan_starts", "scan_backward") else 0
        function = _kernel(name, device, plan.threads, *(defines | {"EVERY": kept}).items())
        launches.append((function, whole))
    sizes = (batch, length, K, channels, segments, plan.segment, K * channels)
    return _Layout(tuple(launches), _REST.pack(*values, *sizes), segments, blocks)


def _launch(layout: _Layout, plan: Plan, device: int, **tensors: Tensor | None) -> None:
    address = tensors.get
    argument = _POINTERS.pack(*(0 if (v := address(n)) is None else v.data_ptr() for n in _FIELDS)) + layout.rest
    for function, blocks in layout.launches:
        nvrtc.launch(function, blocks, plan.threads, argument, device)


_FIELDS = ("x", "delta", "B", "C", "dy", "A", "D", "bias", "initial", "gradient", "order", "ends", "sums", "starts")
_FIELDS += ("y", "dx", "ddelta", "last", "dA", "dD", "dbias", "dB", "dC")


@functools.lru_cache(4096)
def _sums_layout(device: int, *jobs: tuple[tuple[int, ...], torch.dtype, int, torch.dtype]) -> tuple:
    threads = 256
    inners = [math.prod(shape[dim + 1 :]) for shape, _, dim, _ in jobs]
    widest = max(dtype.itemsize for _, dtype, _, _ in jobs)
    vector = math.gcd(16 // widest, *inners)
    rests, total = [], 0
    for (shape, source, dim, out), inner in zip(jobs, inners, strict=True):
        outer = math.prod(shape[:dim])
        blocks = -(-outer * inner // (vector * threads))
        rests.append((outer, shape[dim], inner, blocks, _TYPES[source], _TYPES[out]))
        total += blocks
    return _kernel("scan_sum", device, threads, ("VECTOR", vector)), total, threads, rests


def _sums(device: int, *jobs: tuple[Tensor, int, torch.dtype]) -> list[Tensor]:
    """Sums over one axis of contiguous tensors, in float32 and in order: tensor, axis, type of the sum."""
    outs = [v.new_empty(v.shape[:dim] + v.shape[dim + 1 :], dtype=dtype) for v, dim, dtype in jobs]
    key = [(v.shape, v.dtype, dim, dtype) for v, dim, dtype in jobs]
    function, blocks, threads, rests = _sums_layout(device, *key)
    packed = b"".join(
        _JOB.pack(v.data_ptr(), out.data_ptr(), *rest)
        for (v, _, _), out, rest in zip(jobs, outs, rests, strict=True)
    )
    if blocks:
        nvrtc.launch(function, blocks, threads, _SUM.pack(packed), device)
    return outs


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


def kept_dtype(dtype: torch.dtype, scans: int, N: int, *, shared: bool) -> torch.dtype | None:
    """Type of the states that a forward keeps for its backward, every EVERY steps, or None if they would take more memory
    than the inputs: delta, and x (``shared`` by the scans or not)."""
    inputs = dtype.itemsize * (1 + (1 / scans if shared else 1))
    if N * 4 / EVERY <= inputs:
        return torch.float32
    return dtype if dtype is torch.bfloat16 and N * 2 / EVERY <= inputs else None


def kept_states(x: Tensor, delta: Tensor, A: Tensor) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and type of the states that :func:`scan` keeps if asked, or None."""
    batch, length, K, channels = delta.shape
    dtype = kept_dtype(x.dtype, K, A.shape[-1], shared=x.shape[2] == 1)
    return None if dtype is None else ((batch, K, -(-length // EVERY), channels, A.shape[-1]), dtype)


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
    A, initial_state = _parameter(A), _parameter(initial_state)
    chosen = plan(*shape, N, _processors(device), backward=False)
    every, start_type = (0, torch.float32) if starts is None else (EVERY, starts.dtype)
    views = _signature(x), _signature(delta), _signature(B), _signature(C), None
    layout = _layout(chosen, _FORWARD, device, shape, N, delta_softplus, every, start_type, *views)
    batch, length, K, channels = shape
    y, last = x.new_empty(shape), A.new_empty((batch, K, channels, N))
    ends = sums = None
    if layout.segments > 1:
        ends, sums = A.new_empty((batch, K, layout.segments, channels, N)), A.new_empty((batch, K, layout.segments, channels))
    _launch(
        layout, chosen, device, x=x, delta=delta, B=B, C=C, A=A, D=_parameter(D), bias=_parameter(delta_bias),
        initial=initial_state, order=_order(order), ends=ends, sums=sums, starts=starts, y=y, last=last,
    )  # fmt: skip
    if merge:
        y = y[:, :, 0] if K == 1 else _sums(device, (y, 2, x.dtype))[0]
    return y, last


_FORWARD = ("scan_reach", "scan_carry", "scan_forward")
_STARTS = ("scan_reach", "scan_carry", "scan_starts")
_BACKWARD = ("scan_reach_back", "scan_carry_back", "scan_backward")


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
    A, order, gradient = _parameter(A), _order(order), _parameter(grad_state)
    chosen = plan(*shape, N, _processors(device), backward=True)
    dy = (grad_y[:, :, None] if merge else grad_y).expand(batch, length, -1, channels)
    views = _signature(x), _signature(delta), _signature(B), _signature(C), _signature(dy)
    kept = starts is not None and chosen.tile == EVERY
    if not kept:
        starts = A.new_empty((batch, K, -(-length // chosen.tile), channels, N))
    common = (device, shape, N, delta_softplus, chosen.tile, starts.dtype, *views)
    layout = _layout(chosen, _BACKWARD, *common)
    segments = layout.segments
    tensors = dict(x=x, delta=delta, B=B, C=C, dy=dy, A=A, D=_parameter(D), bias=_parameter(delta_bias), order=order)
    tensors |= dict(gradient=gradient, initial=_parameter(initial_state), starts=starts)
    if segments > 1:
        ends, sums = A.new_empty((batch, K, segments, channels, N)), A.new_empty((batch, K, segments, channels))
        tensors |= dict(ends=ends, sums=sums)
    if not kept:
        _launch(_layout(chosen, _STARTS, *common), chosen, device, **tensors)

    dx, ddelta = x.new_empty(shape), delta.new_empty(shape)
    dB, dC = (A.new_empty((layout.blocks, batch, length, K, N)) for _ in range(2))
    dA = A.new_empty((batch * segments, K, channels, N))
    dD, dbias = (A.new_empty((batch * segments, K, channels)) for _ in range(2))
    dinitial = A.new_empty((batch, K, channels, N))
    _launch(
        layout, chosen, device, last=dinitial, dx=dx, ddelta=ddelta, dA=dA, dD=dD, dbias=dbias, dB=dB, dC=dC, **tensors
    )
    f32 = torch.float32
    jobs = [(dB, 0, B.dtype), (dC, 0, C.dtype)]
    if batch * segments > 1:
        jobs += [(dA, 0, f32), (dD, 0, f32), (dbias, 0, f32)]
    if x.shape[2] == 1 and K > 1:
        jobs.append((dx, 2, x.dtype))
    dB, dC, *rest = _sums(device, *jobs)
    dA, dD, dbias = rest[:3] if batch * segments > 1 else (dA[0], dD[0], dbias[0])
    if x.shape[2] == 1 and K > 1:
        dx = rest[-1][:, :, None]
    return dx, ddelta, dA, dB, dC, dD, dbias, dinitial
