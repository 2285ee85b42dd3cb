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
    "scan_sum": "sum",
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# scan.cu's Call and Sum: fields, then their layout
_STRIDED = ("x", "delta", "B", "C", "dy")
_POINTERS = ("A", "D", "bias", "carry", "order", "ends", "sums", "starts", "y", "dx", "ddelta", "last")
_POINTERS += ("dA", "dD", "dbias", "dB", "dC")
_CALL = struct.Struct("Pqqii" * len(_STRIDED) + "P" * len(_POINTERS) + "qqqqqqi0q")
_SUM = struct.Struct("PPqqq")


class _Strided(NamedTuple):
    """A (batch, L, K, inner) tensor for a kernel: address, strides in bytes (0 along axes of size 1), type, whether its
    tokens are neighbours in memory."""

    address: tuple[int, int, int, int, int]
    type: int
    by_token: int


_ABSENT = _Strided((0,) * 5, 0, 0)


def _strided(v: Tensor) -> _Strided:
    size = v.element_size()
    batch, token, scan, inner = (s * size if n > 1 else 0 for s, n in zip(v.stride(), v.shape, strict=True))
    if max(token, inner) >= 2**31:
        raise ValueError(f"strides {v.stride()} of a {v.dtype} tensor reach 2^31 bytes: make it contiguous")
    return _Strided((v.data_ptr(), batch, scan, token, inner), _TYPES[v.dtype], int(token == size != inner))


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

    split = min(most, max(fewest, padded // (4 if backward else 16)))
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
    values |= dict.fromkeys(("POLYNOMIAL", "KEEP_DECAY", "SOFTPLUS", "IN_TYPE", "OUT_TYPE"), 0)
    values |= {f"{n.upper()}_{what}": 0 for n in _STRIDED for what in ("TYPE", "BY_TOKEN")}
    return nvrtc.kernel(_SOURCE, name, tuple(f"{n}={v}" for n, v in (values | dict(defines)).items()), device)


@functools.cache
def _scan_kernel(name: str, device: int, plan: Plan, N: int, softplus: bool, views: tuple[int, ...]) -> ctypes.c_void_p:
    """``views``: type and by_token of each of _STRIDED."""
    defines = {"N": N, "STATES": plan.states, "SPLIT": plan.split, "TILE": plan.tile, "RESIDENT": plan.resident}
    defines |= {"POLYNOMIAL": plan.polynomial, "KEEP_DECAY": int(plan.keep_decay), "SOFTPLUS": int(softplus)}
    names = [f"{n.upper()}_{what}" for n in _STRIDED for what in ("TYPE", "BY_TOKEN")]
    return _kernel(name, device, plan.threads, *defines.items(), *zip(names, views, strict=True))


class _Scan:
    """What all kernels of one scan share."""

    def __init__(self, plan: Plan, shape: torch.Size, A: Tensor, softplus: bool) -> None:
        self.plan, self.softplus, self.device = plan, softplus, A.device.index
        self.batch, length, self.K, self.channels = shape
        self.N = A.shape[-1]
        self.segments = -(-length // plan.segment)
        self.blocks = -(-self.channels // plan.channels)
        row = self.K * self.channels
        self.sizes = (self.batch, length, self.K, self.channels, self.segments, plan.segment, row)

    def launch(self, name: str, blocks: int | None = None, **arguments: _Strided | Tensor | None) -> None:
        """One block a (channel block, scan, segment, image), or as many as asked."""
        values, views = [], []
        for field in _STRIDED:
            view = arguments.get(field, _ABSENT)
            values += view.address
            views += view[1:]
        for field in _POINTERS:
            tensor = arguments.get(field)
            values.append(0 if tensor is None else tensor.data_ptr())
        function = _scan_kernel(name, self.device, self.plan, self.N, self.softplus, tuple(views))
        blocks = blocks or self.blocks * self.K * self.segments * self.batch
        nvrtc.launch(function, blocks, self.plan.threads, _CALL.pack(*values, *self.sizes), self.device)

    def carries(self, boundary: Tensor | None, adjoint: bool, **arguments) -> Tensor | None:
        """State before each segment, (batch, K, segments, D, N); ``adjoint``: gradient of the state after each."""
        if self.segments == 1:
            return boundary
        A, back = arguments["A"], "_back" if adjoint else ""
        ends = A.new_empty(self.batch, self.K, self.segments, self.channels, self.N)
        sums = A.new_empty(ends.shape[:-1])
        self.launch("scan_reach" + back, ends=ends, sums=sums, **arguments)
        states = self.batch * self.K * self.channels * self.N
        self.launch("scan_carry" + back, -(-states // self.plan.threads), A=A, carry=boundary, ends=ends, sums=sums)
        return ends


def _sum(source: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sum over one axis of a contiguous tensor, in float32 and in order."""
    outer, inner = math.prod(source.shape[:dim]), math.prod(source.shape[dim + 1 :])
    out = source.new_empty(source.shape[:dim] + source.shape[dim + 1 :], dtype=dtype)
    vector, threads, device = math.gcd(inner, 16 // source.element_size()), 256, source.device.index
    types = (("IN_TYPE", _TYPES[source.dtype]), ("OUT_TYPE", _TYPES[dtype]), ("VECTOR", vector))
    argument = _SUM.pack(source.data_ptr(), out.data_ptr(), outer, source.shape[dim], inner)
    blocks = -(-outer * inner // (vector * threads))
    nvrtc.launch(_kernel("scan_sum", device, threads, *types), blocks, threads, argument, device)
    return out


def _parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.detach().float().contiguous() for v in tensors]


def _order(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.to(torch.int32).contiguous()


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
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`reference.scan`, for float32, bfloat16 and float16 on an NVIDIA GPU, N up to 128."""
    A, D, delta_bias, initial_state = _parameters(A, D, delta_bias, initial_state)
    chosen = plan(*delta.shape, A.shape[-1], _processors(x.device.index), backward=False)
    run = _Scan(chosen, delta.shape, A, delta_softplus)
    inputs = dict(x=_strided(x), delta=_strided(delta), A=A, B=_strided(B), bias=delta_bias, order=_order(order))
    carry = run.carries(initial_state, False, **inputs)
    y, last = x.new_empty(delta.shape), A.new_empty(len(x), *A.shape)
    run.launch("scan_forward", C=_strided(C), D=D, carry=carry, y=y, last=last, **inputs)
    if merge:
        y = y[:, :, 0] if y.shape[2] == 1 else _sum(y, 2, x.dtype)
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
) -> tuple[Tensor, ...]:
    """Gradients of x, delta, A, B, C, D, delta_bias and initial_state; states are recomputed, none are kept."""
    batch, length, K, channels = delta.shape
    N = A.shape[-1]
    A, D, delta_bias, initial_state, grad_state = _parameters(A, D, delta_bias, initial_state, grad_state)
    run = _Scan(plan(*delta.shape, N, _processors(x.device.index), backward=True), delta.shape, A, delta_softplus)
    dy = _strided((grad_y[:, :, None] if merge else grad_y).expand(batch, length, -1, channels))
    inputs = dict(x=_strided(x), delta=_strided(delta), A=A, B=_strided(B), bias=delta_bias, order=_order(order))
    C_view = _strided(C)

    starts = A.new_empty(batch, K, -(-length // run.plan.tile), channels, N)
    carry = run.carries(initial_state, False, **inputs)
    run.launch("scan_starts", carry=carry, starts=starts, **inputs)
    carry = run.carries(grad_state, True, **inputs | dict(x=dy, B=C_view))

    dx, ddelta = x.new_empty(delta.shape), torch.empty_like(delta, memory_format=torch.contiguous_format)
    dB, dC = (A.new_empty(run.blocks, batch, length, K, N) for _ in range(2))
    dA = A.new_empty(batch * run.segments, *A.shape)
    dD, dbias = (A.new_empty(batch * run.segments, K, channels) for _ in range(2))
    dinitial = A.new_empty(batch, *A.shape)
    run.launch(
        "scan_backward", C=C_view, D=D, dy=dy, carry=carry, starts=starts, last=dinitial,
        dx=dx, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias, **inputs,
    )  # fmt: skip
    if x.shape[2] == 1 and K > 1:
        dx = _sum(dx, 2, x.dtype)[:, :, None]
    dB, dC = _sum(dB, 0, B.dtype), _sum(dC, 0, C.dtype)
    return dx, ddelta, dA.sum(0), dB, dC, dD.sum(0), dbias.sum(0), dinitial
