"""State-space duality in torch's matrix products: any device, any order of differentiation; the CPU path."""

import math
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
    Heads of a group lie side by side, so that one product with their B or C serves them all.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, H, P = x.shape
    G, N = B.shape[2:]
    heads = H // G
    values, dt, A, b, c = (v.to(dtype) for v in (x, dt, A, B, C))
    dt = dt if dt_bias is None else dt + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt

    length = operator.index(length)
    Q = min(chunk_size or CHUNK_SIZE, length)
    S = -(-length // Q)
    pad = S * Q - length  # a padded token has dt 0: decay 1, input 0

    def chunks(v: Tensor) -> Tensor:
        """(batch, L, G k) -> (batch, S, G, Q, k)."""
        v = F.pad(v, (0, 0, 0, pad)) if pad else v
        return v.reshape(batch, S, Q, G, v.shape[-1] // G).movedim(3, 2)

    def scaled(v: Tensor, exponent: Tensor) -> Tensor:
        """v (batch, S, G, Q, heads P) by the exponential of (batch, S, G, Q, heads)."""
        return (v.unflatten(-1, (heads, P)) * exponent.exp()[..., None]).flatten(-2)

    a = chunks(dt * A)
    u = chunks((dt[..., None] * values).flatten(2))
    b, c = chunks(b.flatten(2)), chunks(c.flatten(2))
    before, after = _outside(a)
    through, total = before + a, a.sum(-2)

    M = _decay(a.mT, bidirectional, scanned_diagonal) * (c @ b.mT)[:, :, :, None]
    y = (M @ u.unflatten(-1, (heads, P)).movedim(4, 3)).movedim(3, 4).flatten(-2)
    given = x.new_zeros(1, dtype=dtype).expand(batch, 1 + bidirectional, H, P, N)
    given = given if initial_state is None else initial_state.to(dtype)
    initial = given.reshape(batch, 1 + bidirectional, G, heads * P, N).mT
    entering, last = _carry(b.mT @ scaled(u, after), total, initial[:, 0])
    y = y + scaled(c @ entering, through)
    lasts = [last]
    if bidirectional:
        entering, last = _carry(b.mT @ scaled(u, before), total, initial[:, 1], from_end=True)
        y = y + scaled(c @ entering, after + a)
        lasts.append(last)
    y = y.movedim(2, 3).reshape(batch, S * Q, H, P)[:, :length]
    y = y if D is None else torch.addcmul(y, D.to(dtype)[..., None], values)
    return y.to(x.dtype), torch.stack(lasts, 1).mT.reshape(batch, 1 + bidirectional, H, P, N)


def _outside(a: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of a (..., Q, heads) over the tokens of the chunk before each token, and after it."""
    before = F.pad(a[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
    after = F.pad(a[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    return before, after


def _decay(a: Tensor, bidirectional: bool, scanned_diagonal: bool) -> Tensor:
    """(..., Q) -> M (..., Q, Q): decay from token j (column) to i (row); the diagonal counts scanned directions."""
    i = torch.arange(a.shape[-1], device=a.device)
    below = i[:, None] > i
    forward = a.cumsum(-1)
    exponent = forward[..., :, None] - forward[..., None, :]
    if bidirectional:
        backward = F.pad(a[..., :-1], (1, 0)).cumsum(-1)
        exponent = torch.where(below, exponent, backward[..., None, :] - backward[..., :, None])
    else:
        exponent = exponent.masked_fill(~below, -math.inf)
    count = math.log(1 + bidirectional) if scanned_diagonal else -math.inf
    exponent.diagonal(dim1=-2, dim2=-1).fill_(count)
    return exponent.exp()


def _carry(local: Tensor, total: Tensor, state: Tensor, *, from_end: bool = False) -> tuple[Tensor, Tensor]:
    """Chain chunks' own end states (batch, S, G, N, heads P): the state entering each chunk, and the one at the end."""
    decays = total.exp().repeat_interleave(local.shape[-1] // total.shape[-1], -1)[..., None, :]
    way = -1 if from_end else 1
    entering = []
    for own, decay in list(zip(local.unbind(1), decays.unbind(1), strict=True))[::way]:
        entering.append(state)
        state = torch.addcmul(own, decay, state)
    return torch.stack(entering[::way], 1), state
