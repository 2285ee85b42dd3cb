"""The definition of the scan. Every other implementation answers to this one."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Run K selective scans over L tokens, one step at a time.

    With i = order[k, t], for every scan k and step t::

        h_t = exp(delta_i A_k) h_{t-1} + delta_i B_i x_i        y_i = C_i . h_t + D_k x_i

    Shapes: x (batch, L, K or 1, D), delta (batch, L, K, D), A (K, D, N), B and C (batch, L, K, N), D and delta_bias
    (K, D), initial_state (batch, K, D, N), order (K, L) of token indices, z (batch, L, K, D), whose silu multiplies y_i
    scan by scan. Returns y in x's dtype, in token order: (batch, L, D) summed over scans if ``merge`` else
    (batch, L, K, D), and the last state (batch, K, D, N).
    Arithmetic is float32, or float64 for float64 inputs.

    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2 (with B-bar = delta B).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, _, K, _ = delta.shape
    u, dt, A, b, c = (v.to(dtype) for v in (x.expand_as(delta), delta, A, B, C))
    dt = dt if delta_bias is None else dt + delta_bias.to(dtype)
    dt = F.softplus(dt) if delta_softplus else dt

    scans = torch.arange(K, device=x.device)[:, None]
    if order is not None:
        u, dt, b, c = (v[:, order.long(), scans] for v in (u, dt, b, c))  # (batch, K, L, ...)
    else:
        u, dt, b, c = (v.transpose(1, 2) for v in (u, dt, b, c))

    h = A.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(dtype)
    ys = []
    for u_t, dt_t, b_t, c_t in zip(*(v.unbind(2) for v in (u, dt, b, c)), strict=True):
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * u_t)[..., None] * b_t[..., None, :]
        ys.append((h * c_t[..., None, :]).sum(-1))
    y = torch.stack(ys, 2)  # (batch, K, L, D)
    y = y if D is None else y + u * D.to(dtype)[:, None]

    if order is not None:
        y = y[:, scans, order.long().argsort(-1)]
    y = y.transpose(1, 2)
    y = y if z is None else y * F.silu(z.to(dtype))
    return (y.sum(2) if merge else y).to(x.dtype), h
