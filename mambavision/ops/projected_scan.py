"""Scans of tokens that are projected to delta, B and C, as one operator: delta is formed again in the backward."""

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambavision.ops import dispatch
from mambavision.ops.choice import autocasted
from mambavision.ops.compile import register
from mambavision.ops.dispatch import Backend
from mambavision.ops.multi_scan import check_shapes, low_rank_delta, order_index, sizes
from mambavision.ops.orders import Grid, OrderTable, Preset, ScanOrder

PART = 2**26  # bytes of delta that are worth a part of the batch of their own


def projected_scan(
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    orders: Preset | Sequence[ScanOrder | ArrayLike | Tensor] | OrderTable,
    grid: Grid,
    delta_bias: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Project channels-last tokens to delta, B and C of K scans and return the sum of the scans, in image order.

    For scan k and token i, and then as :func:`multi_scan`::

        [dt, B, C] = x_proj_k x_i        delta = softplus(dt_weight_k dt + delta_bias_k)

    A training step keeps x and [dt, B, C], not delta.

    Args:
        x: (batch, L, D) tokens in image order, L = H W or T H W.
        x_proj: (K, R + 2 N, D).
        dt_weight: (K, D, R).
        A: (K, D, N), negative reals, used in float32.
        D, delta_bias: (K, D).
        orders, grid: as in :func:`multi_scan`.

    Returns:
        y (batch, L, D) in x's dtype; float32 under autocast in autocast's.

    Raises:
        ValueError: shapes that do not fit, or an order that is no permutation of the grid.
        RuntimeError: the backend asked for cannot run the call.
    """
    x = autocasted(x)
    _, _, channels, K, N = sizes(x.shape, A.shape)
    R = dt_weight.shape[-1]
    order = order_index(orders, grid, x)
    check_shapes(
        orders=(order.shape, (K, x.shape[1])),
        x_proj=(x_proj.shape, (K, R + 2 * N, channels)),
        dt_weight=(dt_weight.shape, (K, channels, R)),
        D=(None if D is None else D.shape, (K, channels)),
        delta_bias=(None if delta_bias is None else delta_bias.shape, (K, channels)),
    )
    backend = dispatch.choose(backend, x.device.type, x.dtype, operator.index(N))
    tensors = (x, x_proj, dt_weight, A, D, delta_bias)
    learns = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    plain = backend in ("reference", "chunked")
    if learns and not plain:
        names = ("x_proj", "dt_weight", "A", "D", "delta_bias", "the order table")
        for name, v in zip(names, (*tensors[1:], order), strict=True):
            if v is not None and v.device != x.device:
                raise ValueError(f"{name} is on {v.device}, x on {x.device}: move one of them")
        if dispatch._untraced((*tensors, order)):
            return _ProjectedScan.apply(backend, *tensors, order)
        return torch.ops.mambavision.projected_scan(*tensors, order, backend)[0]
    if plain:
        projected = F.linear(x, x_proj.flatten(0, 1).to(x.dtype)).unflatten(-1, (K, -1))
        delta = low_rank_delta(projected[..., :R], dt_weight)
    else:
        projected, delta = _project(x, x_proj, dt_weight)
    B, C = projected[..., R : R + N], projected[..., R + N : R + 2 * N]
    return dispatch.scan(x, delta, A, B, C, D, delta_bias, None, order, True, True, backend)[0]


def _joined(dt_weight: Tensor) -> bool:
    """Whether all K low-rank products are one, with a block-diagonal matrix: K times the work, but at a GPU's speed."""
    return dt_weight.device.type == "cuda" and (len(dt_weight) > 1 or dt_weight.shape[-1] % 8 > 0)


def _width(x: Tensor, rows: int) -> int:
    """Rows of [dt, B, C] and zeros: a GPU multiplies slowly where they are no multiple of 8."""
    return rows + -rows % 8 if x.device.type == "cuda" else rows


def _wide(x: Tensor, x_proj: Tensor) -> Tensor:
    """x_proj in x's dtype, (K width, D)."""
    spare = _width(x, x_proj.shape[1]) - x_proj.shape[1]
    weight = x_proj.to(x.dtype)
    return (F.pad(weight, (0, 0, 0, spare)) if spare else weight).flatten(0, 1)


def _block_diagonal(projected: Tensor, dt_weight: Tensor) -> Tensor:
    """(K D, K width): from all of projected to delta, zero but where dt of a scan meets delta of the same."""
    K, channels, R = dt_weight.shape
    blocks = projected.new_zeros(K, channels, K, projected.shape[-1])
    blocks[..., :R].diagonal(0, 0, 2).copy_(dt_weight.permute(1, 2, 0))
    return blocks.flatten(2).flatten(0, 1)


def _project(x: Tensor, x_proj: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """[dt, B, C, 0] (batch, L, K, width) and delta (batch, L, K, D)."""
    projected = F.linear(x, _wide(x, x_proj)).unflatten(-1, (len(x_proj), -1))
    return projected, _delta(projected, dt_weight)


def _delta(projected: Tensor, dt_weight: Tensor) -> Tensor:
    K, channels, R = dt_weight.shape
    if not _joined(dt_weight):
        return low_rank_delta(projected[..., :R], dt_weight)
    return F.linear(projected.flatten(2), _block_diagonal(projected, dt_weight)).unflatten(-1, (K, channels))


def _empty_starts(x: Tensor, delta: Tensor, A: Tensor, projected: Tensor, backend: str) -> Tensor:
    """Where the scan keeps states for its backward: without elements where they take more than x and projected."""
    kept = dispatch._kernel("cuda").kept_states(x[:, :, None], delta, A) if backend == "cuda" else None
    if kept and math.prod(kept[0]) * kept[1].itemsize > (x.numel() + projected.numel()) * x.dtype.itemsize:
        kept = None
    shape, dtype = kept or ((0,), torch.float32)
    return x.new_empty(shape, dtype=dtype)


def _forward(
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and for the backward [dt, B, C] and states."""
    R, N = dt_weight.shape[-1], A.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        projected, delta = _project(x, x_proj, dt_weight)
    B, C = projected[..., R : R + N], projected[..., R + N : R + 2 * N]
    starts = _empty_starts(x, delta, A, projected, backend)
    kept = {"starts": starts} if starts.numel() else {}
    arguments = (x[:, :, None], delta, A, B, C, D, delta_bias, None, order, True, True)
    return dispatch._kernel(backend).scan(*arguments, **kept)[0], projected, starts


def _forward_like(x, x_proj, dt_weight, A, D, delta_bias, order, backend):
    K, rows, channels = x_proj.shape
    delta = x.new_empty(*x.shape[:2], K, channels)
    projected = x.new_empty(*x.shape[:2], K, _width(x, rows))
    return x.new_empty(x.shape), projected, _empty_starts(x, delta, A, projected, backend)


def _backward(
    grad: Tensor,
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor,
    projected: Tensor,
    starts: Tensor,
    backend: str,
) -> list[Tensor]:
    inputs = (x, x_proj, dt_weight, A, D, delta_bias)
    if len(x) == 0:
        return [torch.zeros_like(v) for v in inputs if v is not None]
    with torch.autocast(x.device.type, enabled=False):
        grads = _gradients(grad, inputs, order, projected, starts, backend)
    return [g.to(v.dtype).contiguous() for g, v in zip(grads, inputs, strict=True) if v is not None]


def _gradients(
    grad: Tensor, inputs: tuple[Tensor | None, ...], order: Tensor, projected: Tensor, starts: Tensor, backend: str
) -> tuple[Tensor, ...]:
    x, x_proj, dt_weight, A, D, delta_bias = inputs
    R, N = dt_weight.shape[-1], A.shape[-1]
    wide = _wide(x, x_proj)
    direct = backend == "cuda" and not any(n % 4 for n in (N, R, projected.shape[-1]))  # dB and dC are written there
    padded = projected.shape[-1] > x_proj.shape[1]
    dproj = torch.zeros_like(projected) if padded or direct else torch.empty_like(projected)
    dx, sums, images = torch.empty(x.shape, dtype=x.dtype, device=x.device), None, _images(x, A)
    for first in range(0, len(x), images):
        part = slice(first, first + images)
        from_x, to = projected[part], dproj[part]
        arguments = (_delta(from_x, dt_weight), A, from_x[..., R : R + N], from_x[..., R + N : R + 2 * N])
        options = {"starts": starts[part]} if starts.numel() else {}
        if backend == "cuda":  # in memory that there is
            options |= {"overwrite_delta": True, "dx": dx[part, :, None]}
        if direct:
            options |= {"dB": to[..., R : R + N], "dC": to[..., R + N : R + 2 * N]}
        du, ddelta, dA, dB, dC, dD, dbias, _ = dispatch._kernel(backend).scan_backward(
            grad[part], None, x[part, :, None], *arguments, D, delta_bias, None, order, True, True, **options
        )
        del arguments
        dweight = _low_rank_gradients(ddelta.to(x.dtype), from_x, dt_weight, to, add=direct)
        if not direct:
            _copy(dB, to, R)
            _copy(dC, to, R + N)
        new = (dweight, dA, dD, dbias)
        sums = new if sums is None else tuple(a if a is None else a + b for a, b in zip(sums, new, strict=True))
        own = dx[part].flatten(0, 1)
        if du.data_ptr() != own.data_ptr():
            own.copy_(du.flatten(0, 2))
        own.addmm_(to.flatten(2).flatten(0, 1), wide)
        del du, ddelta, dB, dC
    dwide = (dproj.flatten(2).flatten(0, 1).mT @ x.flatten(0, 1)).unflatten(0, (len(x_proj), -1))
    return dx, dwide[:, : x_proj.shape[1]], *sums


def _images(x: Tensor, A: Tensor) -> int:
    """Images whose gradients are formed at once: as few as fill a GPU, since the scratch of a backward grows with them.

    A channel has about a lane for each 4 states, and a processor is full with 8 warps. All, where delta is small. (Half
    of what fills a GPU, with sequences cut in two, took 26 % longer at Mamba-YOLO's P2 for 0.61 of the memory.)
    """
    if x.device.type != "cuda":
        return len(x)
    channels = A[..., 0].numel()
    warps = len(x) * channels * max(1, min(16, A.shape[-1] // 4)) / 32
    full = 7.5 * torch.cuda.get_device_properties(x.device).multi_processor_count
    delta = x.shape[:2].numel() * channels * x.element_size()
    return -(-len(x) // max(1, int(min(warps / full, delta / PART))))


def _low_rank_gradients(ddelta: Tensor, projected: Tensor, dt_weight: Tensor, dproj: Tensor, add: bool) -> Tensor:
    """The gradient of dt_weight; that of dt is written to the first columns of dproj, zeros if ``add``.

    What follows these columns is kept if ``add``, else it may change.
    """
    K, channels, R = dt_weight.shape
    if not _joined(dt_weight):
        each = ddelta.flatten(0, 1).transpose(0, 1)  # (K, batch L, D)
        dproj[..., :R].flatten(0, 1).transpose(0, 1).copy_(each @ dt_weight.to(ddelta.dtype))
        return each.mT @ projected[..., :R].flatten(0, 1).transpose(0, 1)
    rows, columns = ddelta.flatten(2).flatten(0, 1), projected.flatten(2).flatten(0, 1)
    to, blocks = dproj.flatten(2).flatten(0, 1), _block_diagonal(projected, dt_weight)
    torch.addmm(to, rows, blocks, out=to) if add else torch.mm(rows, blocks, out=to)
    pairs = (rows.mT @ columns).view(K, channels, K, -1)[..., :R]
    return pairs.diagonal(0, 0, 2).permute(2, 0, 1)


def _copy(v: Tensor, to: Tensor, column: int) -> None:
    """Write v (..., N) to columns of `to`, in words of 8 bytes where they fit."""
    v, to = v.to(to.dtype), to[..., column : column + v.shape[-1]]
    word = 8 // v.element_size()
    if all(n % word == 0 for n in (v.shape[-1], column, to.stride(-2), to.storage_offset())):
        v, to = v.view(torch.int64), to.view(torch.int64)
    to.copy_(v)


def _backward_like(grad, x, x_proj, dt_weight, A, D, delta_bias, order, projected, starts, backend):
    return [v.new_empty(v.shape) for v in (x, x_proj, dt_weight, A, D, delta_bias) if v is not None]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.backend = inputs[-1]
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    tensors = ctx.saved_tensors
    if grad is None:
        return (None,) * 8
    grads = iter(torch.ops.mambavision.projected_scan_backward(grad, *tensors, ctx.backend))
    return *(None if v is None else next(grads) for v in tensors[:6]), None, None


register(_forward, "projected_scan", fake=_forward_like, backward=_autograd, setup_context=_setup_context)
register(_backward, "projected_scan_backward", fake=_backward_like)


class _ProjectedScan(torch.autograd.Function):
    """What `mambavision::projected_scan` does, in a fraction of the dispatcher's time."""

    @staticmethod
    def forward(ctx, backend, *tensors):
        y, *kept = _forward(*tensors, backend)
        ctx.save_for_backward(*tensors, *kept)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        grads = iter(_backward(grad, *tensors, ctx.backend))
        return None, *(None if v is None else next(grads) for v in tensors[:6]), None
