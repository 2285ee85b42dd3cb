"""State-space duality in Triton: both directions in one pass, for bfloat16 on tensor cores.

Tokens are cut into tiles of T and chunks of R tiles. A tile's own pairs are one masked product with the decay of both
directions; what comes from the rest of its chunk is formed as a state at its borders from the other tiles; what comes
from other chunks are the states that ``_chunk_states`` forms and ``_carry`` chains. A state that travels rightward
(from earlier tokens) is anchored at a tile's left border, a leftward one at its right border. The gradients are in
ssd_triton_backward.py; what both need takes the primal or its adjoint.

Decays are exponentials of sums of dt A towards a tile border, at most 1, held as prefix and suffix sums per tile.
float16 is computed as tf32, which has its mantissa and float32's range; float32 as three tf32 products.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambavision.kernels.triton import LOG2E, _softplus


@dataclass(frozen=True)
class Config:
    """Tokens a tile, tiles a chunk, and of a program: warps, and registers a thread."""

    tile: int
    tiles: int
    warps: int
    registers: int


FORWARD = Config(64, 4, 4, 168)
CHUNK_SIZES = (16, 32, 64, 128, 256, 512)
WIDTH = 64  # tiles are never narrower than this: narrower ones were not run on a GPU
HEADS = 16  # heads a program of the small kernels takes at once
PROGRAMS = 1024  # programs wanted at least, before a program takes several heads
OPERANDS = {
    torch.bfloat16: (torch.bfloat16, tl.bfloat16, "ieee"),
    torch.float16: (torch.float32, tl.float32, "tf32"),
    torch.float32: (torch.float32, tl.float32, "tf32x3"),
}


@triton.jit
def _tile(v, t, stride, columns, tokens, WIDTH: tl.constexpr, T: tl.constexpr):
    """Tile t (T, width) of a chunk; columns are contiguous; zero outside."""
    step = tl.arange(0, T)
    mask = (step < tokens - t * T)[:, None]
    if WIDTH != columns.shape[0]:
        mask &= (columns < WIDTH)[None, :]
    return tl.load(v + t * T * stride + (step[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def _to_border(decays, plane, first, RIGHT: tl.constexpr, EXCLUSIVE: tl.constexpr, T: tl.constexpr):
    """Sum of log-decay between each token of the tile at ``first`` and its left or right border."""
    step = tl.arange(0, T)
    if RIGHT:
        decays += plane
    if not EXCLUSIVE:
        v = tl.load(decays + first + step)
    elif RIGHT:
        v = tl.load(decays + first + step + 1, mask=step < T - 1, other=0.0)
    else:
        v = tl.load(decays + first + step - 1, mask=step > 0, other=0.0)
    return v


@triton.jit
def _sent(
    V, stride, columns, decays, plane, t, gap, tokens, WIDTH: tl.constexpr, T: tl.constexpr,
    RIGHT: tl.constexpr, PRIMAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Tile t of x (primal; times dt) or dy (adjoint), decayed to its border and ``gap`` beyond."""
    scale = tl.exp2(_to_border(decays, plane, t * T, RIGHT, PRIMAL, T) + gap)
    if PRIMAL:
        scale *= tl.load(decays + 2 * plane + t * T + tl.arange(0, T))
    return (_tile(V, t, stride, columns, tokens, WIDTH, T) * scale[:, None]).to(DOT)


@triton.jit
def _entering(
    V, v_l, K, k_l, p, n, state, decays, plane, tokens, m, P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr,
    NP: tl.constexpr, T: tl.constexpr, R: tl.constexpr, RIGHT: tl.constexpr, PRIMAL: tl.constexpr,
    STATES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rightward (or leftward) state (N, P) that enters tile m of a chunk. Pointers are at the chunk's start."""
    tiles = tl.arange(0, R)
    totals = tl.load(decays + tiles * T + T - 1)
    entering = tl.zeros([NP, PP], tl.float32)
    if STATES:
        inside = (n < N)[:, None] & (p < P)[None, :]
        entering = tl.load(state + n[:, None] * P + p[None, :], mask=inside, other=0.0).to(tl.float32)
        entering *= tl.exp2(tl.sum(tl.where(tiles < m if RIGHT else tiles > m, totals, 0.0), 0))
    for t in tl.range(0 if RIGHT else m + 1, m if RIGHT else tl.minimum(R, tl.cdiv(tokens, T)), num_stages=1):
        between = (tiles > t) & (tiles < m) if RIGHT else (tiles < t) & (tiles > m)
        gap = tl.sum(tl.where(between, totals, 0.0), 0)
        k = _tile(K, t, k_l, n, tokens, N, T).to(DOT)
        v = _sent(V, v_l, p, decays, plane, t, gap, tokens, P, T, RIGHT, PRIMAL, DOT)
        entering = tl.dot(tl.trans(k), v, entering, input_precision=PRECISION)
    return entering


@triton.jit
def _apply(k, state, log_decay, PRECISION: tl.constexpr):
    """Rows of B or C (T, N) times a state (N, P), decayed."""
    return tl.dot(k, state.to(k.dtype), input_precision=PRECISION) * tl.exp2(log_decay)[:, None]


@triton.jit(do_not_specialize=["L", "H"])
def _decays(
    dt, A, bias, decays, L, H, padded, plane, dt_b, dt_l, dt_h,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Planes (batch, H, padded L): log2-decay summed from each tile's start, to its end, and dt."""
    start, b = tl.program_id(0).to(tl.int64) * T, tl.program_id(2).to(tl.int64)
    h = tl.program_id(1) * W + tl.arange(0, W)
    rate = tl.load(A + h, mask=h < H, other=0.0) * LOG2E
    to = decays + (b * H + h)[None, :] * padded + start
    for reverse in tl.static_range(2):
        step = tl.arange(0, T)
        step = T - 1 - step if reverse else step
        alive = (start + step < L)[:, None] & (h < H)[None, :]
        v = tl.load(dt + b * dt_b + (start + step)[:, None] * dt_l + h[None, :] * dt_h, mask=alive, other=0.0).to(
            tl.float32
        )
        if HAS_BIAS:
            v += tl.load(bias + h, mask=h < H, other=0.0)[None, :]
        if SOFTPLUS:
            v = _softplus(v)
        v = tl.where(alive, v, 0.0)
        tl.store(to + reverse * plane + step[:, None], tl.cumsum(v * rate[None, :], 0), mask=(h < H)[None, :])
        if reverse == 0:
            tl.store(to + 2 * plane + step[:, None], v, mask=(h < H)[None, :])


@triton.jit(do_not_specialize=["L", "H", "heads"])
def _chunk_states(
    V, K, decays, states, L, H, heads, padded, plane, v_b, v_l, v_h, k_b, k_l, k_g,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    PRIMAL: tl.constexpr, BOTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk alone sends over its borders, to ``states`` (batch, chunks, H, directions, N, P)."""
    h, c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(1)
    start = c.to(tl.int64) * R * T
    n, p, tiles = tl.arange(0, NP), tl.arange(0, PP), tl.arange(0, R)
    V += b * v_b + start * v_l + h * v_h
    K += b * k_b + start * k_l + h // heads * k_g
    decays += (b * H + h) * padded + start
    totals = tl.load(decays + tiles * T + T - 1)
    right = tl.zeros([NP, PP], tl.float32)
    left = tl.zeros([NP, PP], tl.float32)
    for t in range(R):
        k = tl.trans(_tile(K, t, k_l, n, L - start, N, T).to(DOT))
        if PRIMAL or BOTH:
            gap = tl.sum(tl.where(tiles > t, totals, 0.0), 0)
            v = _sent(V, v_l, p, decays, plane, t, gap, L - start, P, T, True, PRIMAL, DOT)
            right = tl.dot(k, v, right, input_precision=PRECISION)
        if BOTH or not PRIMAL:
            gap = tl.sum(tl.where(tiles < t, totals, 0.0), 0)
            v = _sent(V, v_l, p, decays, plane, t, gap, L - start, P, T, False, PRIMAL, DOT)
            left = tl.dot(k, v, left, input_precision=PRECISION)
    states += ((b * chunks + c) * H + h) * (2 if BOTH else 1) * N * P
    at = n[:, None] * P + p[None, :]
    inside = (n < N)[:, None] & (p < P)[None, :]
    if PRIMAL or BOTH:
        tl.store(states + (0 if PRIMAL else N * P) + at, right.to(states.dtype.element_ty), mask=inside)
    if BOTH or not PRIMAL:
        tl.store(states + (N * P if PRIMAL else 0) + at, left.to(states.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "chunks"])
def _carry(
    states, decays, initial, last, H, chunks, padded,
    P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, R: tl.constexpr, DIRECTIONS: tl.constexpr,
    PRIMAL: tl.constexpr, HAS_INITIAL: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Chain chunks: ``states`` become those entering each chunk; the one leaving the last goes to ``last``."""
    e = tl.program_id(0) * W + tl.arange(0, W)
    inside = e < N * P
    h = tl.program_id(1)
    direction = tl.program_id(2) % DIRECTIONS
    b = (tl.program_id(2) // DIRECTIONS).to(tl.int64)
    leftward = (direction == 1) if PRIMAL else (direction == 0)
    outside = ((b * DIRECTIONS + direction) * H + h) * N * P + e % P * N + e // P  # (P, N)
    state = tl.zeros([W], tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial + outside, mask=inside, other=0.0)
    decays += (b * H + h) * padded + tl.arange(0, R) * T + T - 1
    states += ((b * chunks * H + h) * DIRECTIONS + direction) * N * P + e
    for i in tl.range(chunks, num_stages=4):
        c = tl.where(leftward, chunks - 1 - i, i).to(tl.int64)
        at = states + c * H * DIRECTIONS * N * P
        own = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp2(tl.sum(tl.load(decays + c * R * T), 0))
        tl.store(at, state.to(states.dtype.element_ty), mask=inside)
        state = decay * state + own
    tl.store(last + outside, state, mask=inside)


@triton.jit(do_not_specialize=["L", "H", "heads"])
def _outputs(
    x, B, C, D, decays, states, y, L, H, heads, padded, plane,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, D_b, D_l, D_h, y_b, y_l, y_h,
    P: tl.constexpr, N: tl.constexpr, PP: tl.constexpr, NP: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    DIAGONAL: tl.constexpr, BOTH: tl.constexpr, STATES: tl.constexpr, HAS_D: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one tile and head."""
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c, m, g = tile // R, tile % R, h // heads
    start = c.to(tl.int64) * R * T
    tokens = L - start
    n, p, step = tl.arange(0, NP), tl.arange(0, PP), tl.arange(0, T)
    rows = m * T + step
    B += b * B_b + start * B_l + g * B_g
    C += b * C_b + start * C_l + g * C_g
    x += b * x_b + start * x_l + h * x_h
    y += b * y_b + start * y_l + h * y_h
    decays += (b * H + h) * padded + start
    states += ((b * tl.cdiv(L, R * T) + c) * H + h) * (2 if BOTH else 1) * N * P

    # pairs inside the tile
    i, j = step[:, None], step[None, :]
    from_left = _to_border(decays, plane, m * T, False, False, T)
    exponent = from_left[:, None] - from_left[None, :]
    if BOTH:
        from_right = _to_border(decays, plane, m * T, True, False, T)
        exponent = tl.where(i >= j, exponent, from_right[:, None] - from_right[None, :])
    else:
        exponent = tl.where(i >= j, exponent, float("-inf"))
    own_C = _tile(C, m, C_l, n, tokens, N, T).to(DOT)
    own_B = _tile(B, m, B_l, n, tokens, N, T).to(DOT)
    weight = tl.dot(own_C, tl.trans(own_B), input_precision=PRECISION) * tl.where(i == j, DIAGONAL, 1.0)
    weight *= tl.exp2(exponent) * tl.load(decays + 2 * plane + rows)[None, :]
    if HAS_D:
        skip = tl.load(D + b * D_b + (start + rows) * D_l + h * D_h, mask=rows < tokens, other=0.0)
        weight += tl.where(i == j, skip.to(tl.float32)[None, :], 0.0)
    own_x = _tile(x, m, x_l, p, tokens, P, T).to(DOT)
    out = tl.dot(weight.to(DOT), own_x, input_precision=PRECISION)

    # what enters the tile
    right = _entering(
        x, x_l, B, B_l, p, n, states, decays, plane, tokens, m, P, N, PP, NP, T, R,
        True, True, STATES, DOT, PRECISION,
    )  # fmt: skip
    out += _apply(own_C, right, from_left, PRECISION)
    if BOTH:
        left = _entering(
            x, x_l, B, B_l, p, n, states + N * P, decays, plane, tokens, m, P, N, PP, NP, T, R,
            False, True, STATES, DOT, PRECISION,
        )  # fmt: skip
        out += _apply(own_C, left, from_right, PRECISION)
    tl.store(
        y + m * T * y_l + (step[:, None] * y_l + p[None, :]),
        out.to(y.dtype.element_ty),
        mask=(rows < tokens)[:, None] & (p < P)[None, :],
    )


class _Call:
    """One call's sizes, launch constants and inputs as kernels take them."""

    def __init__(self, base: Config, x, dt, A, B, C, D, dt_bias, dt_softplus, both, scanned_diagonal, chunk_size):
        self.batch, self.L, self.H, self.P = x.shape
        self.G, self.N = B.shape[2:]
        self.x, self.B, self.C = (_rows(v.to(x.dtype)) for v in (x, B, C))
        self.dt, self.A, self.D = dt, A.float().contiguous(), D
        self.bias = None if dt_bias is None else dt_bias.float().contiguous()
        self.softplus, self.both, self.diagonal = dt_softplus, both, (1 + both if scanned_diagonal else 0)
        self.state_dtype, dot, precision = OPERANDS[x.dtype]

        if chunk_size is not None and chunk_size not in CHUNK_SIZES:
            raise ValueError(f"chunk_size must be one of {CHUNK_SIZES} on triton, got {chunk_size}")
        T = base.tile if x.dtype == torch.bfloat16 else base.tile // 2
        T = min(T, chunk_size or T)  # short sequences too: no kernels compiled for them alone
        R = chunk_size // T if chunk_size else base.tiles
        self.tiles, self.chunks = triton.cdiv(self.L, T), triton.cdiv(self.L, T * R)
        self.padded = self.chunks * T * R
        self.plane = self.batch * self.H * self.padded
        self.heads = self.H // self.G
        self.blocks = min(self.heads, triton.cdiv(PROGRAMS, self.tiles * self.G * self.batch))
        self.block = triton.cdiv(self.heads, self.blocks)
        self.blocks = triton.cdiv(self.heads, self.block)
        self.inner = {"T": T, "R": R, "BOTH": both, "DOT": dot, "PRECISION": precision}
        self.width = {v: max(WIDTH, triton.next_power_of_2(n)) for v, n in (("PP", self.P), ("NP", self.N))}
        self.width |= {"P": self.P, "N": self.N}
        self.launch = {"num_warps": base.warps, "num_stages": 1, "maxnreg": base.registers}

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.x.device, dtype=dtype)

    @property
    def T(self) -> int:
        return self.inner["T"]

    def decays(self) -> Tensor:
        """Planes of :func:`_decays`."""
        planes = self.new(3, self.batch, self.H, self.padded)
        _decays[(self.padded // self.T, triton.cdiv(self.H, HEADS), self.batch)](
            self.dt, self.A, self.bias, planes, self.L, self.H, self.padded, self.plane, *self.dt.stride(),
            SOFTPLUS=self.softplus, HAS_BIAS=self.bias is not None, T=self.T, W=HEADS, num_warps=2,
        )  # fmt: skip
        return planes

    def states(self, v: Tensor, k: Tensor, decays: Tensor, initial: Tensor | None, primal: bool):
        """States entering each chunk (batch, chunks, H, directions, N, P) and those leaving the last (.., P, N)."""
        directions = 1 + self.both
        states = self.new(self.batch, self.chunks, self.H, directions, self.N, self.P, dtype=self.state_dtype)
        last = self.new(self.batch, directions, self.H, self.P, self.N)
        _chunk_states[(self.H, self.chunks, self.batch)](
            v, k, decays, states, self.L, self.H, self.heads, self.padded, self.plane, *v.stride()[:3], *k.stride()[:3],
            PRIMAL=primal, **self.width, **self.inner, num_warps=4, num_stages=2,
        )  # fmt: skip
        _carry[(triton.cdiv(self.N * self.P, 1024), self.H, self.batch * directions)](
            states, decays, initial, last, self.H, self.chunks, self.padded, P=self.P, N=self.N, T=self.T,
            R=self.inner["R"], DIRECTIONS=directions, PRIMAL=primal, HAS_INITIAL=initial is not None, W=1024,
        )  # fmt: skip
        return states, last

    def grid(self) -> tuple[int, int, int]:
        return self.G * self.blocks, self.tiles, self.batch

    def sizes(self) -> tuple[int, ...]:
        return self.L, self.H, self.heads, self.block, self.blocks, self.padded, self.plane

    def strides(self) -> tuple[int, ...]:
        D = self.D.stride() if self.D is not None else (0, 0, 0)
        return *self.x.stride()[:3], *self.B.stride()[:3], *self.C.stride()[:3], *D

    def constants(self, states: bool) -> dict:
        given = {"DIAGONAL": self.diagonal, "STATES": states, "HAS_D": self.D is not None}
        return given | self.width | self.inner | self.launch


def _rows(v: Tensor) -> Tensor:
    """Kernels take any strides but the last, which they want to be 1."""
    return v if v.stride(-1) == 1 else v.contiguous()


def _float(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.float().contiguous()


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
    return_last_state: bool,
) -> tuple[Tensor, Tensor]:
    """Same contract as :func:`ssd_reference.ssd`, for float32, bfloat16 and float16 on a GPU.

    Without ``return_last_state`` the states are not formed where they are not needed, and come back with 0 directions.
    """
    call = _Call(FORWARD, x, dt, A, B, C, D, dt_bias, dt_softplus, bidirectional, scanned_diagonal, chunk_size)
    decays = call.decays()
    states, last = decays, call.new(call.batch, 0, call.H, call.P, call.N)
    formed = call.chunks > 1 or initial_state is not None or return_last_state
    if formed:
        states, leaving = call.states(call.x, call.B, decays, _float(initial_state), True)
        last = leaving if return_last_state else last
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    _outputs[(call.H, call.tiles, call.batch)](
        call.x, call.B, call.C, D, decays, states, y, call.L, call.H, call.heads, call.padded, call.plane,
        *call.strides(), *y.stride()[:3],
        **call.constants(formed),
    )  # fmt: skip
    return y, last
