"""Scans of tokens that are projected to delta, B and C, as one operator: delta is formed again in the backward."""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from mambavision.ops import dispatch
from mambavision.ops.dispatch import Backend
from mambavision.ops.multi_scan import checked, low_rank_delta, multi_scan, sizes
from mambavision.ops.orders import Grid, OrderTable, Preset, ScanOrder

CHUNKS = 1
KEEP = True


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
        y (batch, L, D) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or an order that is no permutation of the grid.
        RuntimeError: the backend asked for cannot run the call.
    """
    batch, length, channels, K, N = sizes(x, A)
    R = dt_weight.shape[-1]
    expected = {
        "x_proj": (x_proj, (K, R + 2 * N, channels)),
        "dt_weight": (dt_weight, (K, channels, R)),
        "D": (D, (K, channels)),
        "delta_bias": (delta_bias, (K, channels)),
    }
    order = checked(orders, grid, x, K, expected)
    backend = dispatch.choose(backend, x.device.type, x.dtype, operator.index(N))
    tensors = (x, x_proj, dt_weight, A, D, delta_bias)
    learns = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    if learns and backend not in ("reference", "chunked"):
        for name, v in (("x_proj", x_proj), ("A", A), ("the order table", order)):
            if v.device != x.device:
                raise ValueError(f"{name} is on {v.device}, x on {x.device}: move one of them")
        return torch.ops.mambavision.projected_scan(*tensors, order, backend)[0]
    projected = F.linear(x, x_proj.flatten(0, 1).to(x.dtype)).unflatten(-1, (K, -1))
    dt, B, C = projected.split([R, N, N], -1)
    return multi_scan(
        x, dt, A, B, C, D, orders=OrderTable(order), grid=grid, delta_bias=delta_bias, dt_weight=dt_weight,
        backend=backend,
    )  # fmt: skip


@torch.library.custom_op("mambavision::projected_scan", mutates_args=())
def _projected_scan(
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        K, R, N = len(A), dt_weight.shape[-1], A.shape[-1]
        projected = F.linear(x, x_proj.flatten(0, 1).to(x.dtype)).unflatten(-1, (K, -1))
        dt, B, C = projected.split([R, N, N], -1)
        delta = low_rank_delta(dt, dt_weight)
    tokens = x[:, :, None]
    starts = dispatch._empty_starts(tokens, delta, A, KEEP, backend)
    kept = {"starts": starts} if starts.numel() else {}
    y, _ = dispatch._kernel(backend).scan(tokens, delta, A, B, C, D, delta_bias, None, order, True, True, **kept)
    return y, projected, starts


@_projected_scan.register_fake
def _(x, x_proj, dt_weight, A, D, delta_bias, order, backend):
    K, rows, channels = x_proj.shape
    delta = x.new_empty(*x.shape[:2], K, channels)
    starts = dispatch._empty_starts(x[:, :, None], delta, A, KEEP, backend)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], K, rows), starts


@torch.library.custom_op("mambavision::projected_scan_backward", mutates_args=())
def _projected_scan_backward(
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
    kernel = dispatch._kernel(backend)
    K, R, N = len(A), dt_weight.shape[-1], A.shape[-1]
    weight, dt_cast = x_proj.flatten(0, 1).to(x.dtype), dt_weight.to(x.dtype)
    gradient = torch.empty_like(projected)
    dx, sums = None, None
    if len(x) == 0:
        return [torch.zeros_like(v) for v in (x, x_proj, dt_weight, A, D, delta_bias) if v is not None]
    images = -(-len(x) // CHUNKS)
    for i in range(0, len(x), images):
        part = slice(i, i + images)
        dt, B, C = projected[part].split([R, N, N], -1)
        delta = low_rank_delta(dt, dt_cast)
        kept = {"starts": starts[part]} if starts.numel() else {}
        du, ddelta, dA, dB, dC, dD, dbias, _ = kernel.scan_backward(
            grad[part], None, x[part, :, None], delta, A, B, C, D, delta_bias, None, order, True, True, **kept
        )
        del delta
        ddt, to_B, to_C = gradient[part].split([R, N, N], -1)
        each = ddelta.to(x.dtype).flatten(0, 1).transpose(0, 1)  # (K, batch L, D)
        torch.bmm(each, dt_cast, out=ddt.flatten(0, 1).transpose(0, 1))
        to_B.copy_(dB)
        to_C.copy_(dC)
        dweight = torch.stack([(ddelta[:, :, k].to(x.dtype).mT @ dt[:, :, k]).float().sum(0) for k in range(K)])
        du, rows = du.to(x.dtype).flatten(0, 2), gradient[part].flatten(0, 1).flatten(1)
        if images >= len(x):
            dx = du.addmm_(rows, weight)
        else:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
            to = dx[part].view(du.shape)
            torch.mm(rows, weight, out=to).add_(du)
        new = (dweight, dA, dD, dbias)
        sums = new if sums is None else tuple(a + b for a, b in zip(sums, new, strict=True))
    dweight, dA, dD, dbias = sums
    dproj = gradient.flatten(0, 1).flatten(1).mT @ x.flatten(0, 1)
    grads = (dx.view(x.shape), dproj.view(x_proj.shape), dweight, dA, dD, dbias)
    pairs = zip(grads, (x, x_proj, dt_weight, A, D, delta_bias), strict=True)
    return [g.to(v.dtype) for g, v in pairs if v is not None]


@_projected_scan_backward.register_fake
def _(grad, x, x_proj, dt_weight, A, D, delta_bias, order, projected, starts, backend):
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


_projected_scan.register_autograd(_autograd, setup_context=_setup_context)
