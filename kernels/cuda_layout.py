"""What a call of the scan in CUDA C++ launches, worked out from its layout: all but the addresses."""

import functools
import itertools
import math
import pathlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

import torch

from mambavision.kernels import nvrtc
from mambavision.kernels.cuda_plan import (
    GROUP,
    Merged,
    Plan,
    bytes_of_sums,
    merged_plan,
    plan,
    team_plan,
    tile_steps,
)


def _sources(*names: str) -> tuple[pathlib.Path, ...]:
    return tuple(pathlib.Path(__file__).with_name(name) for name in ("intrinsics.cuh", "scan.cuh", *names))


FORWARD, BACKWARD = (_sources("scan_tiles.cuh", name) for name in ("scan.cu", "scan_backward.cu"))
SUMMING, MERGING = _sources("scan_sum.cu"), _sources("scan_merged.cu")
ENTRIES = {
    "scan_forward": "forward<false>",
    "scan_starts": "forward<true>",
    "scan_reach": "reach<false>",
    "scan_reach_back": "reach<true>",
    "scan_carry": "carry<false>",
    "scan_carry_back": "carry<true>",
    "scan_backward": "backward",
    "scan_sum": "sums",
    "scan_merged_states": "ordered_states",
    "scan_merged": "merged_forward",
    "scan_merged_back": "merged_backward",
}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VIEWED = ("x", "delta", "B", "C", "dy", "z")
_REST = struct.Struct("qqii" * len(_VIEWED) + "qqqqqqi0q")  # the rest of scan.cuh's Call: its views, its sizes
MOST_SUMS = 6
SUM_THREADS = 256
_SHAPE = struct.Struct("qqqqqqii")  # of a sum
_ORDERED = 1024  # steps from which B and C are ordered first: sums leave the L1 cache little


@functools.lru_cache(4096)
def _kernel(name: str, device: int, threads: int, *defines: tuple[str, int], shared: int = 0) -> nvrtc.Kernel:
    values = {"KERNEL": name, "ENTRY": ENTRIES[name], "ARGUMENT": "Sum" if name == "scan_sum" else "Call"}
    values |= dict.fromkeys(("N", "STATES", "SPLIT", "VECTOR", "WIDE", "RESIDENT", "SCANS"), 1)
    values |= {"TILE": 16, "THREADS": threads}
    values |= dict.fromkeys(("KEEP_DECAY", "SOFTPLUS", "GATED", "ORDERED", "EVERY", "START_TYPE"), 0)
    values |= {f"{n.upper()}_{what}": 0 for n in _VIEWED for what in ("TYPE", "BY_TOKEN")}
    options = tuple(f"{n}={v}" for n, v in (values | dict(defines)).items())
    sources = {"scan_backward": BACKWARD, "scan_sum": SUMMING}.get(name, MERGING if "merged" in name else FORWARD)
    return nvrtc.kernel(sources, name, options, device, shared)


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


class Call(NamedTuple):
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


class Layout(NamedTuple):
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


def lay_out(call: Call) -> Layout:
    merged = _merged(call)
    return _merged_layout(call, merged) if merged else _scan_layout(call)


def _scan_layout(call: Call) -> Layout:
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
    every = chosen.tile if backward else tile_steps(N) if kept else 0
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
    return Layout(tuple(launches), rest, offsets[-1] // 4, offsets, _summing(device, jobs), merges)


def _wide(chosen: Plan, scans: int, channels: int, gated: bool, device: int) -> Plan:
    """A backward of one block a processor in place of two, where all are there at once: half as many parts of dB, dC.

    In more than one wave two smaller blocks are faster.
    """
    lanes = channels * chosen.split
    if chosen.threads != 128 or chosen.resident != 2 or lanes % 256 or scans * lanes // 256 > nvrtc.processors(device):
        return chosen
    wide = chosen._replace(threads=256, resident=1)
    return wide if wide == wide.fitting(gated, nvrtc.shared_memory(device)) else chosen


def _merged(call: Call) -> Merged | None:
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
    row, processors = sum(GROUP * view[2].itemsize for view in copied), nvrtc.processors(call.device)
    shared = nvrtc.shared_memory(call.device)
    return merged_plan(batch, length, channels, row, processors, shared, backward=call.backward)


def _merged_layout(call: Call, chosen: Merged) -> Layout:
    batch, length, K, channels = call.shape
    groups, tokens, row, f32 = channels // GROUP, batch * length * K, K * channels, torch.float32
    defines = call.defines() | {"RESIDENT": chosen.resident}
    if call.start_type:
        defines |= {"EVERY": tile_steps(1), "START_TYPE": _TYPES[call.start_type]}
    name = "scan_merged_back" if call.backward else "scan_merged"
    copied = sum(view[2].itemsize for i, view in enumerate(call.views) if i in (0, 1, 4) and view)
    shared = bytes_of_sums(length) + chosen.threads * GROUP * copied  # a stage of 32 steps a warp
    ordered = length >= _ORDERED
    launches = []
    if ordered:
        kernel = _kernel("scan_merged_states", call.device, SUM_THREADS, *call.defines().items())
        launches.append((kernel, -(-tokens // SUM_THREADS), SUM_THREADS))
        defines |= {"ORDERED": 1}
    kernel = _kernel(name, call.device, chosen.threads, *defines.items(), shared=shared)
    launches = (*launches, (kernel, batch * groups, chosen.threads))
    rest = _REST.pack(*call.bytes(), batch, length, K, channels, 1, length, row)
    floats = (2 * tokens * ordered, 0)  # B and C, which c.ends points to
    if not call.backward:
        offsets = _offsets(floats)
        return Layout(launches, rest, offsets[-1] // 4, offsets)
    floats = (*floats, 0, groups * tokens, groups * tokens, *(batch * row,) * 3)  # as in _scan_layout
    jobs = [(1, groups, tokens, f32, view[2], 1, call.pitch) for view in call.views[2:4]]
    jobs += [(1, batch, row, f32, f32)] * (1 + call.skips + call.biased)
    offsets = _offsets(floats)
    return Layout(launches, rest, offsets[-1] // 4, offsets, _summing(call.device, jobs))


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
        blocks = -(-outer * inner // (wide[source.itemsize] * SUM_THREADS))
        row, pitch = strides if strides and strides[1] else (0, 0)
        rests.append((outer, terms, inner, blocks, row, pitch, _TYPES[source], _TYPES[out]))
    function = _kernel("scan_sum", device, SUM_THREADS, ("VECTOR", wide[4]), ("WIDE", wide[2]), ("RESIDENT", 4))
    shapes = b"".join(_SHAPE.pack(*rest) for rest in rests)
    return function, sum(rest[3] for rest in rests), shapes.ljust(MOST_SUMS * _SHAPE.size, b"\0")
