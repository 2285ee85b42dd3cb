"""The scan in CUDA C++ (scan.cu), compiled at first use by NVRTC."""

import ctypes
import functools
import math
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from mambavision.kernels import nvrtc

_SOURCE = pathlib.Path(__file__).with_name("scan.cu")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ENTRIES = {
    "scan_forward": "forward<false>",
    "scan_starts": "forward<true>",
    "scan_reach": "reach<false>",
    "scan_reach_back": "reach<true>",
    "scan_carry": "carry<false>",
    "scan_carry_back": "carry<true>",
    "scan_backward": "backward",
    "scan_sum": "sum",
}
_STRIDED = ("x", "delta", "B", "C", "dy")
_POINTERS = ("A", "D", "bias", "carry", "order", "ends", "sums", "starts", "y", "dx", "ddelta", "last")
_POINTERS += ("dA", "dD", "dbias", "dB", "dC")
_SIZES = ("batch", "length", "scans", "channels", "segments", "segment")


class _Strided(ctypes.Structure):
    _fields_ = (
        [("data", ctypes.c_void_p)]
        + [(n, ctypes.c_int64) for n in ("batch", "scan")]
        + [(n, ctypes.c_int) for n in ("token", "inner")]
    )


class _Call(ctypes.Structure):
    _fields_ = (
        [(n, _Strided) for n in _STRIDED]
        + [(n, ctypes.c_void_p) for n in _POINTERS]
        + [(n, ctypes.c_int64) for n in _SIZES]
        + [("row", ctypes.c_int)]
    )


class _Sum(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("source", "out")] + [
        (n, ctypes.c_int64) for n in ("outer", "terms", "inner")
    ]


class Plan(NamedTuple):
    """How a scan is laid over the GPU: ``split`` lanes a channel hold ``states`` each and take ``tile`` steps at once."""

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
    """Few lanes a channel while channels fill the GPU with 8 warps a processor; then segments of time, then more lanes."""
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
def _kernel(name: str, threads: int, device: int, *defines: tuple[str, int]) -> ctypes.c_void_p:
    defaults = dict.fromkeys(("N", "STATES", "SPLIT", "VECTOR", "RESIDENT"), 1) | {"TILE": 16}
    defaults |= dict.fromkeys(("POLYNOMIAL", "KEEP_DECAY", "SOFTPLUS", "IN_TYPE", "OUT_TYPE"), 0)
    defaults |= {f"{n.upper()}_{what}": 0 for n in _STRIDED for what in ("TYPE", "BY_TOKEN")}
    values = {"KERNEL": name, "ENTRY": _ENTRIES[name], "ARGUMENT": "Sum" if name == "scan_sum" else "Call"}
    values |= defaults | dict(defines, THREADS=threads)
    return nvrtc.kernel(_SOURCE, name, tuple(f"{n}={v}" for n, v in values.items()), device)


class _Scan:
    """The arguments that all kernels of one scan share."""

    def __init__(self, plan: Plan, shape: torch.Size, N: int, order: Tensor | None, softplus: bool) -> None:
        self.plan, self.N, self.shape = plan, N, shape
        batch, length, K, channels = shape
        self.order = None if order is None else order.to(torch.int32).contiguous()
        self.segments = -(-length // plan.segment)
        self.blocks = -(-channels // plan.channels)
        sizes = (batch, length, K, channels, self.segments, plan.segment)
        self.common = dict(zip(_SIZES, sizes, strict=True), order=self.order, row=K * channels)
        self.layout = tuple(zip(("N", "STATES", "SPLIT", "TILE"), (N, *plan[:3]), strict=True)) + (
            ("POLYNOMIAL", plan.polynomial),
            ("KEEP_DECAY", int(plan.keep_decay)),
            ("RESIDENT", plan.resident),
            ("SOFTPLUS", int(softplus)),
        )

    def launch(self, name: str, blocks: int | None = None, **arguments) -> None:
        """One block a (channel block, scan, segment, image), or as many as asked."""
        plan, (batch, _, K, _) = self.plan, self.shape
        call, types = _Call(), []
        for field, value in (self.common | arguments).items():
            if isinstance(value, Tensor) and field in _STRIDED:
                # in bytes; an axis of size 1 is broadcast
                size = value.element_size()
                strides = [s * size if n > 1 else 0 for s, n in zip(value.stride(), value.shape, strict=True)]
                if max(strides[1], strides[3]) >= 2**31:
                    raise ValueError(f"{field}'s strides {value.stride()} reach 2^31 bytes: make it contiguous")
                setattr(call, field, _Strided(value.data_ptr(), strides[0], strides[2], strides[1], strides[3]))
                types.append((f"{field.upper()}_TYPE", _TYPES[value.dtype]))
                types.append((f"{field.upper()}_BY_TOKEN", int(strides[1] == size != strides[3])))
            elif value is not None:
                setattr(call, field, value.data_ptr() if isinstance(value, Tensor) else value)
        device = arguments["A"].device.index
        function = _kernel(name, plan.threads, device, *self.layout, *types)
        nvrtc.launch(function, blocks or self.blocks * K * self.segments * batch, plan.threads, call, device)

    def carries(self, boundary: Tensor | None, adjoint: bool, **arguments) -> Tensor | None:
        """State before each segment, (batch, K, segments, D, N); ``adjoint``: gradient of the state after each."""
        if self.segments == 1:
            return boundary
        A = arguments["A"]
        batch, _, K, channels = self.shape
        ends = A.new_empty(batch, K, self.segments, channels, self.N)
        arguments |= dict(ends=ends, sums=A.new_empty(ends.shape[:-1]))
        back = "_back" if adjoint else ""
        self.launch("scan_reach" + back, **arguments)
        states = batch * K * channels * self.N
        sums = arguments["sums"]
        self.launch("scan_carry" + back, -(-states // self.plan.threads), A=A, carry=boundary, ends=ends, sums=sums)
        return ends


def _sum(source: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sum over one axis of a contiguous tensor, in float32 and in order."""
    outer, inner = math.prod(source.shape[:dim]), math.prod(source.shape[dim + 1 :])
    out = source.new_empty(source.shape[:dim] + source.shape[dim + 1 :], dtype=dtype)
    vector = math.gcd(inner, 16 // source.element_size())
    threads, device = 256, source.device.index
    defines = (("IN_TYPE", _TYPES[source.dtype]), ("OUT_TYPE", _TYPES[dtype]), ("VECTOR", vector))
    argument = _Sum(source.data_ptr(), out.data_ptr(), outer, source.shape[dim], inner)
    blocks = -(-outer * inner // (vector * threads))
    nvrtc.launch(_kernel("scan_sum", threads, device, *defines), blocks, threads, argument, device)
    return out


def _parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.detach().float().contiguous() for v in tensors]


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
    N = A.shape[-1]
    A, D, delta_bias, initial_state = _parameters(A, D, delta_bias, initial_state)
    run = _Scan(plan(*delta.shape, N, _processors(x.device.index), backward=False), delta.shape, N, order, delta_softplus)
    inputs = dict(x=x, delta=delta, A=A, bias=delta_bias)
    carry = run.carries(initial_state, False, B=B, **inputs)
    y, last = x.new_empty(delta.shape), A.new_empty(len(x), *A.shape)
    run.launch("scan_forward", B=B, C=C, D=D, carry=carry, y=y, last=last, **inputs)
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
    run = _Scan(plan(*delta.shape, N, _processors(x.device.index), backward=True), delta.shape, N, order, delta_softplus)
    dy = (grad_y[:, :, None] if merge else grad_y).expand(batch, length, -1, channels)
    inputs = dict(x=x, delta=delta, A=A, bias=delta_bias)

    starts = A.new_empty(batch, K, -(-length // run.plan.tile), channels, N)
    carry = run.carries(initial_state, False, B=B, **inputs)
    run.launch("scan_starts", B=B, carry=carry, starts=starts, **inputs)
    carry = run.carries(grad_state, True, **inputs | dict(x=dy, B=C))

    dx, ddelta = x.new_empty(delta.shape), torch.empty_like(delta, memory_format=torch.contiguous_format)
    dB, dC = (A.new_empty(run.blocks, batch, length, K, N) for _ in range(2))
    dA = A.new_empty(batch * run.segments, *A.shape)
    dD, dbias = (A.new_empty(batch * run.segments, K, channels) for _ in range(2))
    dinitial = A.new_empty(batch, *A.shape)
    run.launch(
        "scan_backward", B=B, C=C, D=D, dy=dy, carry=carry, starts=starts, last=dinitial,
        dx=dx, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias, **inputs,
    )  # fmt: skip
    if x.shape[2] == 1 and K > 1:
        dx = _sum(dx, 2, x.dtype)[:, :, None]
    dB, dC = _sum(dB, 0, B.dtype), _sum(dC, 0, C.dtype)
    return dx, ddelta, dA.sum(0), dB, dC, dD.sum(0), dbias.sum(0), dinitial
