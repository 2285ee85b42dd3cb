"""The scan in CUDA C++ (scan.cuh and what cuda_layout.py puts behind it), compiled at first use by NVRTC."""

import functools
import itertools
import operator
import struct

import torch
from torch import Tensor

from mambavision.kernels import nvrtc
from mambavision.kernels.cuda_layout import MOST_SUMS, SUM_THREADS, Call, Layout, lay_out
from mambavision.kernels.cuda_plan import tile_steps

# scan.cuh's Call begins with what the operator is given, in its order; then a forward's pointers, then a backward's
_GIVEN = ("x", "delta", "A", "B", "C", "D", "bias", "initial", "order", "z")
_OF_FORWARD = ("y", "last", "starts", "ends", "sums")
_OF_BACKWARD = ("dy", "gradient", "dx", "ddelta", "dz", "dA", "dD", "dbias", "dB", "dC")
_FORWARD = struct.Struct(f"{len(_GIVEN + _OF_FORWARD)}P{8 * len(_OF_BACKWARD)}x")
_BACKWARD = struct.Struct(f"{len(_GIVEN + _OF_FORWARD + _OF_BACKWARD)}P")
_ENDS = struct.Struct(f"{2 * MOST_SUMS}P")  # addresses of sums: from, then to


def unavailable() -> str | None:
    """Why CUDA kernels cannot be compiled here, or None if they can."""
    return nvrtc.unavailable()


def _sum(layout: Layout, device: int, ends: list[tuple[int, int]]) -> None:
    """The layout's sums, from one address to another."""
    function, blocks, rest = layout.sums
    sources, sums = zip(*ends, *[(0, 0)] * (MOST_SUMS - len(ends)), strict=True)
    nvrtc.launch(function, blocks, SUM_THREADS, _ENDS.pack(*sources, *sums) + rest, device)


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
    every = tile_steps(N)
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
        self._layouts: dict[tuple, Layout] = {}

    @property
    def merge(self) -> bool:
        """Whether y is one sum over the scans."""
        return self._options[2]

    def kept(self, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        """Where a forward keeps states for its backward, if it is to."""
        return None if self._kept is None else tensors[0].new_empty(self._kept[0], dtype=self._kept[1])

    def _layout(self, start_type: torch.dtype | None, aligned: bool, dy: tuple | None = None, pitch: int = 0) -> Layout:
        (device, softplus, merge), (views, z), back = self._options, self._views, dy is not None
        dy = _of_all_scans(dy) if back and merge else dy
        merge = views[0][0][2] == 1 if back else merge
        views, N = (*views, dy, z), self._state_shape[-1]
        return lay_out(Call(device, back, merge, N, softplus, start_type, aligned, views, pitch, *self._given))

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
