"""Normalisation and gate of a mixer's output, and their registration with torch."""

import functools
import importlib
import operator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops import dispatch
from mambavision.ops.choice import Around, choose
from mambavision.ops.compile import register
from mambavision.ops.depthwise_conv import Activation, in_place

Norm = Literal["layer", "rms", "gated_rms"]
WIDEST = 8192  # channels of a row, which a program holds in registers


def norm_gate(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = "silu",
    norm: Norm = "layer",
    eps: float = 1e-5,
    backend: Around | None = None,
) -> Tensor:
    """Normalise a mixer's output over its channels where ``weight`` is given, and gate it: norm(x) activation(z).

    Args:
        x, z: (..., D); without z there is no gate.
        weight, bias: (D,), of the normalisation; they may be float32 where x is not.
        activation: of z.
        norm: "layer" (mean 0, variance 1), "rms" (mean square 1), or "gated_rms": rms(x activation(z)).
        eps: added to the variance or mean square.
        backend: "torch", or "triton" (up to 8192 channels, on a GPU; first derivatives only); by default as in
            :func:`depthwise_conv`.

    Returns:
        The same shape in x's dtype; computed in float32 and rounded once with "triton".

    Raises:
        ValueError: shapes or options that do not fit.
        RuntimeError: the backend asked for cannot run the call.
    """
    channels = x.shape[-1]
    for name, v, shape in (("z", z, x.shape), ("weight", weight, (channels,)), ("bias", bias, (channels,))):
        if v is not None and tuple(v.shape) != tuple(shape):
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(v.shape)}")
    if bias is not None and weight is None:
        raise ValueError("bias belongs to the normalisation: give weight too")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    arguments = (x, z, weight, bias, activation, eps, norm)
    if choose("norm_gate", backend, x, operator.index(channels), WIDEST, "channels") == "torch":
        return _torch(*arguments)
    if dispatch._nothing_listens((x, z, weight, bias)):
        return _kernel().norm_gate(*arguments)
    return torch.ops.mambavision.norm_gate(*arguments)


def _torch(
    x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None, eps: float,
    norm: str,
) -> Tensor:  # fmt: skip
    def normalised(v: Tensor) -> Tensor:
        if weight is None:
            return v
        dtype = torch.promote_types(v.dtype, weight.dtype)
        shift = None if bias is None else bias.to(dtype)
        if norm == "layer":
            return F.layer_norm(v.to(dtype), v.shape[-1:], weight.to(dtype), shift, eps).to(v.dtype)
        y = F.rms_norm(v.to(dtype), v.shape[-1:], weight.to(dtype), eps)
        return (y if shift is None else y + shift).to(v.dtype)

    if z is None:
        return normalised(x)
    gate = z if activation is None else F.silu(z) if activation == "silu" else F.gelu(z)
    # nobody else sees the gate: it may become the product
    ours = activation is not None and gate.dtype == x.dtype and in_place()
    if norm == "gated_rms":
        return normalised(gate.mul_(x) if ours else (x * gate).to(x.dtype))
    return gate.mul_(normalised(x)) if ours else (normalised(x) * gate).to(x.dtype)


@functools.cache
def _kernel():
    return importlib.import_module("mambavision.kernels.norm_gate_triton")


def _norm_gate(
    x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None, eps: float,
    norm: str,
) -> Tensor:  # fmt: skip
    return _kernel().norm_gate(x, z, weight, bias, activation, eps, norm)


def _norm_gate_like(x, z, weight, bias, activation, eps, norm):
    return x.new_empty(x.shape)


def _norm_gate_backward(
    grad: Tensor, x: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None,
    eps: float, norm: str,
) -> list[Tensor]:  # fmt: skip
    grads = _kernel().norm_gate_backward(grad, x, z, weight, bias, activation, eps, norm)
    return [g.to(v.dtype) for g, v in zip(grads, (x, z, weight, bias), strict=True) if v is not None]


def _norm_gate_backward_like(grad, x, z, weight, bias, activation, eps, norm):
    return [v.new_empty(v.shape) for v in (x, z, weight, bias) if v is not None]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _autograd(ctx, grad):
    tensors = ctx.saved_tensors
    grads = iter(torch.ops.mambavision.norm_gate_backward(grad, *tensors, *ctx.options))
    return *(None if v is None else next(grads) for v in tensors), None, None, None


register(_norm_gate, "norm_gate", fake=_norm_gate_like, backward=_autograd, setup_context=_setup_context)
register(_norm_gate_backward, "norm_gate_backward", fake=_norm_gate_backward_like)
