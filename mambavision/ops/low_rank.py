"""Scans whose delta is a product of low rank: delta is formed for the scan and again for its backward, never kept."""

import operator

import torch
from torch import Tensor

from mambavision.ops import dispatch
from mambavision.ops.dispatch import Backend


def low_rank_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
    merge: bool,
    backend: Backend | None,
) -> tuple[Tensor, Tensor]:
    """:func:`dispatch.scan` with delta = dt dt_weight^T, of dt (batch, L, K, R) and dt_weight (K, D, R)."""
    rest = (A, B, C, D, delta_bias, initial_state)
    tensors = (x, dt, dt_weight, *rest)
    backend = dispatch.choose(backend, x.device.type, x.dtype, operator.index(A.shape[-1]))
    listening = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors)
    fits = all(v is None or v.device == x.device for v in (*tensors, order))
    fits &= all(v.dtype in dispatch.KERNEL_DTYPES for v in (dt, B, C))
    if backend in ("reference", "chunked") or not (listening and fits):  # what does not fit is refused there
        return dispatch.scan(x, _delta(dt, dt_weight), *rest, order, delta_softplus, merge, backend)
    y, state, _ = torch.ops.mambavision.low_rank_scan(x, dt, dt_weight, *rest, order, delta_softplus, merge, backend)
    return y, state


def _delta(dt: Tensor, weight: Tensor) -> Tensor:
    """(batch, L, K, D) from dt (batch, L, K, R) and weight (K, D, R): one product a scan, and no copy of dt."""
    batch, length, K, _ = dt.shape
    delta = dt.flatten(0, 1).transpose(0, 1) @ weight.to(dt.dtype).mT  # (K, batch L, D)
    return delta.view(K, batch, length, -1).permute(1, 2, 0, 3)


@torch.library.custom_op("mambavision::low_rank_scan", mutates_args=())
def _low_rank_scan(
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
    merge: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    delta = _delta(dt, dt_weight)
    arguments = (x, delta, A, B, C, D, delta_bias, initial_state, order, delta_softplus, merge)
    starts = dispatch._empty_starts(x, delta, A, True, backend)
    kept = {"starts": starts} if starts.numel() else {}
    return *dispatch._kernel(backend).scan(*arguments, **kept), starts


@_low_rank_scan.register_fake
def _(x, dt, dt_weight, A, B, C, D, delta_bias, initial_state, order, delta_softplus, merge, backend):
    batch, length, K, _ = dt.shape
    channels = dt_weight.shape[1]
    y = x.new_empty((batch, length, channels) if merge else (batch, length, K, channels))
    delta = dt.new_empty(batch, length, K, channels)
    return y, x.new_empty(batch, *A.shape, dtype=torch.float32), dispatch._empty_starts(x, delta, A, True, backend)


@torch.library.custom_op("mambavision::low_rank_scan_backward", mutates_args=())
def _low_rank_scan_backward(
    grad_y: Tensor | None,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    starts: Tensor,
    delta_softplus: bool,
    merge: bool,
    backend: str,
) -> list[Tensor]:
    delta = _delta(dt, dt_weight)
    inputs = (x, delta, A, B, C, D, delta_bias, initial_state)
    if grad_y is None:
        grad_y = x.new_zeros(delta.shape[:2] + delta.shape[3:] if merge else delta.shape)
    kept = {"starts": starts} if starts.numel() else {}
    kernel = dispatch._kernel(backend)
    dx, ddelta, *rest = kernel.scan_backward(grad_y, grad_state, *inputs, order, delta_softplus, merge, **kept)
    ddelta = ddelta.to(dt.dtype)
    ddt = dt.new_empty(dt.shape)
    to = ddt.flatten(0, 1).transpose(0, 1)
    torch.bmm(ddelta.flatten(0, 1).transpose(0, 1), dt_weight.to(dt.dtype), out=to)
    dweight = _weight_gradient(ddelta, dt)
    pairs = zip((dx, ddt, dweight, *rest), (x, dt, dt_weight, *inputs[2:]), strict=True)
    return [g.to(v.dtype) for g, v in pairs if v is not None]


def _weight_gradient(ddelta: Tensor, dt: Tensor) -> Tensor:
    """(K, D, R): sums over tokens, image by image, which are many enough products to fill a GPU."""
    return torch.stack([(ddelta[:, :, k].mT @ dt[:, :, k]).sum(0, dtype=torch.float32) for k in range(dt.shape[2])])


@_low_rank_scan_backward.register_fake
def _(
    grad_y, grad_state, x, dt, dt_weight, A, B, C, D, delta_bias, initial_state, order, starts,
    delta_softplus, merge, backend,
):  # fmt: skip
    inputs = (x, dt, dt_weight, A, B, C, D, delta_bias, initial_state)
    return [torch.empty_like(v, memory_format=torch.contiguous_format) for v in inputs if v is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.merge, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_y, grad_state, _):
    tensors = ctx.saved_tensors
    if grad_y is None and grad_state is None:
        return (None,) * 13
    options = (ctx.delta_softplus, ctx.merge, ctx.backend)
    grads = iter(torch.ops.mambavision.low_rank_scan_backward(grad_y, grad_state, *tensors, *options))
    return *(None if v is None else next(grads) for v in tensors[:9]), None, None, None, None


_low_rank_scan.register_autograd(_autograd, setup_context=_setup_context)
