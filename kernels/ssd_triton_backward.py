"""The gradients of state-space duality in Triton: tiles, chunks and states as in ssd_triton.py.

The adjoint is the same traffic with B and C exchanged and dy for x; only the ends count differently: a sender of the
primal leaves out its own decay and a receiver counts it, and in the adjoint it is the other way round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambavision.kernels.ssd_triton import HEADS, Config, _apply, _Call, _entering, _float, _rows, _tile, _to_border

BACKWARD = Config(64, 4, 4, 255)


@triton.jit
def _project(v, state, log_decay, PRECISION: tl.constexpr):
    """Rows of x or dy (T, P) times a transposed state (P, N), decayed."""
    return tl.dot(v, tl.trans(state.to(v.dtype)), input_precision=PRECISION) * tl.exp2(log_decay)[:, None]


@triton.jit
def _store_partial(to, v, part, b, tokens, g, groups, n, L, N: tl.constexpr):
    """One part of the sum over heads, to (parts, batch, L, G, N)."""
    at = ((part * tl.num_programs(2) + b) * L + tokens) * groups + g
    tl.store(to + at[:, None] * N + n[None, :], v, mask=(tokens < L)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["L", "H", "heads", "block", "blocks"])
def _receiver_gradients(
    x, B, C, dy, decays, states, costates, dB, dC, dD, paths,
    L, H, heads, block, blocks, padded, plane, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, D_b, D_l, D_h,
    y_b, y_l, y_h, P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, DIAGONAL: tl.constexpr, BOTH: tl.constexpr, STATES: tl.constexpr, HAS_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's C, and of B through the tile's own pairs, for ``block`` heads of one group.

    A token's log-decay gets weight times dy_i . u_j of every pair (i, j) whose path crosses it. What this kernel sees
    of them goes to planes of ``paths`` by where in the tile a path starts or ends: 0 paths up to this token, 1 up to
    the one before, 2 from this token on (from the first one, if over the whole tile). Plane 3 is u's share of dt.
    """
    tile, g, b = tl.program_id(1), tl.program_id(0) // blocks, tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) % blocks
    c, m = tile // R, tile % R
    start = c.to(tl.int64) * R * T
    tokens = L - start
    n, p, step = tl.arange(0, NP), tl.arange(0, PP), tl.arange(0, T)
    rows = m * T + step
    alive = rows < tokens
    B += b * B_b + start * B_l + g * B_g
    C += b * C_b + start * C_l + g * C_g
    x += b * x_b + start * x_l
    dy += b * y_b + start * y_l
    i, j = step[:, None], step[None, :]
    grad_BC = tl.zeros([T, T], tl.float32)
    grad_C = tl.zeros([T, NP], tl.float32)
    for h in range(g * heads + part * block, g * heads + tl.minimum(part * block + block, heads)):
        own = decays + (b * H + h) * padded + start
        to = paths + (b * H + h) * padded + start + rows
        entry = ((b * tl.cdiv(L, R * T) + c) * H + h) * (2 if BOTH else 1) * N * P
        own_B = _tile(B, m, B_l, n, tokens, N, T).to(DOT)
        own_C = _tile(C, m, C_l, n, tokens, N, T).to(DOT)
        own_x = _tile(x + h * x_h, m, x_l, p, tokens, P, T).to(DOT)
        own_dy = _tile(dy + h * y_h, m, y_l, p, tokens, P, T).to(DOT)

        # pairs inside the tile
        from_left = _to_border(own, plane, m * T, False, False, T)
        exponent = from_left[:, None] - from_left[None, :]
        if BOTH:
            from_right = _to_border(own, plane, m * T, True, False, T)
            exponent = tl.where(i >= j, exponent, from_right[:, None] - from_right[None, :])
        else:
            exponent = tl.where(i >= j, exponent, float("-inf"))
        pair = tl.dot(own_dy, tl.trans(own_x), input_precision=PRECISION)
        if HAS_D:
            tl.store(dD + (b * L + start + rows) * H + h, tl.sum(tl.where(i == j, pair, 0.0), 1), mask=alive)
        dt = tl.load(own + 2 * plane + rows)
        pair *= tl.exp2(exponent) * tl.where(i == j, DIAGONAL, 1.0)
        grad_BC += pair * dt[None, :]
        pair *= tl.dot(own_C, tl.trans(own_B), input_precision=PRECISION)
        tl.store(to + 3 * plane, tl.sum(pair, 0))
        pair *= dt[None, :]
        forward = tl.where(i > j, pair, 0.0)
        reach = tl.sum(forward, 1) - tl.sum(forward, 0)
        if BOTH:
            backward = tl.where(i < j, pair, 0.0)
            tl.store(to + plane, tl.sum(backward, 0) - tl.sum(backward, 1))

        # what enters the tile, and what crosses it
        right = _entering(
            x + h * x_h, x_l, B, B_l, p, n, states + entry, own, plane, tokens, m, P, N, PP, NP, T, R,
            True, True, STATES, DOT, PRECISION,
        )  # fmt: skip
        received = _project(own_dy, right, from_left, PRECISION)
        grad_C += received
        tl.store(to, reach + tl.sum(received * own_C, 1))
        back = _entering(
            dy + h * y_h, y_l, C, C_l, p, n, costates + entry, own, plane, tokens, m, P, N, PP, NP, T, R,
            False, False, STATES, DOT, PRECISION,
        )  # fmt: skip
        crossing = tl.sum(tl.sum(right * back, 1), 0)
        starts = tl.zeros([T], tl.float32)
        if BOTH:
            left = _entering(
                x + h * x_h, x_l, B, B_l, p, n, states + entry + N * P, own, plane, tokens, m, P, N, PP, NP, T, R,
                False, True, STATES, DOT, PRECISION,
            )  # fmt: skip
            received = _project(own_dy, left, from_right, PRECISION)
            grad_C += received
            starts = tl.sum(received * own_C, 1)
            back = _entering(
                dy + h * y_h, y_l, C, C_l, p, n, costates + entry + N * P, own, plane, tokens, m, P, N, PP, NP, T, R,
                True, False, STATES, DOT, PRECISION,
            )  # fmt: skip
            crossing += tl.sum(tl.sum(left * back, 1), 0)
        crossing *= tl.exp2(tl.load(own + m * T + T - 1))
        tl.store(to + 2 * plane, starts + tl.where(step == 0, crossing, 0.0))

    tile_B = _tile(B, m, B_l, n, tokens, N, T).to(DOT)
    tile_C = _tile(C, m, C_l, n, tokens, N, T).to(DOT)
    grad_C = tl.dot(grad_BC.to(DOT), tile_B, grad_C, input_precision=PRECISION)
    grad_B = tl.dot(tl.trans(grad_BC.to(DOT)), tile_C, input_precision=PRECISION)
    _store_partial(dB, grad_B, part, b, start + rows, g, H // heads, n, L, N)
    _store_partial(dC, grad_C, part, b, start + rows, g, H // heads, n, L, N)


@triton.jit(do_not_specialize=["L", "H", "heads", "block", "blocks"])
def _sender_gradients(
    x, B, C, D, dy, decays, costates, dx, dB, paths,
    L, H, heads, block, blocks, padded, plane, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, D_b, D_l, D_h,
    y_b, y_l, y_h, P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, DIAGONAL: tl.constexpr, BOTH: tl.constexpr, STATES: tl.constexpr, HAS_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's x, and of B through what leaves the tile, for ``block`` heads of one group.

    Planes 4 and 5 of ``paths`` get, for each token, what the rest of the sequence to its right and to its left makes of
    one unit of its dt.
    """
    tile, g, b = tl.program_id(1), tl.program_id(0) // blocks, tl.program_id(2).to(tl.int64)
    part = tl.program_id(0) % blocks
    c, m = tile // R, tile % R
    start = c.to(tl.int64) * R * T
    tokens = L - start
    n, p, step = tl.arange(0, NP), tl.arange(0, PP), tl.arange(0, T)
    rows = m * T + step
    alive = rows < tokens
    B += b * B_b + start * B_l + g * B_g
    C += b * C_b + start * C_l + g * C_g
    x += b * x_b + start * x_l
    dy += b * y_b + start * y_l
    j, i = step[:, None], step[None, :]
    grad_B = tl.zeros([T, NP], tl.float32)
    for h in range(g * heads + part * block, g * heads + tl.minimum(part * block + block, heads)):
        own = decays + (b * H + h) * padded + start
        to = paths + (b * H + h) * padded + start + rows
        entry = ((b * tl.cdiv(L, R * T) + c) * H + h) * (2 if BOTH else 1) * N * P
        own_B = _tile(B, m, B_l, n, tokens, N, T).to(DOT)
        own_C = _tile(C, m, C_l, n, tokens, N, T).to(DOT)
        own_x = _tile(x + h * x_h, m, x_l, p, tokens, P, T).to(DOT)
        own_dy = _tile(dy + h * y_h, m, y_l, p, tokens, P, T).to(DOT)

        # pairs inside the tile
        from_left = _to_border(own, plane, m * T, False, False, T)
        exponent = from_left[None, :] - from_left[:, None]
        if BOTH:
            from_right = _to_border(own, plane, m * T, True, False, T)
            exponent = tl.where(i >= j, exponent, from_right[None, :] - from_right[:, None])
        else:
            exponent = tl.where(i >= j, exponent, float("-inf"))
        dt = tl.load(own + 2 * plane + rows)
        weight = tl.dot(own_B, tl.trans(own_C), input_precision=PRECISION) * tl.where(i == j, DIAGONAL, 1.0)
        weight *= tl.exp2(exponent) * dt[:, None]
        if HAS_D:
            skip = tl.load(D + b * D_b + (start + rows) * D_l + h * D_h, mask=alive, other=0.0).to(tl.float32)
            weight += tl.where(i == j, skip[:, None], 0.0)
        grad_x = tl.dot(weight.to(DOT), own_dy, input_precision=PRECISION)

        # what leaves the tile
        back = _entering(
            dy + h * y_h, y_l, C, C_l, p, n, costates + entry, own, plane, tokens, m, P, N, PP, NP, T, R,
            False, False, STATES, DOT, PRECISION,
        )  # fmt: skip
        after = _to_border(own, plane, m * T, True, True, T)
        sent = _project(own_x, back, after, PRECISION)
        tl.store(to + 4 * plane, tl.sum(sent * own_B, 1))
        grad_B += sent * dt[:, None]
        grad_x += _apply(own_B, back, after, PRECISION) * dt[:, None]
        if BOTH:
            back = _entering(
                dy + h * y_h, y_l, C, C_l, p, n, costates + entry + N * P, own, plane, tokens, m, P, N, PP, NP, T, R,
                True, False, STATES, DOT, PRECISION,
            )  # fmt: skip
            before = _to_border(own, plane, m * T, False, True, T)
            sent = _project(own_x, back, before, PRECISION)
            tl.store(to + 5 * plane, tl.sum(sent * own_B, 1))
            grad_B += sent * dt[:, None]
            grad_x += _apply(own_B, back, before, PRECISION) * dt[:, None]
        tl.store(
            dx + ((b * L + start + m * T) * H + h) * P + (step[:, None] * (H * P) + p[None, :]),
            grad_x.to(dx.dtype.element_ty),
            mask=alive[:, None] & (p < P)[None, :],
        )
    _store_partial(dB, grad_B, blocks + part, b, start + rows, g, H // heads, n, L, N)


@triton.jit(do_not_specialize=["L", "H"])
def _decay_gradients(
    dt, A, bias, decays, paths, ddt, dA, dbias, L, H, padded, plane, dt_b, dt_l, dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, BOTH: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sum paths along each tile into gradients of its log-decays, and of dt; dA and dbias get one row a tile."""
    tile, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * W + tl.arange(0, W)
    token = tile * T + tl.arange(0, T)
    heads = (h < H)[None, :]
    alive = (token < L)[:, None] & heads
    k, t = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    at = (b * H + h)[None, :] * padded + token[:, None]
    steps = decays + 2 * plane + at
    paths += at
    arriving = tl.load(paths, mask=heads, other=0.0)
    departing = tl.load(paths + 2 * plane, mask=heads, other=0.0)
    inner = heads & (k > 0)
    sent = tl.load(paths + 4 * plane - 1, mask=inner, other=0.0)
    departing += sent * tl.load(steps - 1, mask=inner, other=0.0)
    grad = tl.load(paths + 3 * plane, mask=heads, other=0.0) + tl.load(paths + 4 * plane, mask=heads, other=0.0)
    if BOTH:
        inner = heads & (k < T - 1)
        sent = tl.load(paths + 5 * plane + 1, mask=inner, other=0.0)
        arriving += sent * tl.load(steps + 1, mask=inner, other=0.0)
        arriving += tl.load(paths + plane + 1, mask=inner, other=0.0)
        grad += tl.load(paths + 5 * plane, mask=heads, other=0.0)
    grad_decay = tl.dot(tl.where(t >= k, 1.0, 0.0), arriving, input_precision="ieee")
    grad_decay = tl.dot(tl.where(t <= k, 1.0, 0.0), departing, grad_decay, input_precision="ieee")
    grad += grad_decay * tl.load(A + h, mask=h < H, other=0.0)[None, :]
    if SOFTPLUS:
        raw = tl.load(dt + b * dt_b + token[:, None] * dt_l + h[None, :] * dt_h, mask=alive, other=0.0).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias + h, mask=h < H, other=0.0)[None, :]
        e = tl.exp(-tl.abs(raw))
        grad = grad * tl.where(raw > 0, 1.0, e) / (1.0 + e)
    tl.store(ddt + ((b * L + token)[:, None] * H + h[None, :]), grad.to(ddt.dtype.element_ty), mask=alive)
    partial = (b * tl.num_programs(0) + tile) * H + h
    tl.store(
        dA + partial, tl.sum(tl.where(alive, grad_decay * tl.load(steps, mask=heads, other=0.0), 0.0), 0), mask=h < H
    )
    tl.store(dbias + partial, tl.sum(tl.where(alive, grad, 0.0), 0), mask=h < H)


def ssd_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
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
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state; states are formed again, none are kept."""
    call = _Call(BACKWARD, x, dt, A, B, C, D, dt_bias, dt_softplus, bidirectional, scanned_diagonal, chunk_size)
    dy = _rows(grad_y)
    decays = call.decays()
    states, costates, dinitial = decays, decays, None
    formed = call.chunks > 1 or initial_state is not None or grad_state is not None
    if formed:
        states, _ = call.states(call.x, call.B, decays, _float(initial_state), True)
        costates, dinitial = call.states(dy, call.C, decays, _float(grad_state), False)

    dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    dB, dC = call.new(2 * call.blocks, *B.shape), call.new(call.blocks, *C.shape)
    dD = None if D is None else call.new(*dt.shape)
    paths = call.new(6, call.batch, call.H, call.padded)
    shared = *call.sizes(), *call.strides(), *dy.stride()[:3]
    _receiver_gradients[call.grid()](
        call.x, call.B, call.C, dy, decays, states, costates, dB, dC, dD, paths, *shared, **call.constants(formed)
    )
    _sender_gradients[call.grid()](
        call.x, call.B, call.C, D, dy, decays, costates, dx, dB, paths, *shared, **call.constants(formed)
    )

    ddt = call.new(*dt.shape, dtype=dt.dtype)
    dA, dbias = (call.new(call.batch, call.tiles, call.H) for _ in range(2))
    _decay_gradients[(call.tiles, triton.cdiv(call.H, HEADS), call.batch)](
        dt, call.A, call.bias, decays, paths, ddt, dA, dbias, call.L, call.H, call.padded, call.plane, *dt.stride(),
        SOFTPLUS=dt_softplus, HAS_BIAS=dt_bias is not None, BOTH=bidirectional, T=call.T, W=HEADS, num_warps=4,
    )  # fmt: skip
    return dx, ddt, dA.sum((0, 1)), dB.sum(0), dC.sum(0), dD, dbias.sum((0, 1)), dinitial
