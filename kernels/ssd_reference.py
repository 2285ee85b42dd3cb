"""The definition of state-space duality's scan. Every other implementation answers to this one."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return_last_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Run H matrix-valued scans with a scalar decay over L tokens, one step at a time, in one or both directions.

    Per head, with a_t = dt_t A, forward over t and, if ``bidirectional``, once more from the last token to the first::

        h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D_t x_t

    Without ``scanned_diagonal`` a direction contributes exp(a_t) h_{t-1} C_t instead of h_t C_t, so D_t is all of the
    diagonal. Directions add up; D counts once.

    Shapes: x (batch, L, H, P), dt (batch, L, H), A and dt_bias (H,), B and C (batch, L, G, N) with group g serving
    heads [g H/G, (g+1) H/G), D (batch, L, H), initial_state (batch, directions, H, P, N) with the forward direction
    first. Returns y like x, and the last states, shaped like initial_state: h after token L forward, after token 1
    backward. Arithmetic is float32, or float64 for float64 inputs. ``chunk_size`` and ``return_last_state`` are hints
    for implementations that gain by them.

    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, equation 1 with A a scalar per head (section 5).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, H, P = x.shape
    u, dt, A, b, c = (v.to(dtype) for v in (x, dt, A, B, C))
    b, c = (v.repeat_interleave(H // v.shape[2], 2) for v in (b, c))
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    decay = torch.exp(dt * A)[..., None, None].unbind(1)
    update = ((dt[..., None] * u)[..., None] * b[..., None, :]).unbind(1)  # L of (batch, H, P, N)
    c = c[..., None].unbind(1)

    y = 0 if D is None else D.to(dtype)[..., None] * u
    last = []
    for direction in range(2 if bidirectional else 1):
        h = x.new_zeros(batch, H, P, b.shape[-1], dtype=dtype)
        h = h if initial_state is None else initial_state[:, direction].to(dtype)
        ys = [h] * length
        for t in range(length) if direction == 0 else reversed(range(length)):
            kept = decay[t] * h
            h = kept + update[t]
            ys[t] = ((h if scanned_diagonal else kept) @ c[t])[..., 0]
        y = y + torch.stack(ys, 1)
        last.append(h)
    return y.to(x.dtype), torch.stack(last, 1)
