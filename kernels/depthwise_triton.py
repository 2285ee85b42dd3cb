"""Depth-wise convolution of channels-last pixels in Triton: forward, and backward without atomics.

A program slides over ROWS rows of TW pixels and BD channels, so that a row is read once for all rows of the stencil. A
sequence is an image one pixel wide. The gradient of the input is a convolution too, with the stencil turned round; of a
sequence it is formed in one pass with the others.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiling(NamedTuple):
    """Rows, pixels of a row and channels of a program, its warps, and rows that its forward loads ahead (0: all)."""

    rows: int
    width: int
    channels: int
    warps: int
    ahead: int = 0


PROGRAMS = 2048  # of the weight gradient; each writes a partial sum
SEQUENCE_PROGRAMS = 1320  # of a sequence's: 10 warps of some 170 registers on each of an H100's processors, one wave


@triton.jit
def _place(H, W, D, rows, TW: tl.constexpr, BD: tl.constexpr):
    """Columns, first row, image, channels and which of them exist."""
    i = tl.program_id(0)
    across, down = tl.cdiv(W, TW), tl.cdiv(H, rows)
    ch = tl.program_id(1) * BD + tl.arange(0, BD)
    return (i % across) * TW + tl.arange(0, TW), (i // across) % down * rows, (i // (across * down)).to(tl.int64), ch


@triton.jit
def _stencil(weight, ch, D, TAPS: tl.constexpr, FLIP: tl.constexpr):
    w = ()
    for j in tl.static_range(TAPS):
        at = TAPS - 1 - j if FLIP else j
        w = w + (tl.load(weight + ch * TAPS + at, mask=ch < D, other=0.0).to(tl.float32)[None, :],)
    return w


@triton.jit
def _row(x, h, H, col, W, x_h, x_w, ch, D, KW: tl.constexpr, PW: tl.constexpr):
    """Row h, as often as the stencil is wide: tile j is shifted by j - PW pixels. Zero outside the image."""
    tiles = ()
    for j in tl.static_range(KW):
        c = col + (j - PW)
        inside = ((c >= 0) & (c < W) & (h >= 0) & (h < H))[:, None] & (ch < D)[None, :]
        at = h.to(tl.int64) * x_h + (c.to(tl.int64) * x_w)[:, None] + ch[None, :]
        tiles = tiles + (tl.load(x + at, mask=inside, other=0.0),)
    return tiles


@triton.jit
def _gauss(v):
    """Standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(v * 0.7071067811865476)


@triton.jit
def _activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        v *= tl.sigmoid(v)
    elif ACTIVATION == "gelu":
        v *= _gauss(v)
    return v


@triton.jit
def _slope(v, ACTIVATION: tl.constexpr):
    """Derivative of the activation."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(v)
        slope = s * (1.0 + v * (1.0 - s))
    else:
        slope = _gauss(v) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    return slope


@triton.jit(do_not_specialize=["H", "W"])
def _conv_forward(
    x, weight, bias, y, H, W, D, x_b, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    col, h0, b, ch = _place(H, W, D, ROWS, TW, BD)
    x += b * x_b
    y += b * H * W * D
    w = _stencil(weight, ch, D, KH * KW, FLIP)
    zero = tl.zeros([TW, BD], tl.float32)
    if HAS_BIAS:
        zero += tl.load(bias + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :]
    inside = (col < W)[:, None] & (ch < D)[None, :]
    sums = ()  # of the rows under way, the oldest last
    for _ in tl.static_range(KH):
        sums = sums + (zero,)
    tiles = ()  # loads that follow a store in the program wait for it: rows are loaded AHEAD
    for r in tl.static_range(AHEAD):
        tiles = tiles + _row(x, h0 + (r - PH), H, col, W, x_h, x_w, ch, D, KW, PW)
    for r in tl.static_range(ROWS + KH - 1):
        if r + AHEAD < ROWS + KH - 1:
            tiles = tiles + _row(x, h0 + (r + AHEAD - PH), H, col, W, x_h, x_w, ch, D, KW, PW)
        older = (zero,)
        for i in tl.static_range(KH):
            v = sums[i]
            for j in tl.static_range(KW):
                v += w[i * KW + j] * tiles[r * KW + j].to(tl.float32)
            older = older + (v,)
        sums = older
        if r >= KH - 1:
            h = h0 + (r - KH + 1)
            at = (h.to(tl.int64) * W + col)[:, None] * D + ch[None, :]
            out = _activate(sums[KH], ACTIVATION)
            tl.store(y + at, out.to(y.dtype.element_ty), mask=inside & (h < H))


@triton.jit(do_not_specialize=["H", "W", "strip"])
def _conv_gradient(
    x, weight, bias, dy, dv, dw, db, H, W, D, x_b, x_h, x_w, y_b, y_h, y_w, strip,
    KH: tl.constexpr, KW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, FLIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of strips of rows: the gradient dv before the activation, and partial sums of those of weight and bias."""
    col, first, b, ch = _place(H, W, D, strip, TW, BD)
    x += b * x_b
    dy += b * y_b
    dv += b * H * W * D
    w = ()
    if ACTIVATION is not None:
        w = _stencil(weight, ch, D, KH * KW, FLIP)
    zero = tl.zeros([TW, BD], tl.float32)
    shift = zero
    if HAS_BIAS and ACTIVATION is not None:
        shift += tl.load(bias + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :]
    inside = (col < W)[:, None] & (ch < D)[None, :]
    sums = (zero,)
    for _ in tl.static_range(KH * KW):
        sums = sums + (zero,)
    last = tl.minimum(first + strip, H)
    for i in range(0, tl.cdiv(last - first, ROWS)):
        h0 = first + i * ROWS
        tiles = ()
        for r in tl.static_range(ROWS + KH - 1):
            tiles = tiles + _row(x, h0 + (r - PH), H, col, W, x_h, x_w, ch, D, KW, PW)
        grads = ()
        for r in tl.static_range(ROWS):
            h = h0 + r
            at = h.to(tl.int64) * y_h + (col.to(tl.int64) * y_w)[:, None] + ch[None, :]
            grads = grads + (tl.load(dy + at, mask=inside & (h < last), other=0.0),)
        for r in tl.static_range(ROWS):
            g = grads[r].to(tl.float32)
            if ACTIVATION is not None:
                v = shift
                for j in tl.static_range(KH * KW):
                    v += w[j] * tiles[r * KW + j].to(tl.float32)
                g *= _slope(v, ACTIVATION)
                h = h0 + r
                at = (h.to(tl.int64) * W + col)[:, None] * D + ch[None, :]
                tl.store(dv + at, g.to(dv.dtype.element_ty), mask=inside & (h < last))
            more = (sums[0] + g,)
            for j in tl.static_range(KH * KW):
                more = more + (sums[j + 1] + g * tiles[r * KW + j].to(tl.float32),)
            sums = more
    at = tl.program_id(0).to(tl.int64) * D + ch
    if HAS_BIAS:
        tl.store(db + at, tl.sum(sums[0], 0), mask=ch < D)
    for j in tl.static_range(KH * KW):
        to = KH * KW - 1 - j if FLIP else j
        tl.store(dw + at * (KH * KW) + to, tl.sum(sums[j + 1], 0), mask=ch < D)


@triton.jit
def _tokens(v, first, H, stride, ch, D, COUNT: tl.constexpr):
    """COUNT tokens from `first` on, zero outside the sequence."""
    tiles = ()
    for r in tl.static_range(COUNT):
        t = first + r
        tiles = tiles + (tl.load(v + t.to(tl.int64) * stride + ch, mask=(ch < D) & (t >= 0) & (t < H), other=0.0),)
    return tiles


@triton.jit(do_not_specialize=["H", "strip"])
def _sequence_gradient(
    x, weight, bias, dy, dx, dw, db, H, D, x_b, x_h, y_b, y_h, dx_b, dx_h, strip,
    KH: tl.constexpr, PH: tl.constexpr, FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of strips of tokens: the gradient dx, and partial sums of those of weight and bias.

    dx_t = sum over j of w_j dv_{t + PH - j} with dv = dy times the activation's slope, formed again from x.
    """
    i = tl.program_id(0)
    down = tl.cdiv(H, strip)
    first, b = i % down * strip, (i // down).to(tl.int64)
    ch = tl.program_id(1) * BD + tl.arange(0, BD)
    x += b * x_b
    dy += b * y_b
    dx += b * dx_b
    w = ()
    for j in tl.static_range(KH):
        at = KH - 1 - j if FLIP else j
        w = w + (tl.load(weight + ch * KH + at, mask=ch < D, other=0.0).to(tl.float32),)
    shift = tl.zeros([BD], tl.float32)
    if HAS_BIAS and ACTIVATION is not None:
        shift += tl.load(bias + ch, mask=ch < D, other=0.0).to(tl.float32)
    sums = (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(KH):
        sums = sums + (tl.zeros([BD], tl.float32),)
    last = tl.minimum(first + strip, H)
    BEFORE: tl.constexpr = KH - 1 - PH  # tokens of dv that dx of a token looks back and ahead
    next_x = _tokens(x, first - BEFORE - PH, H, x_h, ch, D, ROWS + 2 * (KH - 1))
    next_g = _tokens(dy, first - BEFORE, H, y_h, ch, D, ROWS + KH - 1)
    for k in range(0, tl.cdiv(last - first, ROWS)):
        t0 = first + k * ROWS
        tiles, grads = next_x, next_g
        next_x = _tokens(x, t0 + ROWS - BEFORE - PH, H, x_h, ch, D, ROWS + 2 * (KH - 1))  # before this one's stores
        next_g = _tokens(dy, t0 + ROWS - BEFORE, H, y_h, ch, D, ROWS + KH - 1)
        dv = ()
        for r in tl.static_range(ROWS + KH - 1):
            g = grads[r].to(tl.float32)
            if ACTIVATION is not None:
                v = shift
                for j in tl.static_range(KH):
                    v += w[j] * tiles[r + j].to(tl.float32)
                g *= _slope(v, ACTIVATION)
            dv = dv + (g,)
        for r in tl.static_range(ROWS):
            t = t0 + r
            out = tl.zeros([BD], tl.float32)
            for j in tl.static_range(KH):
                out += w[j] * dv[r + KH - 1 - j]
            tl.store(dx + t.to(tl.int64) * dx_h + ch, out.to(dx.dtype.element_ty), mask=(ch < D) & (t < last))
            g = tl.where(t < last, dv[r + BEFORE], 0.0)
            more = (sums[0] + g,)
            for j in tl.static_range(KH):
                more = more + (sums[j + 1] + g * tiles[r + BEFORE + j].to(tl.float32),)
            sums = more
    at = i.to(tl.int64) * D + ch
    if HAS_BIAS:
        tl.store(db + at, sums[0], mask=ch < D)
    for j in tl.static_range(KH):
        to = KH - 1 - j if FLIP else j
        tl.store(dw + at * KH + to, sums[j + 1], mask=ch < D)


def _cdiv(a: int, b: int) -> int:
    """In a fraction of the time of triton.cdiv, which is made for kernels."""
    return -(-a // b)


def _tiling(H: int, W: int, D: int, *, gradient: bool) -> Tiling:
    if W == 1:
        return Tiling(8 if H > 4 else 4, 1, 128, 1) if gradient else Tiling(16, 1, 128, 1)
    return Tiling(4, 8, 64, 4) if gradient else Tiling(8, 8, 64, 4, 4)


def _strides(v: Tensor) -> tuple[int, ...]:
    """Of batch, row and pixel, 0 along axes of size 1; channels are neighbours."""
    return tuple(s if n > 1 else 0 for s, n in zip(v.stride()[:3], v.shape, strict=False))


def _dense(v: Tensor) -> Tensor:
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def _contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _taps(weight: Tensor, pad: tuple[int, int], flip: bool) -> dict[str, int | bool]:
    """The stencil as the kernels see it, turned round already."""
    (KH, KW), (PH, PW) = weight.shape[1:], pad
    return {"KH": KH, "KW": KW, "PH": KH - 1 - PH if flip else PH, "PW": KW - 1 - PW if flip else PW, "FLIP": flip}


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: dict[str, int | bool],
    activation: str | None,
    tiling: Tiling | None = None,
) -> Tensor:
    batch, H, W, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    t = tiling or _tiling(H, W, D, gradient=False)
    grid = (_cdiv(W, t.width) * _cdiv(H, t.rows) * batch, _cdiv(D, t.channels))
    rows = t.rows + taps["KH"] - 1
    if y.numel():
        with torch.cuda.device_of(x):
            _conv_forward[grid](
                x, weight, bias, y, H, W, D, *_strides(x), **taps, HAS_BIAS=bias is not None, ACTIVATION=activation,
                ROWS=t.rows, TW=t.width, BD=t.channels, AHEAD=min(t.ahead or rows, rows), num_warps=t.warps,
            )  # fmt: skip
    return y


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, pad: tuple[int, int], flip: bool, activation: str | None
) -> Tensor:
    """y[p] = activation(bias + sum of weight[i, j] x[p + s ((i, j) - pad)]) with s = -1 if ``flip`` else 1; like x.

    Shapes: x (batch, H, W, D), weight (D, kh, kw), bias (D,); activation "silu", "gelu" or None.
    """
    return _convolve(_dense(x), weight.contiguous(), _contiguous(bias), _taps(weight, pad, flip), activation)


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pad: tuple[int, int],
    flip: bool,
    activation: str | None,
    tiling: Tiling | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, the last two in float32; of a sequence x's is written to ``dx``, if given."""
    x, dy, weight, bias = _dense(x), _dense(dy), weight.contiguous(), _contiguous(bias)
    taps = _taps(weight, pad, flip)
    (batch, H, W, D), (KH, KW) = x.shape, weight.shape[1:]
    if x.numel() == 0:
        return torch.empty_like(x), *(None if v is None else torch.zeros_like(v) for v in (weight, bias))
    t = tiling or _tiling(H, W, D, gradient=True)
    wide, tall = _cdiv(W, t.width), _cdiv(D, t.channels)
    programs = SEQUENCE_PROGRAMS if W == KW == 1 else PROGRAMS
    strips = max(1, min(programs // (wide * tall * batch), _cdiv(H, t.rows)))
    strip = _cdiv(_cdiv(H, strips), t.rows) * t.rows
    programs = wide * _cdiv(H, strip) * batch
    dw = torch.empty(programs, *weight.shape, dtype=torch.float32, device=x.device)
    db = None if bias is None else torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if W == KW == 1:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
        with torch.cuda.device_of(x):
            _sequence_gradient[programs, tall](
                x, weight, bias, dy, dx, dw, db, H, D, *(s for v in (x, dy, dx) for s in _strides(v)[:2]), strip,
                KH=KH, PH=taps["PH"], FLIP=flip, HAS_BIAS=bias is not None, ACTIVATION=activation,
                ROWS=t.rows, BD=t.channels, num_warps=t.warps,
            )  # fmt: skip
        return dx, dw.sum(0), None if bias is None else db.sum(0)
    dv = dy if activation is None else torch.empty(x.shape, dtype=dy.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _conv_gradient[programs, tall](
            x, weight, bias, dy, dv, dw, db, H, W, D, *_strides(x), *_strides(dy), strip, **taps,
            HAS_BIAS=bias is not None, ACTIVATION=activation,
            ROWS=t.rows, TW=t.width, BD=t.channels, num_warps=t.warps,
        )  # fmt: skip
    back = taps | {"PH": KH - 1 - taps["PH"], "PW": KW - 1 - taps["PW"], "FLIP": not flip}
    dx = _convolve(dv, weight, None, back, None)
    return dx, dw.sum(0), None if bias is None else db.sum(0)
