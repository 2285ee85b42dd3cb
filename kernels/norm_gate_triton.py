"""Normalisation and gate after the scan in Triton, in one pass over each row forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambavision.kernels.depthwise_triton import _activate, _contiguous, _slope

PROGRAMS = 1024  # of the backward; each walks over several tiles and writes partial sums
ELEMENTS = 1024  # of a tile


@triton.jit
def _rows(v, r, ch, stride, mask):
    return tl.load(v + r[:, None] * stride + ch[None, :], mask=mask, other=0.0)


@triton.jit
def _tiles(dy, x, z, r, ch, rows, D, y_r, x_r, z_r, GATE: tl.constexpr):
    mask = (r < rows)[:, None] & (ch < D)[None, :]
    tiles = (_rows(dy, r, ch, y_r, mask), _rows(x, r, ch, x_r, mask))
    if GATE:
        tiles = tiles + (_rows(z, r, ch, z_r, mask),)
    return tiles


@triton.jit
def _parameters(weight, bias, ch, D, NORM: tl.constexpr, HAS_BIAS: tl.constexpr):
    scale, shift = tl.full([1, 1], 1.0, tl.float32), tl.zeros([1, 1], tl.float32)
    if NORM is not None:
        scale = tl.load(weight + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        shift = tl.load(bias + ch, mask=ch < D, other=0.0).to(tl.float32)[None, :]
    return scale, shift


@triton.jit
def _normalise(v, mask, D, eps, NORM: tl.constexpr):
    """Rows with mean square 1, for "layer" also with mean 0, and what they were multiplied by."""
    factor = tl.full([1, 1], 1.0, tl.float32)
    if NORM == "layer":
        v = tl.where(mask, v - (tl.sum(v, 1) / D)[:, None], 0.0)
    if NORM is not None:
        factor = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
        v *= factor
    return v, factor


@triton.jit(do_not_specialize=["rows"])
def _gate_forward(
    x, z, weight, bias, y, rows, D, x_r, z_r, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    TR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * TR + tl.arange(0, TR)
    ch = tl.arange(0, BD)
    mask = (r < rows)[:, None] & (ch < D)[None, :]
    scale, shift = _parameters(weight, bias, ch, D, NORM, HAS_BIAS)
    v = _rows(x, r, ch, x_r, mask).to(tl.float32)
    gate = tl.full([1, 1], 1.0, tl.float32)
    if GATE:
        gate = _activate(_rows(z, r, ch, z_r, mask).to(tl.float32), ACTIVATION)
    if NORM == "gated_rms":
        v, _ = _normalise(v * gate, mask, D, eps, NORM)
        v = v * scale + shift
    else:
        v, _ = _normalise(v, mask, D, eps, NORM)
        v = (v * scale + shift) * gate
    tl.store(y + r[:, None] * D + ch[None, :], v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gate_backward(
    dy, x, z, weight, bias, dx, dz, dw, db, rows, D, y_r, x_r, z_r, dz_r, eps,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    TR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ch = tl.arange(0, BD)
    scale, shift = _parameters(weight, bias, ch, D, NORM, HAS_BIAS)
    grad_scale, grad_shift = tl.zeros([TR, BD], tl.float32), tl.zeros([TR, BD], tl.float32)
    next_r = tl.program_id(0).to(tl.int64) * TR + tl.arange(0, TR)
    next_tiles = _tiles(dy, x, z, next_r, ch, rows, D, y_r, x_r, z_r, GATE)
    for _ in range(0, tl.cdiv(rows, TR * tl.num_programs(0))):
        r, tiles = next_r, next_tiles
        next_r = r + TR * tl.num_programs(0)
        next_tiles = _tiles(dy, x, z, next_r, ch, rows, D, y_r, x_r, z_r, GATE)  # before this one's stores
        mask = (r < rows)[:, None] & (ch < D)[None, :]
        g, u = tiles[0].to(tl.float32), tiles[1].to(tl.float32)
        gate, slope = tl.full([1, 1], 1.0, tl.float32), tl.full([1, 1], 1.0, tl.float32)
        if GATE:
            gate = _activate(tiles[2].to(tl.float32), ACTIVATION)
            if ACTIVATION is not None:
                slope = _slope(tiles[2].to(tl.float32), ACTIVATION)
        if NORM == "gated_rms":
            v, factor = _normalise(u * gate, mask, D, eps, NORM)
        else:
            v, factor = _normalise(u, mask, D, eps, NORM)
            u = v * scale + shift
            dgate = g * u * slope
            g *= gate
        if NORM is not None:
            grad_scale += g * v
            grad_shift += g
            g *= scale
            if NORM == "layer":
                g -= (tl.sum(g, 1) / D)[:, None]
            g = factor * (g - v * (tl.sum(g * v, 1) / D)[:, None])
        if NORM == "gated_rms":
            dgate = g * u * slope
            g *= gate
        if GATE:
            tl.store(dz + r[:, None] * dz_r + ch[None, :], dgate.to(dz.dtype.element_ty), mask=mask)
        tl.store(dx + r[:, None] * D + ch[None, :], g.to(dx.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * D + ch
    if NORM is not None:
        tl.store(dw + at, tl.sum(grad_scale, 0), mask=ch < D)
    if HAS_BIAS:
        tl.store(db + at, tl.sum(grad_shift, 0), mask=ch < D)


def _flat(v: Tensor | None) -> Tensor | None:
    """(rows, D), channels neighbours in memory."""
    if v is None:
        return None
    v = v.reshape(-1, v.shape[-1])
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def _tile(D: int) -> dict[str, int]:
    width = max(32, triton.next_power_of_2(D))
    rows = max(1, ELEMENTS // width)
    return {"TR": rows, "BD": width, "num_warps": max(1, min(16, rows * width // 256))}


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
            _gate_forward[(triton.cdiv(len(rows), tile["TR"]),)](
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
    programs = min(PROGRAMS, triton.cdiv(len(rows), tile["TR"]))
    dw, db = (new(v, programs, D) for v in (weight, bias))
    with torch.cuda.device_of(x):
        _gate_backward[(programs,)](
            grad, rows, gate, weight, bias, dx, to, dw, db, len(rows), D,
            grad.stride(0), rows.stride(0), *(0 if v is None else v.stride(0) for v in (gate, to)), eps,
            NORM=None if weight is None else norm, HAS_BIAS=bias is not None, GATE=z is not None,
            ACTIVATION=activation, **tile,
        )  # fmt: skip
    return dx, dz, *(None if v is None else v.sum(0) for v in (dw, db))
