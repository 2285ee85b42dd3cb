"""Depth-wise convolution of channels-last tokens and pixels, and its registration with torch."""

import functools
import importlib
import operator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision.ops import dispatch
from mambavision.ops.choice import Around, autocasted, choose
from mambavision.ops.compile import register

Padding = Literal["same", "past", "future"]
Activation = Literal["silu", "gelu"]
MOST_TAPS = 25  # a thread of the Triton kernels holds the stencil in registers


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Padding = "same",
    activation: Activation | None = None,
    backend: Around | None = None,
) -> Tensor:
    """Convolve every channel of channels-last tokens or pixels by itself; the result has x's shape.

    ::

        y_t = activation(bias + sum over j of weight_j x_{t + j - p})

    with p = (k - 1) / 2 for "same" and p = k - 1 for "past" (this and earlier tokens); "future" is "past" on reversed
    tokens: weight_j meets x_{t + k - 1 - j}. Outside there are zeros. Parameters are those of ``nn.Conv1d`` and
    ``nn.Conv2d`` with as many groups as channels; they may be float32 where x is not.

    Args:
        x: (batch, L, D) or (batch, H, W, D), any strides; channels that are no neighbours in memory are copied.
        weight: (D, 1, k) or (D, 1, kh, kw).
        bias: (D,).
        activation: "silu", or "gelu" by the error function.
        backend: "torch" (``F.conv2d``, any device and dtype) or "triton" (up to 25 taps, on a GPU); by default the
            first that serves, "torch" also where ``use_backend`` or $MAMBAVISION_BACKEND ask for a scan in plain torch.
            Second derivatives, forward-mode derivatives and vmap are those of "torch" alone.

    Returns:
        The same shape in x's dtype; float32 under autocast in autocast's, as ``F.conv2d`` does.

    Raises:
        ValueError: shapes or options that do not fit; "same" with an even width.
        RuntimeError: the backend asked for cannot run the call.
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (batch, L, D) or (batch, H, W, D), got {tuple(x.shape)}")
    channels = x.shape[-1]
    if weight.dim() != x.dim() or weight.shape[0] != channels or weight.shape[1] != 1:
        sizes = "k" if x.dim() == 3 else "kh, kw"
        raise ValueError(f"weight must be ({channels}, 1, {sizes}), got {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be ({channels},), got {tuple(bias.shape)}")
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be one of {', '.join(get_args(Padding))}, got {padding!r}")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    widths = tuple(weight.shape[2:])
    if padding == "same" and any(k % 2 == 0 for k in widths):
        raise ValueError(f'padding="same" needs odd widths, got {widths}')
    x = autocasted(x)
    # a sequence is an image one pixel wide
    image = x if x.dim() == 4 else x[:, :, None]
    stencil = weight[:, 0] if x.dim() == 4 else weight[:, 0, :, None]
    pad = [k // 2 if padding == "same" else k - 1 for k in stencil.shape[1:]]
    arguments = (image, stencil, bias, pad, padding == "future", activation)
    taps = operator.index(stencil.shape[1] * stencil.shape[2])
    if choose("depthwise_conv", backend, x, taps, MOST_TAPS, "taps") == "torch":
        y = _torch(*arguments)
    elif dispatch._nothing_listens((x, weight, bias)):
        y = _kernel().conv(*arguments)
    else:
        y = torch.ops.mambavision.depthwise_conv(*arguments)
    return y if x.dim() == 4 else y[:, :, 0]


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, pad: list[int], flip: bool, activation: str | None
) -> Tensor:
    """The same by ``F.conv2d`` on a channels_last view."""
    (kh, kw), (ph, pw) = weight.shape[1:], pad
    if flip:
        weight, ph, pw = weight.flip(1, 2), kh - 1 - ph, kw - 1 - pw
    image = x.permute(0, 3, 1, 2)
    if (2 * ph + 1, 2 * pw + 1) != (kh, kw):
        image, ph, pw = F.pad(image, (pw, kw - 1 - pw, ph, kh - 1 - ph)), 0, 0
    weight, bias = weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv2d(image, weight, bias, padding=(ph, pw), groups=len(weight)).permute(0, 2, 3, 1)
    if activation == "silu":
        return F.silu(y, inplace=in_place())
    return y if activation is None else F.gelu(y)


def in_place() -> bool:
    """Whether an intermediate result may be written over, to save its memory: eagerly, in inference mode."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


@functools.cache
def _kernel():
    return importlib.import_module("mambavision.kernels.depthwise_triton")


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, pad: list[int], flip: bool, activation: str | None) -> Tensor:
    return _kernel().conv(x, weight, bias, pad, flip, activation)


def _conv_like(x, weight, bias, pad, flip, activation):
    return x.new_empty(x.shape)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pad: list[int], flip: bool, activation: str | None
) -> list[Tensor]:
    grads = _kernel().conv_backward(grad, x, weight, bias, pad, flip, activation)
    return [g.to(v.dtype) for g, v in zip(grads, (x, weight, bias), strict=True) if v is not None]


def _conv_backward_like(grad, x, weight, bias, pad, flip, activation):
    return [v.new_empty(v.shape) for v in (x, weight, bias) if v is not None]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _autograd(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, *dbias = torch.ops.mambavision.depthwise_conv_backward(grad, x, weight, bias, *ctx.options)
    return dx, dweight, *(dbias or (None,)), None, None, None


register(_conv, "depthwise_conv", fake=_conv_like, backward=_autograd, setup_context=_setup_context)
register(_conv_backward, "depthwise_conv_backward", fake=_conv_backward_like)
