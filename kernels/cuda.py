"""The scan in CUDA C++ (scan.cu and scan_merged.cu behind intrinsics.cuh, scan.cuh), compiled at first use by NVRTC."""

import functools
import itertools
import math
import operator
import pathlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mambavision.kernels import nvrtc

_SOURCES = tuple(pathlib.Path(__file__).with_name(name) for name in ("intrinsics.cuh", "scan.cuh", "scan.cu"))
_MERGING = (*_SOURCES[:2], pathlib.Path(__file__).with_name("scan_merged.cu"))
_ENTRIES = {
    "scan_forward": "forward<false>",
    "scan_starts": "forward<true>",
    "scan_reach": "reach<false>",
    "scan_reach_back": "reach<true>",
    "scan_carry": "carry<false>",
    "scan_carry_back": "carry<true>",
    "scan_backward": "backward<>",
    "scan_sum": "sums",
    "scan_merged_states": "ordered_states",
    "scan_merged": "merged_forward",
    "scan_merged_back": "merged_backward",
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VIEWED = ("x", "delta", "B", "C", "dy", "z")
_REST = struct.Struct("qqii" * len(_VIEWED) + "qqqqqqi0q")  # the rest of scan.cu's Call: its views, its sizes
_MOST_SUMS = 6
_SHAPE = struct.Struct("qqqqqqii")  # of a sum
_ENDS = struct.Struct(f"{2 * _MOST_SUMS}P")  # addresses of sums: from, then to
# scan.cu's Call begins with what the operator is given, in its order; then a forward's pointers, then a backward's
_GIVEN = ("x", "delta", "A", "B", "C", "D", "bias", "initial", "order", "z")
_OF_FORWARD = ("y", "last", "starts", "ends", "sums")
_OF_BACKWARD = ("dy", "gradient", "dx", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")
_FORWARD = struct.Struct(f"{len(_GIVEN + _OF_FORWARD)}P{8 * len(_OF_BACKWARD)}x")
_BACKWARD = struct.Struct(f"{len(_GIVEN + _OF_FORWARD + _OF_BACKWARD)}P")


class Plan(NamedTuple):
    """How a scan is laid over the GPU: ``split`` lanes a channel hold ``states`` each, ``tile`` steps at once."""

    states: int
    split: int
    tile: int
    threads: int
    segment: int
    keep_decay: bool = False
    resident: int = 1
    scans: int = 1

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.threads // (self.split * self.scans)

    @property
    def partials(self) -> int:
        """Bytes of a backward's buffers of a tile's dB and dC, of four channels at a time; one warp needs but one."""
        warps = self.threads // 32
        subsets = min(2, warps) * warps * max(1, 8 // self.split)
        return 4 * subsets * (self.tile * (2 * self.states * self.split + 4) + 16)

    def steps(self, gated: bool) -> int:
        """Bytes of shared memory that a backward declares: of every step dt, x, dy, slope and gate; B, C and rows."""
        of_warps = self.threads // 32 * self.tile * (32 // self.split + 1) * (24 if gated else 16)
        return of_warps + self.tile * (16 * self.states * self.split + 16)

    def fitting(self, gated: bool, shared: int) -> "Plan":
        """A backward of as many threads as a block's ``shared`` bytes, and the declared ones' limit, allow."""
        chosen = self
        while chosen.threads > 32 and (chosen.steps(gated) > _STATIC or chosen.steps(gated) + chosen.partials > shared):
            chosen = chosen._replace(threads=chosen.threads - 32)
        return chosen


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile(N: int) -> int:
    """Steps of a backward's tile, which begins at a kept state."""
    return 8 if N == 1 else 16


@functools.lru_cache(4096)
def plan(batch: int, length: int, scans: int, channels: int, N: int, processors: int, *, backward: bool) -> Plan:
    """Few lanes a channel while that fills the GPU with 8 warps a processor; then segments of time; then more lanes.

    Where 8 states a lane or kept decays begin to pay is measured on an H100 (README.md).
    """
    padded, wanted = _power_of_two(N), 8 * processors
    fewest, most, enough = max(1, padded // 16), min(padded, 16), 15 / 16 * wanted

    def warps(split: int) -> float:
        return batch * scans * channels * split / 32

    split = min(most, max(fewest, padded // (4 if backward and padded > 4 else 2 if backward else 16)))
    while split < most and padded // split > 4:
        each = padded // split
        if warps(split) >= wanted or (each == 8 and warps(split) * (2 if length >= 1024 else 1) >= enough):
            break
        split *= 2
    roomy = backward and padded == 16 and length >= 1024
    segments = math.ceil(wanted / warps(split) - 1 / 8)
    if roomy and segments > 1 and not (segments <= 4 and enough <= segments * warps(split) <= wanted):
        segments = int(2.95 * wanted / warps(split))  # just under three waves of blocks
    segments = max(1, min(segments, length // 256))
    while split < most and segments == 1 and warps(split) < enough:
        split *= 2
    states = padded // split
    tile = _tile(N) if backward else 16
    blocks = -(-channels * split // (32 if backward and padded > 64 else 128))
    threads = -(-channels * split // (32 * blocks)) * 32
    segment = -(-length // (segments * tile)) * tile
    lone = backward and N == 1
    # with two blocks a processor the 16 steps x 4 states of decays of a tile fit into a lane's registers
    keep = lone or (backward and padded == 16 and states == 4)
    resident = (480 if lone else 256 if keep else 384 if backward or states == 16 else 512) // threads
    return Plan(states, split, tile, threads, segment, keep_decay=keep, resident=resident)


@functools.lru_cache(4096)
def team_plan(batch: int, length: int, scans: int, channels: int, N: int, processors: int, shared: int) -> Plan | None:
    """A warp for each scan in a block, whose outputs add up on chip: one launch for a small call. None for others.

    ``shared``: bytes of shared memory a block may have.
    """
    padded = _power_of_two(N)
    split = max(1, min(padded, 16) // 2)
    blocks = batch * -(-channels * split // 32)
    sums = scans * length * 32 // split * 4
    few = 1 < scans <= 8 and scans * padded <= 128 and blocks <= 3 / 2 * processors
    if not few or length >= 512 or sums > shared - _STATIC:
        return None
    return Plan(padded // split, split, 16, 32 * scans, -(-length // 16) * 16, scans=scans)


_STATIC = 48 << 10  # bytes of shared memory that a kernel declares, at most


class Merged(NamedTuple):
    """How scan_merged.cu is laid over the GPU, in blocks of 16 channels."""

    threads: int
    resident: int


_GROUP = 16  # channels of a merging block


@functools.lru_cache(4096)
def merged_plan(
    batch: int, length: int, channels: int, row: int, processors: int, shared: int, *, backward: bool
) -> Merged | None:
    """How to sum the scans of one state a channel on chip, or None where that does not fit or leave the GPU idle.

    ``row``: bytes of a token's 16 channels in all that is copied; ``shared``: bytes of shared memory a block may have.
    """
    blocks = batch * channels // _GROUP
    if channels % _GROUP or length >= 2**24 or blocks < 7 / 8 * processors or shared <= _WITHOUT_COPIES:
        return None
    spans = -(-length // 32)  # of a warp
    each = 32 * row + (1152 if backward else 448)
    wanted = max(2, 15 // max(1, shared // _sums(length)))
    if backward and length <= 1600:
        wanted = 2 if spans <= 8 else 4
    most = min(wanted, (shared - _sums(length) - 1152) // each)
    if most < min(spans, wanted, 4):
        return None
    warps = -(-spans // -(-spans // most))
    return Merged(32 * warps, max(1, (256 if backward else 512) // (32 * warps)))


_WITHOUT_COPIES = 96 << 10  # bytes of shared memory of the largest GPU without asynchronous copies, sm_70


_ORDERED = 1024  # steps from which B and C are ordered first: sums leave the L1 cache little


def _sums(length: int) -> int:
    """Bytes of a merging block's sums."""
    return -(-length // 2) * 2 * _GROUP * 4


def unavailable() -> str | None:
    """Why CUDA kernels cannot be compiled here, or None if they can."""
    return nvrtc.unavailable()


@functools.lru_cache(4096)
def _kernel(name: str, device: int, threads: int, *defines: tuple[str, int], shared: int = 0) -> nvrtc.Kernel:
    values = {"KERNEL": name, "ENTRY": _ENTRIES[name], "ARGUMENT": "Sum" if name == "scan_sum" else "Call"}
    values |= dict.fromkeys(("N", "STATES", "SPLIT", "VECTOR", "WIDE", "RESIDENT", "SCANS"), 1)
    values |= {"TILE": 16, "THREADS": threads}
    values |= dict.fromkeys(("KEEP_DECAY", "SOFTPLUS", "GATED", "ORDERED", "EVERY", "START_TYPE"), 0)
    values |= {f"{n.upper()}_{what}": 0 for n in _VIEWED for what in ("TYPE", "BY_TOKEN")}
    options = tuple(f"{n}={v}" for n, v in (values | dict(defines)).items())
    return nvrtc.kernel(_MERGING if "merged" in name else _SOURCES, name, options, device, shared)


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


class _Call(NamedTuple):
    """What a call's layout depends on: ``views`` holds shape, strides and dtype of each of _VIEWED.

    ``merge``: y or dx is one sum over the scans; ``start_type``: of kept states, None without; ``aligned``: the
    addresses of x and delta suit a merging kernel; ``pitch``: elements from one scan's dB and dC to the next's, 0 if
    they are contiguous; ``skips``, ``biased``: the gradients of D and delta_bias are asked for.
    """

    device: int
    backward: bool
    merge: bool
    N: int
    softplus: bool
    start_type: torch.dtype | None
    aligned: bool
    views: tuple[tuple | None, ...]
    pitch: int = 0
    skips: bool = False
    biased: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """batch, length, scans, channels."""
        return self.views[1][0]

    def bytes(self) -> list[int]:
        """Strides of all views."""
        return [n for view in self.views for n in (_View(*view).bytes() if view else (0,) * 4)]

    def defines(self) -> dict[str, int]:
        """What all its kernels look at."""
        views = ((name, view) for name, view in zip(_VIEWED, self.views, strict=True) if view)
        return {"N": self.N, "SOFTPLUS": int(self.softplus), "GATED": int(self.views[5] is not None)} | dict(
            define for name, view in views for define in _View(*view).defines(name)
        )


class _Layout(NamedTuple):
    """All of a call but its addresses.

    Kernels with their blocks and threads; the end of their argument; the floats of a scratch buffer and the byte where
    each of its parts begins; the sums that follow: kernel, blocks, the end of its argument. ``merges``: the last of the
    sums, and of the scratch buffer's parts, are the scans' outputs.
    """

    launches: tuple[tuple[nvrtc.Kernel, int, int], ...]
    rest: bytes
    scratch: int = 0
    offsets: tuple[int, ...] = (0, 0, 0)
    sums: tuple[nvrtc.Kernel, int, bytes] | None = None
    merges: bool = False


_SUM_THREADS = 256


def _layout(call: _Call) -> _Layout:
    merged = _merged(call)
    return _merged_layout(call, merged) if merged else _scan_layout(call)


def _scan_layout(call: _Call) -> _Layout:
    device, backward, merge, N, _, start_type, _, views, pitch, _, _ = call
    batch, length, K, channels = call.shape
    processors, chosen = nvrtc.processors(device), None
    if merge and not backward:
        chosen = team_plan(batch, length, K, channels, N, processors, nvrtc.shared_memory(device))
    chosen = chosen or plan(batch, length, K, channels, N, processors, backward=backward)
    if backward:
        chosen = chosen.fitting(views[5] is not None, nvrtc.shared_memory(device))
    segments, blocks = -(-length // chosen.segment), -(-channels // chosen.channels)
    wide = _wide(chosen, batch * K * segments, channels, views[5] is not None, device) if backward else chosen
    kept = start_type is not None
    if backward and not kept:  # computed again, in the type that they would be kept in
        start_type = torch.bfloat16 if views[0][2] is torch.bfloat16 and N > 1 else torch.float32
    every = chosen.tile if backward else _tile(N) if kept else 0
    defines = call.defines() | {"STATES": chosen.states, "SPLIT": chosen.split, "TILE": chosen.tile}
    defines |= {"RESIDENT": chosen.resident, "KEEP_DECAY": int(chosen.keep_decay)}
    if backward:
        names = ("scan_reach_back", "scan_carry_back", "scan_backward")
        names = names if kept else ("scan_reach", "scan_carry", "scan_starts", *names)
    else:
        names = ("scan_reach", "scan_carry", "scan_forward")
    launches = []
    for name in names:
        whole, shared, keeps = blocks * K * segments * batch, 0, {}
        chains = name in ("scan_carry", "scan_carry_back")
        if chains:
            whole = -(-batch * K * channels * N // chosen.threads)
        if segments == 1 and (chains or "reach" in name):
            continue
        if not (chains or "reach" in name):  # what a kernel does not look at shall not compile it again
            keeps = {"EVERY": every, "START_TYPE": _TYPES[start_type or torch.float32]}
        if chosen.scans > 1:
            keeps["SCANS"], whole, shared = K, blocks * batch, K * length * chosen.channels * 4
        threads = chosen.threads
        if name == "scan_backward":
            keeps["RESIDENT"], threads, shared = wide.resident, wide.threads, wide.partials
            blocks = -(-channels // wide.channels)
            whole = blocks * K * segments * batch
        kernel = _kernel(name, device, threads, *(defines | keeps).items(), shared=shared)
        launches.append((kernel, whole, threads))

    states, tokens, f32 = batch * K * channels, batch * length * K, torch.float32
    x, _, B, C, _, _ = (torch.float32 if view is None else view[2] for view in views)
    floats = [states * segments * N * (segments > 1), states * segments * (segments > 1)]  # ends, sums
    jobs = []  # outer, terms, inner, type, type of the sum, and its row and pitch where it is not contiguous
    if backward:
        pieces, row = batch * segments, K * channels
        starts = 0 if kept else -(-states * -(-length // every) * N * start_type.itemsize // 4)
        floats += [starts, *[blocks * tokens * N] * 2]  # starts, dB, dC
        floats += [pieces * row * N, pieces * row, pieces * row]  # dA, dD, dbias
        jobs = [(1, blocks, tokens * N, f32, v, N, pitch) for v in (B, C)]
        jobs += [(1, pieces, row * N, f32, f32), *[(1, pieces, row, f32, f32)] * (call.skips + call.biased)]
    merges = merge and K > 1 and chosen.scans == 1
    if merges:
        floats.append(-(-tokens * channels * x.itemsize // 4))  # y or dx
        jobs.append((batch * length, K, channels, x, x))
    offsets = _offsets(floats)
    rest = _REST.pack(*call.bytes(), batch, length, K, channels, segments, chosen.segment, K * channels)
    return _Layout(tuple(launches), rest, offsets[-1] // 4, offsets, _summing(device, jobs), merges)


def _wide(chosen: Plan, scans: int, channels: int, gated: bool, device: int) -> Plan:
    """A backward of one block a processor in place of two, where all are there at once: half as many parts of dB, dC.

    In more than one wave two smaller blocks are faster.
    """
    lanes = channels * chosen.split
    if chosen.threads != 128 or chosen.resident != 2 or lanes % 256 or scans * lanes // 256 > nvrtc.processors(device):
        return chosen
    wide = chosen._replace(threads=256, resident=1)
    return wide if wide == wide.fitting(gated, nvrtc.shared_memory(device)) else chosen


def _merged(call: _Call) -> Merged | None:
    """The plan of scan_merged.cu where it can serve: merged, one state, channels side by side at addresses it reads."""
    x, delta, B, C, dy, _ = call.views
    batch, length, K, channels = call.shape
    if not call.merge or not call.aligned or call.N > 1 or x[0][2] > 1 or K * length >= 2**31 or call.views[5]:
        return None
    if call.backward and (call.start_type is None or dy[0][2] > 1 or dy[2] is not x[2]):
        return None
    copied = (x, delta, dy) if call.backward else (x, delta)
    for view in copied:
        *strides, inner = _View(*view).bytes()
        if inner != view[2].itemsize or any(s % 16 for s in strides):
            return None
    if max(_View(*view).bytes()[1] for view in (delta, B, C)) >= 2**31:
        return None
    row, processors = sum(_GROUP * view[2].itemsize for view in copied), nvrtc.processors(call.device)
    shared = nvrtc.shared_memory(call.device)
    return merged_plan(batch, length, channels, row, processors, shared, backward=call.backward)


def _merged_layout(call: _Call, chosen: Merged) -> _Layout:
    batch, length, K, channels = call.shape
    groups, tokens, row, f32 = channels // _GROUP, batch * length * K, K * channels, torch.float32
    defines = call.defines() | {"RESIDENT": chosen.resident}
    if call.start_type:
        defines |= {"EVERY": _tile(1), "START_TYPE": _TYPES[call.start_type]}
    name = "scan_merged_back" if call.backward else "scan_merged"
    copied = sum(view[2].itemsize for i, view in enumerate(call.views) if i in (0, 1, 4) and view)
    shared = _sums(length) + chosen.threads * _GROUP * copied  # a stage of 32 steps a warp
    ordered = length >= _ORDERED
    launches = []
    if ordered:
        kernel = _kernel("scan_merged_states", call.device, _SUM_THREADS, *call.defines().items())
        launches.append((kernel, -(-tokens // _SUM_THREADS), _SUM_THREADS))
        defines |= {"ORDERED": 1}
    kernel = _kernel(name, call.device, chosen.threads, *defines.items(), shared=shared)
    launches = (*launches, (kernel, batch * groups, chosen.threads))
    rest = _REST.pack(*call.bytes(), batch, length, K, channels, 1, length, row)
    floats = (2 * tokens * ordered, 0)  # B and C, which c.ends points to
    if not call.backward:
        offsets = _offsets(floats)
        return _Layout(launches, rest, offsets[-1] // 4, offsets)
    floats = (*floats, 0, groups * tokens, groups * tokens, *(batch * row,) * 3)  # as in _scan_layout
    jobs = [(1, groups, tokens, f32, view[2], 1, call.pitch) for view in call.views[2:4]]
    jobs += [(1, batch, row, f32, f32)] * (1 + call.skips + call.biased)
    offsets = _offsets(floats)
    return _Layout(launches, rest, offsets[-1] // 4, offsets, _summing(call.device, jobs))


def _offsets(floats: Iterable[int]) -> tuple[int, ...]:
    """Bytes where parts of a buffer begin, and its end."""
    return tuple(itertools.accumulate((-(-count // 64) * 256 for count in floats), initial=0))


def _summing(device: int, jobs: list[tuple]) -> tuple | None:
    if not jobs:
        return None
    wide, rests = {4: 4, 2: 8}, []
    for _, _, inner, source, _, *strides in jobs:
        strided = strides if strides and strides[1] else ()
        wide[source.itemsize] = math.gcd(wide[source.itemsize], inner, *strided)
    for outer, terms, inner, source, out, *strides in jobs:
        blocks = -(-outer * inner // (wide[source.itemsize] * _SUM_THREADS))
        row, pitch = strides if strides and strides[1] else (0, 0)
        rests.append((outer, terms, inner, blocks, row, pitch, _TYPES[source], _TYPES[out]))
    function = _kernel("scan_sum", device, _SUM_THREADS, ("VECTOR", wide[4]), ("WIDE", wide[2]), ("RESIDENT", 4))
    shapes = b"".join(_SHAPE.pack(*rest) for rest in rests)
    return function, sum(rest[3] for rest in rests), shapes.ljust(_MOST_SUMS * _SHAPE.size, b"\0")


def _sum(layout: _Layout, device: int, ends: list[tuple[int, int]]) -> None:
    """The layout's sums, from one address to another."""
    function, blocks, rest = layout.sums
    sources, sums = zip(*ends, *[(0, 0)] * (_MOST_SUMS - len(ends)), strict=True)
    nvrtc.launch(function, blocks, _SUM_THREADS, _ENDS.pack(*sources, *sums) + rest, device)


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _parameter(v: Tensor | None) -> Tensor | None:
    """In float32, contiguous, at an address from which 16 bytes can be read at once."""
    if v is None:
        return None
    if v.dtype is not torch.float32 or not v.is_contiguous():
        v = v.float().contiguous()
    return v.clone() if v.data_ptr() % 16 else v


def _order(order: Tensor | None) -> Tensor | None:
    if order is None or (order.dtype is torch.int32 and order.is_contiguous()):
        return order
    return order.to(torch.int32).contiguous()


def layout_of(v: Tensor) -> tuple:
    """Shape, strides and dtype."""
    return v.shape, v.stride(), v.dtype


def kept_states(x: Tensor, delta: Tensor, A: Tensor) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and type of the states that :func:`scan` keeps if asked: (batch, K, ceil(L / tile of the backward), D, N).

    None where they would take more memory than x and delta, which are kept anyway.
    """
    return _kept_states(delta.shape, x.dim() == 3 or x.shape[2] == 1, A.shape[-1], x.dtype, delta.dtype)


def _kept_states(
    shape: tuple[int, ...], one_x: bool, N: int, x: torch.dtype, delta: torch.dtype
) -> tuple[tuple[int, ...], torch.dtype] | None:
    batch, length, K, channels = shape
    every = _tile(N)
    inputs = every * (delta.itemsize + x.itemsize * (1 / K if one_x else 1))
    if N * 4 <= inputs:
        dtype = torch.float32
    elif x is torch.bfloat16 and N * 2 <= inputs:
        dtype = torch.bfloat16
    else:
        return None
    return (batch, K, -(-length // every), channels, N), dtype


def _ready(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Parameters in float32, the order in int32, all of them contiguous and aligned."""
    x, delta, A, B, C, D, bias, initial, order, z = tensors
    A, D, bias, initial = _parameter(A), _parameter(D), _parameter(bias), _parameter(initial)
    return x, delta, A, B, C, D, bias, initial, _order(order), z


def _of_all_scans(layout: tuple) -> tuple:
    """Of (batch, L, D) as (batch, L, 1, D)."""
    (batch, length, channels), (outer, token, inner), dtype = layout
    return (batch, length, 1, channels), (outer, token, 0, inner), dtype


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    dense = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
    return all(n == 1 or have == want for n, have, want in zip(reversed(shape), reversed(strides), dense, strict=True))


class Scans:
    """K scans of tensors that lie in memory in one way: what does not depend on addresses is worked out once.

    ``layouts``: shape, strides and dtype of x, delta, A, B, C, D, delta_bias, initial_state, order and z, None for one
    that is not there; the methods' ``tensors`` are these. x is (batch, L, D), for all scans, or as in :func:`scan`.
    :func:`scans_of` remembers them.
    """

    def __init__(self, device: int, softplus: bool, merge: bool, *layouts: tuple | None) -> None:
        x, delta, A, B, C, D, bias, initial, order, z = layouts
        wanted = [(v, torch.float32) for v in (A, D, bias, initial)] + [(order, torch.int32)]
        self._ready = all(v is None or (v[2] is dtype and _contiguous(*v[:2])) for v, dtype in wanted)
        self._options = device, softplus, merge
        self._x_shape, self._shape = tuple(x[0]), tuple(delta[0])
        batch, length, K, channels = self._shape
        self._y_shape = (batch, length, channels) if merge else self._shape
        self._state_shape = batch, K, channels, A[0][-1]
        self._views = (_of_all_scans(x) if len(x[0]) == 3 else x, delta, B, C), z
        self._given = D is not None, bias is not None
        self._kept = _kept_states(self._shape, self._views[0][0][0][2] == 1, A[0][-1], x[2], delta[2])
        self._layouts: dict[tuple, _Layout] = {}

    @property
    def merge(self) -> bool:
        """Whether y is one sum over the scans."""
        return self._options[2]

    def kept(self, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        """Where a forward keeps states for its backward, if it is to."""
        return None if self._kept is None else tensors[0].new_empty(self._kept[0], dtype=self._kept[1])

    def _layout(
        self, start_type: torch.dtype | None, aligned: bool, dy: tuple | None = None, pitch: int = 0
    ) -> _Layout:
        (device, softplus, merge), (views, z), back = self._options, self._views, dy is not None
        dy = _of_all_scans(dy) if back and merge else dy
        merge = views[0][0][2] == 1 if back else merge
        views, N = (*views, dy, z), self._state_shape[-1]
        return _layout(_Call(device, back, merge, N, softplus, start_type, aligned, views, pitch, *self._given))

    def _addresses(self, tensors: tuple[Tensor | None, ...]) -> list[int] | None:
        """Of the tensors, None where they have to be copied first."""
        found = [0 if v is None else v.data_ptr() for v in tensors]
        _, _, A, _, _, D, bias, initial, _, _ = found
        return None if not self._ready or (A | D | bias | initial) % 16 else found

    def forward(
        self, tensors: tuple[Tensor | None, ...], starts: Tensor | None = None, want_state: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """y and the last state, None without ``want_state``; ``starts`` as in :func:`scan`."""
        given = self._addresses(tensors)
        if given is None:
            tensors = _ready(tensors)
            return _scans(tensors, *self._options[1:]).forward(tensors, starts, want_state)
        x, _, A, *_ = tensors
        y = x.new_empty(*self._y_shape)
        last = A.new_empty(*self._state_shape) if want_state else None
        if not self._shape[0]:
            return y, last
        key = None if starts is None else starts.dtype, not (given[0] | given[1]) % 16
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._layout(*key)
        scratch = A.new_empty(layout.scratch) if layout.scratch else None
        ends, to_y, device = _address(scratch), y.data_ptr(), self._options[0]
        to = ends + layout.offsets[2] if layout.merges else to_y
        argument = _FORWARD.pack(*given, to, _address(last), _address(starts), ends, ends + layout.offsets[1])
        argument += layout.rest
        for function, blocks, threads in layout.launches:
            nvrtc.launch(function, blocks, threads, argument, device)
        if layout.merges:
            _sum(layout, device, [(to, to_y)])
        return y, last

    def backward(
        self,
        dy: Tensor,
        gradient: Tensor | None,
        tensors: tuple[Tensor | None, ...],
        starts: Tensor | None = None,
        *,
        dx: Tensor | None = None,
        dB: Tensor | None = None,
        dC: Tensor | None = None,
        overwrite_delta: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of all but the order, None of what is not there; options as in :func:`scan_backward`."""
        given = self._addresses(tensors)
        if given is None:
            tensors, to = _ready(tensors), {"dx": dx, "dB": dB, "dC": dC, "overwrite_delta": overwrite_delta}
            return _scans(tensors, *self._options[1:]).backward(dy, gradient, tensors, starts, **to)
        x, delta, A, B, C, D, bias, initial, _, z = tensors
        batch, length, K, _ = self._shape
        pitch = 0 if dB is None else dB.stride(2)
        if dB is None:
            token = batch, length, K, self._state_shape[-1]
            dB, dC = B.new_empty(*token), C.new_empty(*token)
        dx = x.new_empty(*self._x_shape) if dx is None else dx
        ddelta = delta if overwrite_delta and delta.is_contiguous() else delta.new_empty(*self._shape)
        dA = torch.empty_like(A)
        dD = None if D is None else torch.empty_like(D)
        dbias = None if bias is None else torch.empty_like(bias)
        dinitial = None if initial is None else A.new_empty(*self._state_shape)
        dz = None if z is None else z.new_empty(*self._shape)
        gradients = dx, ddelta, dA, dB, dC, dD, dbias, dinitial, dz
        if not batch:
            return *gradients[:2], *(v if v is None else v.zero_() for v in gradients[2:])
        gradient, from_y = _parameter(gradient), dy.data_ptr()
        start_type, aligned = None if starts is None else starts.dtype, not (given[0] | given[1] | from_y) % 16
        key = start_type, aligned, dy.stride(), dy.dtype, pitch
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._layout(start_type, aligned, layout_of(dy), pitch)
        scratch, device = A.new_empty(layout.scratch), self._options[0]
        base = scratch.data_ptr()
        ends, sums, kept, *parts = [base + offset for offset in layout.offsets[:-1]]
        dB_parts, dC_parts, dA_parts, dD_parts, dbias_parts, *dx_parts = parts
        argument = _BACKWARD.pack(
            *given, 0, _address(dinitial), kept if starts is None else starts.data_ptr(), ends, sums,
            from_y, _address(gradient), dx_parts[0] if layout.merges else dx.data_ptr(), ddelta.data_ptr(),
            _address(dz), dA_parts, dD_parts, dbias_parts, dB_parts, dC_parts,
        )  # fmt: skip
        argument += layout.rest
        for function, blocks, threads in layout.launches:
            nvrtc.launch(function, blocks, threads, argument, device)
        summed = zip((*parts[:5], *dx_parts), (dB, dC, dA, dD, dbias, dx), strict=False)
        _sum(layout, device, [(part, v.data_ptr()) for part, v in summed if v is not None])
        return gradients


scans_of = functools.lru_cache(4096)(Scans)


def _scans(tensors: tuple[Tensor | None, ...], softplus: bool, merge: bool) -> Scans:
    layouts = [None if v is None else layout_of(v) for v in tensors]
    return scans_of(tensors[0].get_device(), softplus, merge, *layouts)


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
    z: Tensor | None = None,
    starts: Tensor | None = None,
    want_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Same contract as :func:`reference.scan`, for float32, bfloat16 and float16 on an NVIDIA GPU, N up to 128.

    ``starts``: an empty tensor of :func:`kept_states`, filled for :func:`scan_backward`. Without ``want_state`` the
    last state is None.
    """
    tensors = (x, delta, A, B, C, D, delta_bias, initial_state, order, z)
    return _scans(tensors, delta_softplus, merge).forward(tensors, starts, want_state)


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
    z: Tensor | None = None,
    starts: Tensor | None = None,
    dx: Tensor | None = None,
    dB: Tensor | None = None,
    dC: Tensor | None = None,
    overwrite_delta: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of x, delta, A, B, C, D, delta_bias and initial_state, None for one not given, and of z where it is.

    ``starts``: the states that :func:`scan` kept; without them they are computed again. ``dx``: contiguous memory for
    the gradient of x; ``dB``, ``dC``: memory for those of B and C, (batch, L, K, N) with one stride from each scan to
    the next, a multiple of 4 elements as N is; ``overwrite_delta``: a contiguous delta's own memory gets its gradient.
    """
    tensors, to = (x, delta, A, B, C, D, delta_bias, initial_state, order, z), {"dx": dx, "dB": dB, "dC": dC}
    scans = _scans(tensors, delta_softplus, merge)
    gradients = scans.backward(grad_y, grad_state, tensors, starts, **to, overwrite_delta=overwrite_delta)
    return gradients[:8] if z is None else gradients
