"""State-space duality in torch's matrix products: any device, any order of differentiation; the CPU path."""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64


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
    """Same contract as :func:`ssd_reference.ssd`, in chunks of ``chunk_size`` tokens.

    Inside a chunk y = (C B^T * M) (dt x) with M the decay between every two tokens: below the diagonal the forward
    direction's, above it the backward direction's. Between chunks only states travel. Every decay is the exponential of
    a sum of dt A over the tokens in between, so no factor is above 1 for A <= 0 and nothing is divided by a decay.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, H, P = x.shape
    G, N = B.shape[2:]
    heads = H // G
    u, dt, A, b, c = (v.to(dtype) for v in (x, dt, A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    skip = 0 if D is None else D.to(dtype)[..., None] * u

    length = operator.index(length)
    Q = min(chunk_size or CHUNK_SIZE, length)
    S = -(-length // Q)
    pad = S * Q - length  # a padded token has dt 0: decay 1, input 0

    def chunks(v: Tensor, *inner: int) -> Tensor:
        """(batch, L, G heads, ...) -> (batch, S, G, heads, Q, ...)."""
        v = v.reshape(batch, length, G, -1, *inner)
        v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)) if pad else v
        return v.reshape(batch, S, Q, *v.shape[2:]).movedim(2, 4)

    a = chunks(dt * A)
    u = chunks(dt[..., None] * u, P)
    b, c = chunks(b, N), chunks(c, N)  # one head: heads of a group share them
    before, after = _outside(a)
    through, total = before + a, a.sum(-1)

    y = (c @ b.mT * _decay(a, bidirectional, scanned_diagonal)) @ u
    state_shape = (batch, -1, G, heads, P, N)
    initial = x.new_zeros(1, dtype=dtype).expand(batch, 1 + bidirectional, H, P, N)
    initial = (initial if initial_state is None else initial_state.to(dtype)).reshape(state_shape)
    entering, last = _carry((u * after.exp()[..., None]).mT @ b, total, initial[:, 0])
    y = y + through.exp()[..., None] * (c @ entering.mT)
    lasts = [last]
    if bidirectional:
        from_end = (u * before.exp()[..., None]).mT @ b
        entering, last = _carry(from_end.flip(1), total.flip(1), initial[:, 1])
        y = y + (after + a).exp()[..., None] * (c @ entering.flip(1).mT)
        lasts.append(last)
    y = y.movedim(4, 2).reshape(batch, S * Q, H, P)[:, :length] + skip
    return y.to(x.dtype), torch.stack(lasts, 1).reshape(batch, -1, H, P, N)


def _outside(a: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a over the tokens of the chunk before each token, and after it."""
    before = F.pad(a[..., :-1], (1, 0)).cumsum(-1)
    after = F.pad(a[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return before, after


def _decay(a: Tensor, bidirectional: bool, scanned_diagonal: bool) -> Tensor:
    """(..., Q) -> M (..., Q, Q): decay from token j (column) to i (row); the diagonal counts scanned directions."""
    Q = a.shape[-1]
    i = torch.arange(Q, device=a.device)
    below, above = i[:, None] > i, i[:, None] < i
    forward, backward = a.cumsum(-1), F.pad(a[..., :-1], (1, 0)).cumsum(-1)
    exponent = torch.where(
        below, forward[..., :, None] - forward[..., None, :], backward[..., None, :] - backward[..., :, None]
    )
    seen = below | above if bidirectional else below
    M = exponent.masked_fill(~seen, -torch.inf).exp()
    return M + (1 + bidirectional) * torch.eye(Q, device=a.device, dtype=a.dtype) if scanned_diagonal else M


def _carry(local: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Chain chunks' own end states (batch, S, ...): the state entering each chunk, and the one leaving the last."""
    entering = []
    for own, decay in zip(local.unbind(1), total.exp()[..., None, None].unbind(1), strict=True):
        entering.append(state)
        state = decay * state + own
    return torch.stack(entering, 1), state
