"""The gradients of state-space duality in CUDA C++ (ssd_backward.cu), compiled at first use by NVRTC."""

import functools
import pathlib
import struct
from concurrent.futures import Future
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.kernels import nvrtc
from mambavision.kernels.ssd_cuda import (
    _TYPES,
    _address,
    _asynchronous,
    _compilers,
    _float,
    _in_rows,
    _is_near,
    _near,
    _rows,
    _view,
)

WIDTH = 64  # headdim and d_state up to which a block's tiles fit into shared memory
_SOURCES = tuple(pathlib.Path(__file__).with_name(name) for name in ("intrinsics.cuh", "ssd_backward.cu"))
_POINTERS = struct.Struct("20P")
_REST = struct.Struct("28q3i4x")  # the rest of ssd_backward.cu's Call: its views, rows of gradients, sizes
_SUM = struct.Struct("8P6q")
_SMALL_THREADS = 256  # of `decays` and `sums`
_WALK_THREADS = 128
_PLANES = 8


class Plan(NamedTuple):
    """How gradients are laid over the GPU: tokens of a tile, heads of a block; tiles in flight in a walk, and heads."""

    tile: int
    part: int
    stages: int
    buffers: int = 2


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _shared(plan: Plan, P: int, N: int, kinds: int, steps: int) -> tuple[int, int]:
    """Bytes of shared memory of ssd_backward.cu's WalkStages, of which so many are used, and Shared."""
    tile, warps = plan.tile, plan.tile // 16
    p, n = (w if w % 64 == 0 else w + 8 for w in (P, N))
    walk = _up(2 * tile * (n + p) + 4 * (tile + 4), 1024)
    stage = _up(2 * (2 * tile * p + kinds * N * p) + 16 * tile, 1024)
    paths = 4 * (warps * tile + (5 + kinds) * tile + warps)
    gradients = 4 * tile * n + 2 * tile * tile + plan.buffers * stage + 2 * paths + 64 * tile
    return walk * min(plan.stages, steps), gradients


@functools.lru_cache(4096)
def plan(
    batch: int, length: int, H: int, groups: int, P: int, N: int, kinds: int, processors: int, room: int
) -> Plan | None:
    """Tiles of 128 tokens halve the traffic of states; a group's heads are split until blocks fill the GPU.

    None where ``room`` is not enough.
    """
    stages = 3 if length > 384 else 2
    sizes = [Plan(128, 0, stages)] * (length > 64) + [Plan(64, 0, stages), Plan(64, 0, 2, 1)]
    fitting = [size for size in sizes if max(_shared(size, P, N, kinds, stages)) <= room]
    if not fitting:
        return None
    tile, heads = fitting[0].tile, H // groups
    blocks, resident = batch * -(-length // tile) * groups, 1
    while resident < 128 // tile and (resident + 1) * _shared(fitting[0], P, N, kinds, stages)[1] <= room:
        resident += 1
    slots = processors * resident

    def cost(part: int) -> int:  # a block begins and ends in the time of about two heads
        return -(-blocks * -(-heads // part) // slots) * (part + 2)

    return fitting[0]._replace(part=min(range(heads, 0, -1), key=cost))


class _Built(NamedTuple):
    """Kernels that are being compiled: those of a call in turn with their blocks and threads, then `sums` and its."""

    launches: tuple[tuple[Future[nvrtc.Kernel], int, int], ...]
    sums: tuple[Future[nvrtc.Kernel], int]


@functools.lru_cache(1024)
def _build(
    device: int,
    shape: tuple[int, ...],
    groups: int,
    p: int,
    n: int,
    plan: Plan,
    dt_type: torch.dtype,
    options: tuple[bool, bool, bool, bool, bool, bool],
) -> _Built:
    """``options``: softplus, both directions, scanned diagonal, D, states walked, states wanted at the end."""
    batch, length, H = shape
    softplus, both, scanned, has_D, walked, ends = options
    tile, kinds = plan.tile, 2 + 2 * both
    P, N = _up(p, 16), _up(n, 16)
    tiles, parts = -(-length // tile), -(-(H // groups) // plan.part)
    steps = tiles if ends else tiles - 1
    of_walk, of_gradients = _shared(plan, P, N, kinds, steps)
    macros = {"TILE": tile, "P": P, "N": N, "DT_TYPE": _TYPES[dt_type], "BOTH": int(both)}
    macros |= {"DIAGONAL": f"{(1 + both) * scanned}.f", "SOFTPLUS": int(softplus), "HAS_D": int(has_D)}
    macros |= {"PARTIAL": int(parts > 1), "STAGES": plan.stages, "BUFFERS": plan.buffers}
    macros["TENSOR_ASYNC"] = int(P == N == 64 and _asynchronous(device))
    read = {  # what an entry does not look at shall not compile it again
        "decays": ("TILE", "DT_TYPE", "SOFTPLUS", "HAS_D"),
        "walk": ("TILE", "P", "N", "BOTH", "STAGES", "TENSOR_ASYNC"),
        "gradients": tuple(name for name in macros if name != "STAGES"),
        "sums": ("PARTIAL",),
    }
    unread = dict.fromkeys(macros, 0) | {"TILE": 64, "P": 16, "N": 16, "DIAGONAL": "0.f", "STAGES": 2, "BUFFERS": 2}
    heads, inner = -(-H // 32), batch * length * groups * n

    def build(entry: str, blocks: int, threads: int, resident: int, shared: int) -> tuple[Future, int, int]:
        values = unread | {name: macros[name] for name in read[entry]} | {"ENTRY": entry}
        values |= {"KERNEL": f"ssd_{entry}", "THREADS": threads}
        values |= {"RESIDENT": resident, "ARGUMENT": "Sum" if entry == "sums" else "Call"}
        defines = tuple(f"{name}={v}" for name, v in values.items())
        kernel = _compilers().submit(nvrtc.kernel, _SOURCES, f"ssd_{entry}", defines, device, shared)
        return kernel, blocks, threads

    blocks = batch * tiles * groups * parts
    gradients = build("gradients", blocks, 2 * tile, 128 // tile, of_gradients)  # which takes longest
    launches = [build("decays", batch * tiles * -(-H // 16), _SMALL_THREADS, 1, 0)]
    if walked:
        launches.append(build("walk", batch * H * kinds, _WALK_THREADS, 2, of_walk))
    blocks = 2 * -(-inner // 2 // _SMALL_THREADS) * (parts > 1) + 2 * heads
    return _Built((*launches, gradients), build("sums", blocks, _SMALL_THREADS, 1, 0)[:2])


class _Layout(NamedTuple):
    """All of a call but its addresses: kernels with their blocks and threads, sizes, and the scratch buffer's parts."""

    launches: tuple[tuple[nvrtc.Kernel, int, int], ...]
    sums: tuple[nvrtc.Kernel, int]
    rest: bytes
    offsets: tuple[int, ...]
    parts: int
    rows: int


@functools.lru_cache(1024)
def _layout(
    device: int,
    plan: Plan,
    views: tuple[tuple | None, ...],
    token_strides: tuple[int, int, int],
    options: tuple[bool, bool, bool, bool, bool, bool],
) -> _Layout:
    """``views``: shape, strides and dtype of x, dy, B, C, dt and D; ``options`` as in ``_build``.

    ``token_strides``: in elements, of the gradients of x, of dt, and of B and C.
    """
    ((batch, length, H, p), *_), _, ((*_, groups, n), *_), _, (*_, dt_type), _ = views
    built = _build(device, (batch, length, H), groups, p, n, plan, dt_type, options)
    _, both, _, _, walked, _ = options
    tiles, parts, kinds = -(-length // plan.tile), -(-(H // groups) // plan.part), 2 + 2 * both
    padded, rows, inner = tiles * plan.tile, batch * tiles, batch * length * groups * n
    state = 2 * rows * H * kinds * _up(n, 16) * _up(p, 16) * walked
    sizes = [4 * _PLANES * batch * H * padded, state, 4 * rows * H, 4 * rows * H]
    sizes += [4 * parts * inner * (parts > 1)] * 2
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + _up(size, 256))
    of_x, of_dt, of_BC = token_strides
    strides = *(s for v in views for s in _strides(v)), of_x, of_dt, groups * n if parts > 1 else of_BC
    rest = _REST.pack(*strides, batch, length, tiles, H, groups, parts, plan.part, p, n, int(walked))
    launches = tuple((kernel.result(), *sizes) for kernel, *sizes in built.launches)
    sums, blocks = built.sums
    return _Layout(launches, (sums.result(), blocks), rest, tuple(offsets), parts, rows)


def _planned(device: int, batch: int, length: int, H: int, groups: int, P: int, N: int, both: bool) -> Plan:
    room = nvrtc.shared_memory(device)
    chosen = plan(batch, length, H, groups, _up(P, 16), _up(N, 16), 2 + 2 * both, nvrtc.processors(device), room)
    if chosen is None:
        raise RuntimeError(f"{room} bytes of shared memory are too few for headdim {P} and d_state {N}")
    return chosen


def prepare(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    bidirectional: bool,
    scanned_diagonal: bool,
    return_last_state: bool,
) -> None:
    """Begin to compile what :func:`ssd_backward` of such a call will launch, and do not wait for it."""
    if x.numel() == 0 or B.numel() == 0:
        return
    device, (batch, length, H, P), (G, N) = x.get_device(), x.shape, B.shape[2:]
    chosen, ends = _planned(device, batch, length, H, G, P, N, bidirectional), initial_state is not None
    walked = length > chosen.tile or ends or return_last_state
    options = (dt_softplus, bidirectional, scanned_diagonal, D is not None, walked, ends)
    _build(device, (batch, length, H), G, _up(P, 8), _up(N, 8), chosen, dt.dtype, options)


def _strides(view: tuple | None) -> tuple[int, int, int]:
    """In bytes, along batch, head and token."""
    if view is None:
        return 0, 0, 0
    _, (batch, token, head, *_), dtype = view
    return batch * dtype.itemsize, head * dtype.itemsize, token * dtype.itemsize


def _views(*tensors: Tensor | None) -> tuple[tuple | None, ...]:
    return tuple(None if v is None else _view(v) for v in tensors)


@functools.lru_cache(4096)
def _as_they_are(*views: tuple | None) -> bool:
    """Whether x, dy, B, C, dt and D of these views need no copies, if the first four begin at multiples of 16 bytes."""
    *rows, dt, D = views
    whole = all(v[2] is torch.bfloat16 and v[0][-1] % 8 == 0 and _in_rows(*v) for v in rows)
    near = all(v is None or _is_near(*v) for v in views)
    return whole and near and (D is None or D[2] is torch.float32)


def _states(v: Tensor | None, p: int, n: int) -> Tensor | None:
    return None if v is None else F.pad(v.float(), (0, n - v.shape[-1], 0, p - v.shape[-2])).contiguous()


def ssd_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
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
    *,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    chosen: Plan | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D (batch, L, H), dt_bias and initial_state; None of what is None.

    For bfloat16 x, P and N up to ``WIDTH``. States are formed again, none are kept; ``chunk_size`` is not looked at.
    ``chosen`` instead of :func:`plan`.

    The gradients of x, dt, B and C are written to ``out``, if given, where P and N are multiples of 8 and no input is
    empty: dtypes of x and dt; (batch, L, channels) slices of contiguous tensors. x's begins at a multiple of 16 bytes
    and its tokens are multiples of 16 apart; those of B and C begin at multiples of 4 bytes, their tokens alike.
    """
    if x.dtype is not torch.bfloat16:
        raise ValueError(f"x must be bfloat16, got {str(x.dtype)[6:]}")
    device, (batch, length, H, P) = x.get_device(), x.shape
    G, N = B.shape[2:]
    if x.numel() == 0 or B.numel() == 0:
        given = (x, dt, A, B, C, D, dt_bias, initial_state)
        return tuple(None if v is None else torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in given)
    dy, keys, queries = grad_y, B, C
    views = _views(x, dy, keys, queries, dt, D)
    addresses = x.data_ptr() | dy.data_ptr() | keys.data_ptr() | queries.data_ptr()
    if not _as_they_are(*views) or addresses % 16:
        x, dy, keys, queries = (_rows(v, x.dtype) for v in (x, dy, keys, queries))
        dt, D = _near(dt), None if D is None else _near(D.float())
        views = _views(x, dy, keys, queries, dt, D)
    p, n = x.shape[-1], keys.shape[-1]
    A, bias = _float(A), _float(dt_bias)
    initial, gradient = _states(initial_state, p, n), _states(grad_state, p, n)
    chosen = chosen or _planned(device, batch, length, H, G, P, N, bidirectional)
    ends = initial is not None
    walked = length > chosen.tile or ends or gradient is not None
    options = (dt_softplus, bidirectional, scanned_diagonal, D is not None, walked, ends)
    dx, ddt, dB, dC = (out if (p, n) == (P, N) else None) or (
        torch.empty((batch, length, H, p), dtype=x.dtype, device=x.device),
        torch.empty(dt.shape, dtype=dt.dtype, device=x.device),
        *(torch.empty((batch, length, G, n), dtype=x.dtype, device=x.device) for _ in range(2)),
    )
    token_strides = dx.stride(1), ddt.stride(1), dB.stride(1)
    layout = _layout(device, chosen, views, token_strides, options)

    scratch = torch.empty(layout.offsets[-1], dtype=torch.uint8, device=x.device)
    planes, states, dA_rows, dbias_rows, dB_parts, dC_parts = (scratch.data_ptr() + o for o in layout.offsets[:-1])
    dD = None if D is None else A.new_empty(dt.shape)
    dA, dbias = A.new_empty(H), A.new_empty(H)
    dinitial = None if initial is None else torch.empty_like(initial)
    inputs = (x, dy, keys, queries, dt, A, bias, D, initial, gradient)
    split = layout.parts > 1
    argument = _POINTERS.pack(
        *map(_address, inputs),
        planes,
        states,
        dx.data_ptr(),
        ddt.data_ptr(),
        dB_parts if split else dB.data_ptr(),
        dC_parts if split else dC.data_ptr(),
        _address(dD),
        _address(dinitial),
        dA_rows,
        dbias_rows,
    )
    for kernel, blocks, threads in layout.launches:
        nvrtc.launch(kernel, blocks, threads, argument + layout.rest, device)
    addresses = (dB_parts, dC_parts, dA_rows, dbias_rows, dB.data_ptr(), dC.data_ptr(), dA.data_ptr(), dbias.data_ptr())
    sizes = layout.parts, dB.numel(), layout.rows, H, G * n // 2, token_strides[2] // 2
    argument = _SUM.pack(*addresses, *sizes)
    nvrtc.launch(*layout.sums, _SMALL_THREADS, argument, device)
    if p != P:
        dx = dx[..., :P].contiguous()
    if n != N:
        dB, dC = (v[..., :N].contiguous() for v in (dB, dC))
    if dinitial is not None and (p, n) != (P, N):
        dinitial = dinitial[..., :P, :N].contiguous()
    return dx, ddt, dA, dB, dC, dD, None if dt_bias is None else dbias, dinitial
