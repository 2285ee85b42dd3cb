"""State-space duality in CUDA C++ (ssd.cu behind intrinsics.cuh), compiled at first use by NVRTC: forward."""

import functools
import math
import pathlib
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.kernels import nvrtc

_SOURCES = tuple(pathlib.Path(__file__).with_name(name) for name in ("intrinsics.cuh", "ssd.cu"))
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTERS = struct.Struct("12P")
_REST = struct.Struct("17q7if")  # the rest of ssd.cu's Call: its views, its sizes
STRIP, SLICE = 32, 64  # tokens and columns of P that a warp takes at once
CHUNK_SIZES = (32, 64, 128, 256)
MOST_STATES = 128  # d_state that shared memory holds
MOST_DIRECT = 3  # chunks up to which each takes states of all others, rather than those that `chain` makes of them
_NONE = 3  # ssd.cu's type of what is not there


class Plan(NamedTuple):
    """How a kernel is laid over the GPU: a block's warps, blocks a processor, heads (times slices of P) a block."""

    warps: int
    resident: int
    share: int


def unavailable() -> str | None:
    """Why these kernels cannot run on the current device, or None if they can."""
    reason = nvrtc.unavailable()
    if reason is None and nvrtc._architecture(torch.cuda.current_device()) < 80:
        return "its tensor-core instructions need sm_80 or later"
    return reason


def _share(jobs: int, blocks: int, places: int, overhead: float) -> int:
    """Jobs a block takes one after the other, where it first spends ``overhead`` jobs on what they share."""

    def cost(share: int) -> float:
        return math.ceil(blocks * -(-jobs // share) / places) * (share + overhead)

    return min(range(1, jobs + 1), key=cost)


@functools.lru_cache(4096)
def plan(
    batch: int,
    chunks: int,
    groups: int,
    jobs: int,
    strips: int,
    states: int,
    directions: int,
    processors: int,
    asynchronous: bool,
) -> tuple[Plan, Plan]:
    """Plans of ``sums`` and of ``outputs`` for groups of so many jobs.

    A warp of ``outputs`` takes 16 rows where it reads x through the tensor cores alone, else 32 for each reading.
    """
    blocks = batch * chunks * groups
    warps = directions * states // 16
    resident = max(1, min(2 if strips == 8 else 4, 16 // warps))
    sums = Plan(warps, resident, _share(jobs, blocks, processors * resident, 0.5))
    warps = strips * (1 + asynchronous)
    resident = 8 // strips
    outputs = Plan(warps, resident, _share(jobs, blocks, processors * resident, 1.5))
    return sums, outputs


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(8, "nvrtc")


def _kernel(entry: str, device: int, shared: int, **defines: int) -> Future[nvrtc.Kernel]:
    name = f"ssd_{entry}"
    defines = {"KERNEL": name, "ENTRY": entry, "X_TYPE": 1} | defines
    macros = tuple(f"{n}={v}" for n, v in defines.items())
    return _compilers().submit(nvrtc.kernel, _SOURCES, name, macros, device, shared)


def _asynchronous(device: int) -> bool:
    """Whether four warps' tensor cores can run on while the warps do, which sm_90 alone can."""
    return device >= 0 and nvrtc._architecture(device) == 90


class _Signature(NamedTuple):
    """What a call's layout depends on; a view is shape, strides and dtype, None where there is no tensor."""

    device: int
    softplus: bool
    both: bool
    diagonal: int
    chunk: int
    initial: bool
    last: bool
    x: tuple
    dt: tuple
    B: tuple
    C: tuple
    D: tuple | None


class _Layout(NamedTuple):
    """All of a call but its addresses: kernels, blocks, threads, the end of their argument; bytes of states, of all."""

    launches: tuple[tuple[nvrtc.Kernel, int, int, bytes], ...]
    states: int
    scratch: int


def _strides(view: tuple | None) -> tuple[int, ...]:
    """Strides in bytes along batch, token and head, 0 along axes of size 1."""
    if view is None:
        return 0, 0, 0
    shape, strides, dtype = view
    return tuple(s * dtype.itemsize if n > 1 else 0 for n, s in zip(shape[:3], strides, strict=False))


class _Cut(NamedTuple):
    """How tokens are cut; states that enter a chunk; whether they are other chunks' own; jobs in shared memory."""

    chunk: int
    entering: int
    direct: bool
    slots: int


def _shared(cut: _Cut, states: int, rows: int) -> tuple[int, int]:
    """Bytes of shared memory of a block of ``sums`` and of ``outputs``, where a warp takes so many rows."""
    row, panels, chunk = 2 * SLICE, -(-states // SLICE), cut.chunk
    tile, sent = chunk * row, 4 * chunk + 4 * max(4, chunk // STRIP)
    outputs = panels * tile + cut.slots * (tile + sent + 16 * chunk)
    outputs += (2 * cut.entering * states + 8 * (chunk // rows)) * row + 2 * STRIP * chunk
    return 2 * (tile + sent), outputs


def _cut(length: int, states: int, directions: int, asked: int, given: bool, rows: int, most: int) -> _Cut:
    """The longest chunks whose blocks fit, or those asked for; ``given``: states enter or are to leave."""
    longest = max(STRIP, 1 << (length - 1).bit_length())
    for chunk in (min(asked, longest),) if asked else (c for c in CHUNK_SIZES[::-1] if c <= longest):
        chunks = -(-length // chunk)
        direct = 1 < chunks <= MOST_DIRECT and states <= SLICE and not given
        entering = chunks - 1 if direct else directions if chunks > 1 or given else 0
        for slots in (3, 2) if chunk == CHUNK_SIZES[-1] and states <= SLICE else (2,):
            cut = _Cut(chunk, entering, direct, slots)
            if max(_shared(cut, states, rows)) <= most:
                return cut
    raise ValueError(f"a block has {most} bytes of shared memory, which chunk_size={asked} exceeds: pass a smaller one")


@functools.lru_cache(4096)
def _layout(call: _Signature) -> _Layout:
    (batch, length, H, P), (_, _, G, N) = call.x[0], call.B[0]
    states, width, directions = -(-N // 16) * 16, min(SLICE, -(-P // 16) * 16), 1 + call.both
    asynchronous = _asynchronous(call.device) and width == SLICE
    rows = 16 if asynchronous else 32
    most = nvrtc.shared_memory(call.device)
    cut = _cut(length, states, directions, call.chunk, call.initial or call.last, rows, most)
    strips, chunks, slices = cut.chunk // STRIP, -(-length // cut.chunk), -(-P // SLICE)
    entering = cut.entering if chunks > 1 or call.initial else 0
    defines = {"STRIPS": strips, "N": states, "WIDTH": width, "DIRECTIONS": directions}
    defines["ALL"] = int(length % cut.chunk == 0 and P % width == 0)
    views = [s for v in (call.x, call.dt, call.B, call.C, call.D) for s in _strides(v)]
    defines |= {"SLICES": slices, "SOFTPLUS": int(call.softplus), "DT_TYPE": _TYPES[call.dt[2]]}
    jobs = H // G * slices
    processors = nvrtc.processors(call.device)
    sums, outputs = plan(batch, chunks, G, jobs, strips, states, directions, processors, asynchronous)

    def launch(entry: str, laid: Plan, blocks: int, shared: int, **more: int):
        parts = -(-jobs // laid.share)
        sizes = batch, length, H, G, P, N, chunks, parts, laid.share, call.diagonal
        known = defines | {"THREADS": laid.warps * 32, "RESIDENT": laid.resident} | more
        known["TENSOR_ASYNC"] = int(asynchronous and laid.warps % 4 == 0 and entry != "chain")
        kernel = _kernel(entry, call.device, shared, **known)
        return kernel, blocks * parts, laid.warps * 32, _REST.pack(*views, *sizes)

    launches, plain = [], {"STATES": 0, "DIRECT": 0, "D_TYPE": _NONE, "SLOTS": 2, "BLOCKS": 1}
    of_sums, of_outputs = _shared(cut._replace(entering=entering), states, rows)
    if entering or call.last:
        launches.append(launch("sums", sums, batch * chunks * G, of_sums, **plain))
    if (entering or call.last) and not cut.direct:
        pieces = batch * H * slices * directions * states * width // 8
        plain |= dict.fromkeys(("ALL", "SOFTPLUS", "DT_TYPE"), 0)
        launches.append(launch("chain", Plan(4, 4, jobs), -(-pieces // 128), 0, **plain))
    more = {"STATES": entering, "DIRECT": int(cut.direct), "SLOTS": cut.slots, "BLOCKS": rows // 16}
    more["D_TYPE"] = _NONE if call.D is None else _TYPES[call.D[2]]
    launches.append(launch("outputs", outputs, batch * chunks * G, of_outputs, **more))
    launches = tuple((kernel.result(), *rest) for kernel, *rest in launches)
    formed = len(launches) > 1
    stored = formed * batch * chunks * H * slices * directions * states * width * 2
    return _Layout(launches, stored, stored + formed * batch * chunks * H * 4)


def _near(v: Tensor) -> Tensor:
    """With tokens so near that offsets within a block's fit into 32 bits."""
    return v if _is_near(*_view(v)) else v.contiguous()


def _rows(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of whole 16 bytes at multiples of 16 bytes, which copies take; others are copied, with zeros at the end."""
    v = v.to(dtype)
    fill = -v.shape[-1] % 8
    if fill:
        return F.pad(v, (0, fill))
    if _in_rows(*_view(v)) and v.data_ptr() % 16 == 0:
        return _near(v)
    return v.clone(memory_format=torch.contiguous_format)


def _in_rows(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    return strides[3] == 1 and all(s % 8 == 0 for s, n in zip(strides[:3], shape[:3], strict=True) if n > 1)


def _is_near(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> bool:
    return strides[1] * dtype.itemsize * CHUNK_SIZES[-1] < 2**31


@functools.lru_cache(4096)
def _as_they_are(x: tuple, dt: tuple, B: tuple, C: tuple, D: tuple | None) -> bool:
    """Whether no tensor of these views needs a copy, if x, B and C begin at multiples of 16 bytes; P and N are of 8."""
    near = all(_is_near(*v) for v in (x, dt, B, C, D) if v is not None)
    return near and all(v[2] is x[2] and _in_rows(*v) for v in (x, B, C)) and (D is None or D[2] in _TYPES)


def _float(v: Tensor | None) -> Tensor | None:
    if v is None or (v.dtype is torch.float32 and v.is_contiguous()):
        return v
    return v.float().contiguous()


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _view(v: Tensor) -> tuple:
    return v.shape, v.stride(), v.dtype


def _views(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple:
    return _view(x), _view(dt), _view(B), _view(C), None if D is None else _view(D)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    bidirectional: bool,
    scanned_diagonal: bool,
    chunk_size: int | None,
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`ssd_reference.ssd`, for bfloat16 x on an NVIDIA GPU of sm_80 or later, N up to 128.

    Without ``return_last_state`` the states are not formed where they are not needed, and come back with 0 directions.
    """
    batch, length, H, P = x.shape
    N = B.shape[3]
    directions = 1 + bidirectional
    if P % 8 or N % 8:
        x, B, C = F.pad(x, (0, -P % 8)), F.pad(B, (0, -N % 8)), F.pad(C, (0, -N % 8))
        initial = None if initial_state is None else F.pad(initial_state, (0, -N % 8, 0, -P % 8))
        options = dt_softplus, bidirectional, scanned_diagonal, chunk_size, return_last_state
        y, last = ssd(x, dt, A, B, C, D, dt_bias, initial, *options)
        return y[..., :P].contiguous(), last[..., :P, :N].contiguous()
    views = _views(x, dt, B, C, D)
    if not _as_they_are(*views) or (x.data_ptr() | B.data_ptr() | C.data_ptr()) % 16:
        x, B, C = (_rows(v, x.dtype) for v in (x, B, C))
        dt, D = _near(dt), None if D is None else _near(D if D.dtype in _TYPES else D.float())
        views = _views(x, dt, B, C, D)
    A, bias, initial = _float(A), _float(dt_bias), _float(initial_state)
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    last = A.new_empty((batch, directions if return_last_state else 0, H, P, N))
    if x.numel() == 0 or N == 0:  # no states
        return (torch.zeros_like(y) if D is None else (D[..., None] * x).to(x.dtype)), last
    diagonal = directions if scanned_diagonal else 0
    device, taken = x.get_device(), initial is not None
    layout = _layout(
        _Signature(device, dt_softplus, bidirectional, diagonal, chunk_size or 0, taken, return_last_state, *views)
    )
    scratch = y.new_empty(-(-layout.scratch // 2)) if layout.scratch else None
    states = _address(scratch)
    argument = _POINTERS.pack(
        x.data_ptr(), dt.data_ptr(), B.data_ptr(), C.data_ptr(), _address(D), A.data_ptr(), _address(bias),
        _address(initial), y.data_ptr(), states, states + layout.states, last.data_ptr() if return_last_state else 0,
    )  # fmt: skip
    for function, blocks, threads, rest in layout.launches:
        nvrtc.launch(function, blocks, threads, argument + rest, device)
    return y, last
