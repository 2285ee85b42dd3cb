"""What lies between Mamba-2's two projections, on a GPU as one operator; with CUDA's kernels no gradient is copied."""

import operator

import torch
from torch import Tensor

from mambavision.ops.choice import choose
from mambavision.ops.compile import register
from mambavision.ops.depthwise_conv import MOST_TAPS, Padding, depthwise_conv
from mambavision.ops.depthwise_conv import _kernel as _conv_kernel
from mambavision.ops.norm_gate import WIDEST, norm_gate
from mambavision.ops.norm_gate import _kernel as _gate_kernel
from mambavision.ops.ssd import FAST, _asked, _choose, ssd
from mambavision.ops.ssd import _kernel as _ssd_kernel


def conv_ssd(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    ngroups: int = 1,
    padding: Padding = "past",
    bidirectional: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Convolve, scan, gate and normalise what Mamba-2's first projection gives, for its second projection.

    ::

        [z, x, B, C, dt] = projected        [x, B, C] = silu(conv([x, B, C]))
        y = rms_norm(ssd(x, softplus(dt + dt_bias), A, B, C, D) silu(z))

    On a GPU, where all three run kernels, it is one operator, whose backward writes the gradients of the parts of
    ``projected`` side by side. All else is :func:`depthwise_conv`, :func:`ssd` and :func:`norm_gate` in turn.

    Args:
        projected: (batch, L, 2 H P + 2 G N + H or more); columns beyond are not looked at.
        conv_weight, conv_bias: (H P + 2 G N, 1, k) and (H P + 2 G N,), see :func:`depthwise_conv`.
        A, D, dt_bias: (H,).
        norm_weight: (H P,).
        ngroups: G.
        padding: of the convolution.
        bidirectional: see :func:`ssd`.
        eps: added to the mean square.

    Returns:
        (batch, L, H P) in projected's dtype.

    Raises:
        ValueError: shapes that do not fit.

    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7.
    """
    H, inner, wide = A.shape[0], norm_weight.shape[0], conv_weight.shape[0]
    states = (wide - inner) // 2
    if projected.dim() != 3 or projected.shape[-1] < inner + wide + H:
        raise ValueError(f"projected must be (batch, L, {inner + wide + H} or more), got {tuple(projected.shape)}")
    if inner % H or states < ngroups or (wide - inner) % (2 * ngroups):
        raise ValueError(f"{inner} channels in {H} heads and {wide - inner} of B and C in {ngroups} groups do not fit")
    parameters = (conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    options = (ngroups, padding, bidirectional, eps)
    if (backend := _kernels(projected, parameters, inner // H, states // ngroups)) is not None:
        return torch.ops.mambavision.conv_ssd(projected, *parameters, *options, backend)[0]
    z, xBC, dt, _ = _parts(projected, inner, wide, H)
    xBC = depthwise_conv(xBC, conv_weight, conv_bias, padding=padding, activation="silu")
    x, B, C = _heads(xBC, inner, H, ngroups)
    y = ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, bidirectional=bidirectional)
    return norm_gate(y.flatten(-2), z, norm_weight, norm="gated_rms", eps=eps)


def _kernels(projected: Tensor, parameters: tuple[Tensor, ...], P: int, N: int) -> str | None:
    """The backend of ``ssd``, if all three operators run kernels."""
    taps, channels = (operator.index(parameters[i].shape[j]) for i, j in ((0, 2), (5, 0)))
    around = {
        choose("depthwise_conv", None, projected, taps, MOST_TAPS, "taps"),
        choose("norm_gate", None, projected, channels, WIDEST, "channels"),
    }
    if around != {"triton"}:
        return None
    learns = torch.is_grad_enabled() and any(v.requires_grad for v in (projected, *parameters))
    device, dtype = projected.device.type, projected.dtype
    backend = _choose(None, _asked(None), device, dtype, operator.index(P), operator.index(N), None, learns)
    return backend if backend in FAST else None


def _heads(xBC: Tensor, inner: int, H: int, G: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (batch, L, H, P), B and C (batch, L, G, N), views of their channels."""
    batch, length, wide = xBC.shape
    states = (wide - inner) // 2
    x, B, C = xBC.split((inner, states, states), -1)
    B, C = (v.view(batch, length, G, states // G) for v in (B, C))
    return x.view(batch, length, H, inner // H), B, C


def _parts(projected: Tensor, inner: int, wide: int, H: int) -> tuple[Tensor, ...]:
    """z, what is convolved, dt, and the columns beyond."""
    return projected.split((inner, wide, H, projected.shape[-1] - inner - wide - H), -1)


def _stencil(weight: Tensor, bias: Tensor, padding: str) -> tuple[Tensor, Tensor, list[int], bool, str]:
    """The kernels' arguments: a sequence is an image one pixel wide."""
    k = weight.shape[-1]
    pad = [k // 2 if padding == "same" else k - 1, 0]
    return weight.view(len(weight), k, 1), bias, pad, padding == "future", "silu"


def _conv_ssd(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    ngroups: int,
    padding: str,
    bidirectional: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, _), H, inner = projected.shape, len(A), len(norm_weight)
    z, xBC, dt, _ = _parts(projected, inner, len(conv_weight), H)
    xBC = _conv_kernel().conv(xBC.unsqueeze(2), *_stencil(conv_weight, conv_bias, padding)).squeeze(2)
    x, B, C = _heads(xBC, inner, H, ngroups)
    D = D.expand(batch, length, H)
    y, _ = _ssd_kernel(backend).ssd(x, dt, A, B, C, D, dt_bias, None, True, bidirectional, True, None, False)
    y = y.flatten(-2)
    return _gate_kernel().norm_gate(y, z, norm_weight, None, "silu", eps, "gated_rms"), xBC, y


def _conv_ssd_like(
    projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, ngroups, padding, bidirectional, eps, backend
):  # fmt: skip
    tokens, inner = projected.shape[:2], norm_weight.shape[0]
    y, xBC, kept = (projected.new_empty(*tokens, n) for n in (inner, conv_weight.shape[0], inner))
    return y, xBC, kept


def _conv_ssd_backward(
    grad: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    xBC: Tensor,
    y: Tensor,
    ngroups: int,
    padding: str,
    bidirectional: bool,
    eps: float,
    backend: str,
) -> list[Tensor]:
    (batch, length, _), H, inner, wide = projected.shape, len(A), len(norm_weight), len(conv_weight)
    dprojected, dxBC = torch.empty_like(projected, memory_format=torch.contiguous_format), torch.empty_like(xBC)
    (z, before, dt, _), (dz, dbefore, to_dt, beyond) = (_parts(v, inner, wide, H) for v in (projected, dprojected))
    if beyond.shape[-1]:
        beyond.zero_()
    dy, _, dnorm, _ = _gate_kernel().norm_gate_backward(grad, y, z, norm_weight, None, "silu", eps, "gated_rms", dz=dz)
    (x, B, C), (to_x, *to_BC) = (_heads(v, inner, H, ngroups) for v in (xBC, dxBC))
    out = (to_x, to_dt, *to_BC)
    dx, ddt, dA, dB, dC, dD, dbias, _ = _ssd_kernel(backend, True).ssd_backward(
        dy.view(x.shape), None, x, dt, A, B, C, D.expand(batch, length, H), dt_bias, None, True, bidirectional, True,
        None, **({"out": out} if backend == "cuda" else {}),
    )  # fmt: skip
    for to, v in zip(out, (dx, ddt, dB, dC), strict=True):
        if v is not to:
            to.copy_(v)
    _, dweight, db = _conv_kernel().conv_backward(
        dxBC.unsqueeze(2), before.unsqueeze(2), *_stencil(conv_weight, conv_bias, padding), dx=dbefore.unsqueeze(2)
    )
    grads = (dprojected, dweight.view(conv_weight.shape), db, dA, dD.sum((0, 1)), dbias, dnorm)
    inputs = (projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    return [g.to(v.dtype) for g, v in zip(grads, inputs, strict=True)]


def _conv_ssd_backward_like(
    grad, projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight, xBC, y,
    ngroups, padding, bidirectional, eps, backend,
):  # fmt: skip
    inputs = (projected, conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    return [v.new_empty(v.shape) for v in inputs]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    return *torch.ops.mambavision.conv_ssd_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5


register(_conv_ssd, "conv_ssd", fake=_conv_ssd_like, backward=_autograd, setup_context=_setup_context)
register(_conv_ssd_backward, "conv_ssd_backward", fake=_conv_ssd_backward_like)
