"""Scans of tokens that are projected to delta, B and C, as one operator: delta is formed again in the backward."""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from mambavision.ops import dispatch
from mambavision.ops.dispatch import Backend
from mambavision.ops.multi_scan import checked, low_rank_delta, sizes
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
    projected, delta = _project(x, *_weights(x, x_proj, dt_weight), K)
    B, C = projected[..., R : R + N], projected[..., R + N : R + 2 * N]
    return dispatch.scan(x[:, :, None], delta, A, B, C, D, delta_bias, None, order, True, True, backend)[0]


def _weights(x: Tensor, x_proj: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in x's dtype: (K width, D) from x to [dt, B, C, 0] and (K, D, part) from its first part to delta.

    On a GPU the width is a multiple of 8, and so is the part, by zeros that meet B and C: others multiply slowly.
    """
    rows, R = x_proj.shape[1], dt_weight.shape[-1]
    spare = -rows % _aligned(x)
    part = R if R % _aligned(x) == 0 and spare == 0 else rows + spare
    wide, deep = x_proj.to(x.dtype), dt_weight.to(x.dtype)
    wide = F.pad(wide, (0, 0, 0, spare)) if spare else wide
    return wide.flatten(0, 1), F.pad(deep, (0, part - R)) if part > R else deep


def _aligned(x: Tensor) -> int:
    return 8 if x.device.type == "cuda" else 1


def _project(x: Tensor, wide: Tensor, deep: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """[dt, B, C, 0] (batch, L, K, width) and delta (batch, L, K, D)."""
    projected = F.linear(x, wide).unflatten(-1, (K, -1))
    return projected, low_rank_delta(projected[..., : deep.shape[-1]], deep)


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
    R, N = dt_weight.shape[-1], A.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        projected, delta = _project(x, *_weights(x, x_proj, dt_weight), len(A))
    B, C, tokens = projected[..., R : R + N], projected[..., R + N : R + 2 * N], x[:, :, None]
    starts = dispatch._empty_starts(tokens, delta, A, KEEP, backend)
    kept = {"starts": starts} if starts.numel() else {}
    y, _ = dispatch._kernel(backend).scan(tokens, delta, A, B, C, D, delta_bias, None, order, True, True, **kept)
    return y, projected, starts


@_projected_scan.register_fake
def _(x, x_proj, dt_weight, A, D, delta_bias, order, backend):
    K, rows, channels = x_proj.shape
    delta = x.new_empty(*x.shape[:2], K, channels)
    starts = dispatch._empty_starts(x[:, :, None], delta, A, KEEP, backend)
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], K, rows + -rows % _aligned(x)), starts


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
    wide, deep = _weights(x, x_proj, dt_weight)
    part = deep.shape[-1]
    gradient = torch.empty_like(projected)
    dx, sums = None, None
    if len(x) == 0:
        return [torch.zeros_like(v) for v in (x, x_proj, dt_weight, A, D, delta_bias) if v is not None]
    images = -(-len(x) // CHUNKS)
    for i in range(0, len(x), images):
        some = slice(i, i + images)
        dt, B, C = (projected[some, ..., j] for j in (slice(part), slice(R, R + N), slice(R + N, R + 2 * N)))
        delta = low_rank_delta(dt, deep)
        kept = {"starts": starts[some]} if starts.numel() else {}
        du, ddelta, dA, dB, dC, dD, dbias, _ = kernel.scan_backward(
            grad[some], None, x[some, :, None], delta, A, B, C, D, delta_bias, None, order, True, True, **kept
        )
        del delta
        ddelta, du = ddelta.to(x.dtype), du.to(x.dtype).flatten(0, 2)
        ddt, to_B, to_C = (gradient[some, ..., j] for j in (slice(part), slice(R, R + N), slice(R + N, R + 2 * N)))
        torch.bmm(ddelta.flatten(0, 1).transpose(0, 1), deep, out=ddt.flatten(0, 1).transpose(0, 1))
        to_B.copy_(dB)
        to_C.copy_(dC)
        # every scan's dt with every scan's delta in one product: only equal scans are wanted, but K products are slower
        pairs = ddelta.flatten(0, 1).flatten(1).mT @ projected[some].flatten(0, 1).flatten(1)
        dweight = pairs.view(K, -1, K, projected.shape[-1])[..., :R].diagonal(0, 0, 2).permute(2, 0, 1)
        rows = gradient[some].flatten(0, 1).flatten(1)
        if images >= len(x):
            dx = du.addmm_(rows, wide)
        else:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
            torch.mm(rows, wide, out=dx[some].view(du.shape)).add_(du)
        new = (dweight, dA, dD, dbias)
        sums = new if sums is None else tuple(a + b for a, b in zip(sums, new, strict=True))
    dweight, dA, dD, dbias = sums
    dproj = (gradient.flatten(0, 1).flatten(1).mT @ x.flatten(0, 1)).view(K, -1, x.shape[-1])[:, : x_proj.shape[1]]
    grads = (dx.view(x.shape), dproj, dweight, dA, dD, dbias)
    pairs = zip(grads, (x, x_proj, dt_weight, A, D, delta_bias), strict=True)
    return [g.to(v.dtype).contiguous() for g, v in pairs if v is not None]


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
