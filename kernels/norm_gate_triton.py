"""Normalisation and gate after the scan in Triton, in one pass over each row forward and backward."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambavision.kernels.depthwise_triton import _activate, _cdiv, _contiguous, _slope

PROGRAMS = 1024  # of the backward; each walks over several tiles and writes partial sums
ELEMENTS = 1024  # of a tile


@triton.jit
def _rows(v, r, ch, rows, D, stride, BD: tl.constexpr, COUNT: tl.constexpr):
    """Rows r in COUNT tiles of BD channels, zero outside; as few lanes idle as D leaves."""
    tiles = ()
    for i in tl.static_range(COUNT):
        c = ch + i * BD
        mask = (r < rows)[:, None] & (c < D)[None, :]
        tiles = tiles + (tl.load(v + r[:, None] * stride + c[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def _store(v, tiles, r, ch, rows, D, stride, BD: tl.constexpr, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        c = ch + i * BD
        mask = (r < rows)[:, None] & (c < D)[None, :]
        tl.store(v + r[:, None] * stride + c[None, :], tiles[i].to(v.dtype.element_ty), mask=mask)


@triton.jit
def _parameter(v, ch, D, default, GIVEN: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for i in tl.static_range(COUNT):
        if GIVEN:
            c = ch + i * BD
            tiles = tiles + (tl.load(v + c, mask=c < D, other=0.0).to(tl.float32)[None, :],)
        else:
            tiles = tiles + (tl.full([1, 1], default, tl.float32),)
    return tiles


@triton.jit
def _mean(tiles, others, D, COUNT: tl.constexpr):
    """The mean of tiles * others over a row, (TR, 1)."""
    total = tl.sum(tiles[0] * others[0], 1)
    for i in tl.static_range(1, COUNT):
        total += tl.sum(tiles[i] * others[i], 1)
    return (total / D)[:, None]


@triton.jit
def _normalise(tiles, r, ch, rows, D, eps, NORM: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr):
    """Rows with mean square 1, for "layer" also with mean 0, and what they were multiplied by."""
    factor = tl.full([1, 1], 1.0, tl.float32)
    if NORM is not None:
        if NORM == "layer":
            ones = ()
            for _ in tl.static_range(COUNT):
                ones = ones + (tl.full([1, 1], 1.0, tl.float32),)
            mean = _mean(tiles, ones, D, COUNT)
            centred = ()
            for i in tl.static_range(COUNT):
                mask = (r < rows)[:, None] & (ch + i * BD < D)[None, :]
                centred = centred + (tl.where(mask, tiles[i] - mean, 0.0),)
            tiles = centred
        factor = tl.rsqrt(_mean(tiles, tiles, D, COUNT) + eps)
        scaled = ()
        for i in tl.static_range(COUNT):
            scaled = scaled + (tiles[i] * factor,)
        tiles = scaled
    return tiles, factor


@triton.jit
def _gates(tiles, ACTIVATION: tl.constexpr, GATE: tl.constexpr, COUNT: tl.constexpr):
    """Activated gates and the activation's slopes, 1 where there is none."""
    gates, slopes = (), ()
    for i in tl.static_range(COUNT):
        gate, slope = tl.full([1, 1], 1.0, tl.float32), tl.full([1, 1], 1.0, tl.float32)
        if GATE:
            gate = _activate(tiles[i].to(tl.float32), ACTIVATION)
            if ACTIVATION is not None:
                slope = _slope(tiles[i].to(tl.float32), ACTIVATION)
        gates, slopes = gates + (gate,), slopes + (slope,)
    return gates, slopes


@triton.jit(do_not_specialize=["rows"])
def _gate_forward(
    x, z, weight, bias, y, rows, D, x_r, z_r, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    TR: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TR + tl.arange(0, TR)
    ch = tl.arange(0, BD)
    loaded = _rows(x, r, ch, rows, D, x_r, BD, COUNT)
    raw = _rows(z, r, ch, rows, D, z_r, BD, COUNT) if GATE else loaded
    gates, _ = _gates(raw, ACTIVATION, GATE, COUNT)
    tiles = ()
    for i in tl.static_range(COUNT):
        v = loaded[i].to(tl.float32)
        tiles = tiles + (v * gates[i] if NORM == "gated_rms" else v,)
    tiles, _ = _normalise(tiles, r, ch, rows, D, eps, NORM, BD, COUNT)
    scale = _parameter(weight, ch, D, 1.0, NORM is not None, BD, COUNT)
    shift = _parameter(bias, ch, D, 0.0, HAS_BIAS, BD, COUNT)
    out = ()
    for i in tl.static_range(COUNT):
        v = tiles[i] * scale[i] + shift[i]
        out = out + (v if NORM == "gated_rms" else v * gates[i],)
    _store(y, out, r, ch, rows, D, D, BD, COUNT)


@triton.jit(do_not_specialize=["rows"])
def _gate_backward(
    dy, x, z, weight, bias, dx, dz, dw, db, rows, D, y_r, x_r, z_r, dz_r, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    TR: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    ch = tl.arange(0, BD)
    scale = _parameter(weight, ch, D, 1.0, NORM is not None, BD, COUNT)
    shift = _parameter(bias, ch, D, 0.0, HAS_BIAS, BD, COUNT)
    grad_scale, grad_shift = (), ()
    for _ in tl.static_range(COUNT):
        grad_scale = grad_scale + (tl.zeros([TR, BD], tl.float32),)
        grad_shift = grad_shift + (tl.zeros([TR, BD], tl.float32),)
    next_r = tl.program_id(0).to(tl.int64) * TR + tl.arange(0, TR)
    next_g, next_x = _rows(dy, next_r, ch, rows, D, y_r, BD, COUNT), _rows(x, next_r, ch, rows, D, x_r, BD, COUNT)
    next_z = _rows(z, next_r, ch, rows, D, z_r, BD, COUNT) if GATE else next_x
    for _ in range(0, tl.cdiv(rows, TR * tl.num_programs(0))):
        r, of_y, of_x, of_z = next_r, next_g, next_x, next_z
        next_r = r + TR * tl.num_programs(0)  # its loads before this one's stores
        next_g, next_x = _rows(dy, next_r, ch, rows, D, y_r, BD, COUNT), _rows(x, next_r, ch, rows, D, x_r, BD, COUNT)
        next_z = _rows(z, next_r, ch, rows, D, z_r, BD, COUNT) if GATE else next_x
        gates, slopes = _gates(of_z, ACTIVATION, GATE, COUNT)
        tiles = ()
        for i in tl.static_range(COUNT):
            v = of_x[i].to(tl.float32)
            tiles = tiles + (v * gates[i] if NORM == "gated_rms" else v,)
        tiles, factor = _normalise(tiles, r, ch, rows, D, eps, NORM, BD, COUNT)
        grads, dgates, more_scale, more_shift = (), (), (), ()
        for i in tl.static_range(COUNT):
            g = of_y[i].to(tl.float32)
            if NORM != "gated_rms":
                dgates = dgates + (g * (tiles[i] * scale[i] + shift[i]) * slopes[i],)
                g *= gates[i]
            if NORM is not None:
                more_scale, more_shift = more_scale + (grad_scale[i] + g * tiles[i],), more_shift + (grad_shift[i] + g,)
                g *= scale[i]
            grads = grads + (g,)
        if NORM is not None:
            grad_scale, grad_shift = more_scale, more_shift
            mean = tl.zeros([1, 1], tl.float32)
            if NORM == "layer":
                ones = ()
                for _ in tl.static_range(COUNT):
                    ones = ones + (tl.full([1, 1], 1.0, tl.float32),)
                mean = _mean(grads, ones, D, COUNT)
            along = _mean(grads, tiles, D, COUNT)
            through = ()
            for i in tl.static_range(COUNT):
                through = through + (factor * (grads[i] - mean - tiles[i] * along),)
            grads = through
        if NORM == "gated_rms":
            before = ()
            for i in tl.static_range(COUNT):
                dgates = dgates + (grads[i] * of_x[i].to(tl.float32) * slopes[i],)
                before = before + (grads[i] * gates[i],)
            grads = before
        if GATE:
            _store(dz, dgates, r, ch, rows, D, dz_r, BD, COUNT)
        _store(dx, grads, r, ch, rows, D, D, BD, COUNT)
    at = tl.program_id(0).to(tl.int64) * D
    for i in tl.static_range(COUNT):
        c = ch + i * BD
        if NORM is not None:
            tl.store(dw + at + c, tl.sum(grad_scale[i], 0), mask=c < D)
        if HAS_BIAS:
            tl.store(db + at + c, tl.sum(grad_shift[i], 0), mask=c < D)


def _flat(v: Tensor | None) -> Tensor | None:
    """(rows, D), channels neighbours in memory."""
    if v is None:
        return None
    v = v.reshape(-1, v.shape[-1])
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


@functools.cache
def _tile(D: int) -> dict[str, int]:
    """Rows of one tile where few lanes of it would idle, else of several."""
    width = max(32, triton.next_power_of_2(D))
    if D > 512 and 8 * D < 7 * width:
        width = 512
    rows = max(1, ELEMENTS // triton.next_power_of_2(D))
    warps = max(1, min(16, rows * width // (256 if width >= D else 128)))
    return {"TR": rows, "BD": width, "COUNT": _cdiv(D, width), "num_warps": warps}


def norm_gate(
    x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None, eps: float,
    norm: str = "layer",
) -> Tensor:  # fmt: skip
    """norm(x) if ``weight`` is given else x, times activation(z) if z is given; x, z and the result (..., D).

    norm is "layer", "rms" (root mean square) or "gated_rms": rms(x activation(z)).
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, gate, D = _flat(x), _flat(z), x.shape[-1]
    weight, bias = _contiguous(weight), _contiguous(bias)
    tile = _tile(D)
    if y.numel():
        with torch.cuda.device_of(x):
            _gate_forward[(_cdiv(len(rows), tile["TR"]),)](
                rows, gate, weight, bias, y, len(rows), D, rows.stride(0), 0 if gate is None else gate.stride(0), eps,
                NORM=None if weight is None else norm, HAS_BIAS=bias is not None, GATE=z is not None,
                ACTIVATION=activation, **tile,
            )  # fmt: skip
    return y


def norm_gate_backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None,
    eps: float, norm: str = "layer", dz: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, z, weight and bias, the last two in float32; z's is written to ``dz``, like z, if given."""

    def new(v: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if v is None else torch.empty(shape, dtype=dtype, device=x.device)

    rows, gate, grad, D = _flat(x), _flat(z), _flat(dy), x.shape[-1]
    weight, bias = _contiguous(weight), _contiguous(bias)
    dx = new(x, *x.shape, dtype=x.dtype)
    if dz is None:
        dz = None if z is None else new(z, *z.shape, dtype=z.dtype)
    to = None if dz is None else dz.view(-1, D)
    if x.numel() == 0:
        return dx, dz, *(None if v is None else torch.zeros_like(v) for v in (weight, bias))
    tile = _tile(D)
    programs = min(PROGRAMS, _cdiv(len(rows), tile["TR"]))
    dw, db = (new(v, programs, D) for v in (weight, bias))
    with torch.cuda.device_of(x):
        _gate_backward[(programs,)](
            grad, rows, gate, weight, bias, dx, to, dw, db, len(rows), D,
            grad.stride(0), rows.stride(0), *(0 if v is None else v.stride(0) for v in (gate, to)), eps,
            NORM=None if weight is None else norm, HAS_BIAS=bias is not None, GATE=z is not None,
            ACTIVATION=activation, **tile,
        )  # fmt: skip
    return dx, dz, *(None if v is None else v.sum(0) for v in (dw, db))
