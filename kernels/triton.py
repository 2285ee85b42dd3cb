"""The scan in Triton: forward and backward, any scan order, states and accumulation in float32.

A program of one warp owns 32 channels of one scan: one thread a channel, so the time axis of every tile lies inside a
thread and a scan along it is a plain loop in registers. Triton picks that layout for tiles (channel, time) as long as
it does not know that channels are contiguous, so their strides are not specialised. States are taken one at a time; N
above 16 runs as several calls on slices of 16 states, whose outputs add up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 32
STATES = 16
FORWARD_STEPS, BACKWARD_STEPS = 32, 16
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _chain(a0, h0, e0, p0, a1, h1, e1, p1):
    """Join two runs of h <- a h + b; a: total decay, h: end state, e, p: decay and state before the last step."""
    return a0 * a1, a1 * h0 + h1, a0 * e1, e1 * h0 + p1


@triton.jit
def _softplus(v):
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + _log1p(tl.exp(-tl.abs(v))))


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)), accurate for the smallest e."""
    s = e / (e + 2.0)
    q = s * s
    p = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q / 15))
    return 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * p))))


@triton.jit
def _rows(order, k, L, t, alive, HAS_ORDER: tl.constexpr):
    if HAS_ORDER:
        rows = tl.load(order + k * L + t, mask=alive, other=0)
    else:
        rows = t
    return rows.to(tl.int64)


@triton.jit
def _place(channels, W: tl.constexpr):
    """Channel block, scan, image and their number; blocks and images share the grid axis that goes beyond 65,535."""
    blocks = tl.cdiv(channels, W)
    i = tl.program_id(0).to(tl.int64)
    return i % blocks, tl.program_id(1).to(tl.int64), i // blocks, tl.num_programs(0) // blocks


# nothing is gained from knowing sizes and strides, and every new image size would compile anew
_OPAQUE = ["L", "K", "channels", "state_n", "one"] + [f"{v}_{axis}" for v in "xdy" for axis in "blkd"]
_OPAQUE += [f"{v}_{axis}" for v in "BC" for axis in "blkn"]


@triton.jit(do_not_specialize=_OPAQUE)
def _forward(
    x, delta, A, B, C, D, bias, initial, order, y, last, starts,
    L, K, channels, N: tl.constexpr, NP: tl.constexpr,
    x_b, x_l, x_k, x_d, d_b, d_l, d_k, d_d, B_b, B_l, B_k, B_n, C_b, C_l, C_k, C_n, y_b, y_l, y_k, y_d, state_n, one,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_ORDER: tl.constexpr,
    SOFTPLUS: tl.constexpr, OUTPUT: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """``OUTPUT``: write y and the last state. Otherwise write the state at the start of every tile to ``starts``."""
    block, k, b, batch = _place(channels, W)
    ch = block * W + tl.arange(0, W)  # int64, as all that offsets are made of
    valid = ch < channels
    per_channel = k * channels + ch
    n_index = tl.arange(0, NP)[None, :]
    state_at = (b * K * channels + per_channel) * state_n
    state_mask = valid[:, None] & (n_index < N)
    if HAS_INITIAL:
        H = tl.load(initial + state_at[:, None] + n_index, mask=state_mask, other=0.0)
    else:
        H = tl.zeros([W, NP], tl.float32)
    skip = tl.load(D + per_channel, mask=valid, other=0.0) if HAS_D else tl.zeros([W], tl.float32)
    shift = tl.load(bias + per_channel, mask=valid, other=0.0) if HAS_BIAS else tl.zeros([W], tl.float32)
    x += b * x_b + k * x_k
    delta += b * d_b + k * d_k
    B += b * B_b + k * B_k
    C += b * C_b + k * C_k
    y += b * y_b + k * y_k
    step = tl.arange(0, T)
    first, final = (step == 0)[None, :], (step == T - 1)[None, :]

    for t0 in range(0, L, T):
        alive = t0 + step < L
        tile = alive[None, :] & valid[:, None]
        rows = _rows(order, k, L, t0 + step, alive, HAS_ORDER)
        u = tl.load(x + rows[None, :] * x_l + ch[:, None] * x_d, mask=tile, other=0.0).to(tl.float32)
        dt = tl.load(delta + rows[None, :] * d_l + ch[:, None] * d_d, mask=tile, other=0.0) + shift[:, None]
        if SOFTPLUS:
            dt = _softplus(dt)
        dt = tl.where(alive[None, :], dt, 0.0)
        du = dt * u
        if not OUTPUT:
            tile_at = ((b * K + k) * tl.cdiv(L, T) + t0 // T) * channels * N
            tl.store(starts + tile_at + ch[:, None] * one + n_index * channels, H, mask=state_mask)
        out = u * skip[:, None]
        H_next = tl.zeros([W, NP], tl.float32)
        for n in range(N):
            A_n = tl.load(A + per_channel * state_n + n, mask=valid, other=0.0) * LOG2E
            b_n = tl.load(B + rows * B_l + n * B_n, mask=alive, other=0.0).to(tl.float32)
            h0 = tl.sum(tl.where(n_index == n, H, 0.0), 1)
            a = tl.exp2(dt * A_n[:, None])
            v = du * b_n[None, :] + tl.where(first, a * h0[:, None], 0.0)
            ones = tl.full([W, T], 1.0, tl.float32)
            _, h, _, _ = tl.associative_scan((a, v, ones, tl.zeros([W, T], tl.float32)), 1, _chain)
            if OUTPUT:
                c_n = tl.load(C + rows * C_l + n * C_n, mask=alive, other=0.0).to(tl.float32)
                out += h * c_n[None, :]
            H_next = tl.where(n_index == n, tl.sum(tl.where(final, h, 0.0), 1)[:, None], H_next)
        H = H_next
        if OUTPUT:
            tl.store(y + rows[None, :] * y_l + ch[:, None] * y_d, out.to(y.dtype.element_ty), mask=tile)
    if OUTPUT:
        tl.store(last + state_at[:, None] + n_index, H, mask=state_mask)


@triton.jit(do_not_specialize=_OPAQUE)
def _backward(
    x, delta, A, B, C, D, bias, dy, dlast, order, starts, dx, ddelta, dA, dB, dC, dD, dbias, dinitial,
    L, K, channels, N: tl.constexpr, NP: tl.constexpr,
    x_b, x_l, x_k, x_d, d_b, d_l, d_k, d_d, B_b, B_l, B_k, B_n, C_b, C_l, C_k, C_n, y_b, y_l, y_k, y_d, state_n, one,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LAST: tl.constexpr, HAS_ORDER: tl.constexpr,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Tiles from last to first: states again from ``starts``, then the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1}.

    dx and ddelta are (batch, L, K, D); dB and dC (blocks, batch, L, K, N) hold one partial sum a channel block.
    """
    block, k, b, batch = _place(channels, W)
    ch = block * W + tl.arange(0, W)  # int64, as all that offsets are made of
    valid = ch < channels
    per_channel = k * channels + ch
    n_index = tl.arange(0, NP)[None, :]
    per_batch = b * K * channels + per_channel
    state_mask = valid[:, None] & (n_index < N)
    if HAS_LAST:
        G = tl.load(dlast + per_batch[:, None] * state_n + n_index, mask=state_mask, other=0.0)
    else:
        G = tl.zeros([W, NP], tl.float32)
    skip = tl.load(D + per_channel, mask=valid, other=0.0) if HAS_D else tl.zeros([W], tl.float32)
    shift = tl.load(bias + per_channel, mask=valid, other=0.0) if HAS_BIAS else tl.zeros([W], tl.float32)
    grad_A = tl.zeros([W, NP], tl.float32)
    grad_D = tl.zeros([W], tl.float32)
    grad_bias = tl.zeros([W], tl.float32)
    x += b * x_b + k * x_k
    delta += b * d_b + k * d_k
    B += b * B_b + k * B_k
    C += b * C_b + k * C_k
    dy += b * y_b + k * y_k
    step = tl.arange(0, T)
    first, final = (step == 0)[None, :], (step == T - 1)[None, :]
    tiles = tl.cdiv(L, T)

    for i in range(0, tiles):
        t0 = (tiles - 1 - i) * T
        alive = t0 + step < L
        tile = alive[None, :] & valid[:, None]
        rows = _rows(order, k, L, t0 + step, alive, HAS_ORDER)
        u = tl.load(x + rows[None, :] * x_l + ch[:, None] * x_d, mask=tile, other=0.0).to(tl.float32)
        raw = tl.load(delta + rows[None, :] * d_l + ch[:, None] * d_d, mask=tile, other=0.0) + shift[:, None]
        grad = tl.load(dy + rows[None, :] * y_l + ch[:, None] * y_d, mask=tile, other=0.0).to(tl.float32)
        dt = raw
        if SOFTPLUS:
            dt = _softplus(raw)
        dt = tl.where(alive[None, :], dt, 0.0)
        du = dt * u
        tile_at = ((b * K + k) * tiles + t0 // T) * channels * N
        H = tl.load(starts + tile_at + ch[:, None] * one + n_index * channels, mask=state_mask, other=0.0)
        grad_du = tl.zeros([W, T], tl.float32)
        grad_dt = tl.zeros([W, T], tl.float32)
        ones = tl.full([W, T], 1.0, tl.float32)
        zeros = tl.zeros([W, T], tl.float32)
        G_next = tl.zeros([W, NP], tl.float32)
        for n in range(N):
            A_n = tl.load(A + per_channel * state_n + n, mask=valid, other=0.0)
            b_n = tl.load(B + rows * B_l + n * B_n, mask=alive, other=0.0).to(tl.float32)
            c_n = tl.load(C + rows * C_l + n * C_n, mask=alive, other=0.0).to(tl.float32)
            h0 = tl.sum(tl.where(n_index == n, H, 0.0), 1)
            g0 = tl.sum(tl.where(n_index == n, G, 0.0), 1)
            a = tl.exp2(dt * (A_n * LOG2E)[:, None])
            v = du * b_n[None, :] + tl.where(first, a * h0[:, None], 0.0)
            _, h, _, before = tl.associative_scan((a, v, ones, zeros), 1, _chain)
            before = tl.where(first, h0[:, None], before)
            # G_t = a_t g_t reaches step t - 1, so the same chain run backwards gives it, and g_t from the step before
            cdy = grad * c_n[None, :]
            w = a * (cdy + tl.where(final, g0[:, None], 0.0))
            _, ag, _, later = tl.associative_scan((a, w, ones, zeros), 1, _chain, reverse=True)
            g = cdy + tl.where(final, g0[:, None], later)
            decayed = ag * before
            grad_du += g * b_n[None, :]
            grad_dt += decayed * A_n[:, None]
            grad_A = tl.where(n_index == n, grad_A + tl.sum(decayed * dt, 1)[:, None], grad_A)
            G_next = tl.where(n_index == n, tl.sum(tl.where(first, ag, 0.0), 1)[:, None], G_next)
            partial = (((block * batch + b) * L + rows) * K + k) * N + n
            tl.store(dB + partial, tl.sum(g * du, 0), mask=alive)
            tl.store(dC + partial, tl.sum(h * grad, 0), mask=alive)
        G = G_next
        grad_raw = grad_dt + grad_du * u
        if SOFTPLUS:
            e = tl.exp(-tl.abs(raw))
            grad_raw = grad_raw * tl.where(raw > 0, 1.0, e) / (1.0 + e)
        grad_raw = tl.where(tile, grad_raw, 0.0)
        grad_D += tl.sum(grad * u, 1)
        grad_bias += tl.sum(grad_raw, 1)
        at = ((b * L + rows[None, :]) * K + k) * channels + ch[:, None] * one
        tl.store(dx + at, (grad_du * dt + grad * skip[:, None]).to(dx.dtype.element_ty), mask=tile)
        tl.store(ddelta + at, grad_raw.to(ddelta.dtype.element_ty), mask=tile)
    at = per_batch[:, None] * N + n_index
    tl.store(dinitial + at, G, mask=state_mask)
    tl.store(dA + at, grad_A, mask=state_mask)
    tl.store(dD + per_batch, grad_D, mask=valid)
    tl.store(dbias + per_batch, grad_bias, mask=valid)


def _strides(v: Tensor) -> tuple[int, ...]:
    """Steps of batch, token, scan and channel; an axis of size 1 is broadcast."""
    return tuple(s if n > 1 else 0 for s, n in zip(v.stride(), v.shape, strict=True))


def _prepare(x, delta, A, B, C, D, delta_bias, initial_state, order):
    """Parameters in contiguous float32, the order in int32."""
    parameters = [None if v is None else v.float().contiguous() for v in (A, D, delta_bias, initial_state)]
    order = None if order is None else order.to(torch.int32).contiguous()
    return (x, delta, B, C), parameters, order


def _launch_forward(tensors, parameters, order, delta_softplus, y, last, starts, steps):
    x, delta, B, C = tensors
    A, D, bias, initial = parameters
    batch, L, K, channels = delta.shape
    N, output = A.shape[-1], starts is None
    for n0 in range(0, N, STATES):
        n = min(STATES, N - n0)
        part = slice(n0, n0 + n)
        to = y if n0 == 0 or y is None else torch.empty_like(y)
        y_strides = _strides(to) if output else [0] * 4
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(channels, LANES) * batch, K)](
                x, delta, A[..., part], B[..., part], C[..., part], D, bias,
                None if initial is None else initial[..., part], order,
                to if output else x, last[..., part] if output else A, A if output else starts[n0 // STATES],
                L, K, channels, n, triton.next_power_of_2(n),
                *_strides(x), *_strides(delta), *_strides(B), *_strides(C), *y_strides, N, 1,
                HAS_D=D is not None and n0 == 0, HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None,
                HAS_ORDER=order is not None, SOFTPLUS=delta_softplus, OUTPUT=output, T=steps, W=LANES, num_warps=1,
            )  # fmt: skip
        if output and n0 > 0:
            y += to


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
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`reference.scan`, for float32, bfloat16 and float16 on a GPU."""
    tensors, parameters, order = _prepare(x, delta, A, B, C, D, delta_bias, initial_state, order)
    batch, L, K, channels = delta.shape
    N = A.shape[-1]
    sums = (merge and K > 1) or N > STATES
    y = torch.empty(batch, L, K, channels, device=x.device, dtype=torch.float32 if sums else x.dtype)
    last = torch.empty(batch, K, channels, N, device=x.device, dtype=torch.float32)
    _launch_forward(tensors, parameters, order, delta_softplus, y, last, None, FORWARD_STEPS)
    y = y.sum(2) if merge else y
    return y.to(x.dtype), last


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
) -> tuple[Tensor, ...]:
    """Gradients of x, delta, A, B, C, D, delta_bias and initial_state; states are recomputed, none are kept."""
    tensors, parameters, order = _prepare(x, delta, A, B, C, D, delta_bias, initial_state, order)
    (xs, deltas, Bs, Cs), (A, D, bias, initial_state) = tensors, parameters
    batch, L, K, channels = delta.shape
    N, blocks, tiles = A.shape[-1], triton.cdiv(channels, LANES), triton.cdiv(L, BACKWARD_STEPS)
    slices = [slice(n0, min(n0 + STATES, N)) for n0 in range(0, N, STATES)]
    widths = [s.stop - s.start for s in slices]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=x.device, dtype=dtype)

    starts = [new(batch, K, tiles, n, channels) for n in widths]
    _launch_forward(tensors, parameters, order, delta_softplus, None, None, starts, BACKWARD_STEPS)
    grad_y = grad_y[:, :, None] if merge else grad_y
    grad_state = None if grad_state is None else grad_state.float().contiguous()
    several = len(slices) > 1
    dx_dtype = torch.float32 if several or (x.shape[2] == 1 and K > 1) else x.dtype
    dx, ddelta = new(*delta.shape, dtype=dx_dtype), new(*delta.shape, dtype=torch.float32 if several else delta.dtype)
    dD, dbias = (new(batch, K, channels) for _ in range(2))
    dAs, dBs, dCs, dstates = [], [], [], []
    for part, n, start in zip(slices, widths, starts, strict=True):
        again = part.start > 0  # slices after the first add to dx, ddelta and dbias
        to = [torch.empty_like(v) for v in (dx, ddelta, dbias)] if again else [dx, ddelta, dbias]
        dA, dstate = (new(batch, K, channels, n) for _ in range(2))
        dB, dC = (new(blocks, batch, L, K, n) for _ in range(2))
        with torch.cuda.device_of(x):
            _backward[(blocks * batch, K)](
                xs, deltas, A[..., part], Bs[..., part], Cs[..., part], D, bias, grad_y,
                None if grad_state is None else grad_state[..., part], order, start,
                to[0], to[1], dA, dB, dC, new(batch, K, channels) if again else dD, to[2], dstate,
                L, K, channels, n, triton.next_power_of_2(n),
                *_strides(xs), *_strides(deltas), *_strides(Bs), *_strides(Cs), *_strides(grad_y), N, 1,
                HAS_D=D is not None and not again, HAS_BIAS=bias is not None, HAS_LAST=grad_state is not None,
                HAS_ORDER=order is not None, SOFTPLUS=delta_softplus, T=BACKWARD_STEPS, W=LANES, num_warps=1,
            )  # fmt: skip
        if again:
            for total, v in zip((dx, ddelta, dbias), to, strict=True):
                total += v
        dAs.append(dA.sum(0))
        dBs.append(dB.sum(0))
        dCs.append(dC.sum(0))
        dstates.append(dstate)
    dx = dx.sum(2, keepdim=True) if x.shape[2] == 1 and K > 1 else dx
    dA, dB, dC, dstate = (v[0] if len(v) == 1 else torch.cat(v, -1) for v in (dAs, dBs, dCs, dstates))
    return dx, ddelta, dA, dB, dC, dD.sum(0), dbias.sum(0), dstate
