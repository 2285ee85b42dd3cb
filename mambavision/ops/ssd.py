"""State-space duality (Mamba-2), causal, bidirectional and non-causal, and its registration with torch."""

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambavision.kernels import ssd_chunked, ssd_cuda, ssd_cuda_backward, ssd_reference
from mambavision.ops import dispatch
from mambavision.ops.compile import constant_result, register

SSDBackend = Literal["reference", "chunked", "triton", "cuda"]
Diagonal = Literal["scanned", "free"]
BACKENDS: tuple[SSDBackend, ...] = get_args(SSDBackend)
FAST: tuple[SSDBackend, ...] = ("cuda", "triton")  # on a GPU, the faster first
KERNEL_WIDTH = 64  # headdim and d_state up to which the Triton kernels gave right results on a GPU
KERNEL_CHUNKS = {torch.bfloat16: 256, torch.float16: 128}  # and the chunk sizes with which they did


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    chunk_size: int | None = None,
    bidirectional: bool = False,
    diagonal: Diagonal = "scanned",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: SSDBackend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix tokens with Mamba-2's scan, one decay per head and token; means what mamba_chunk_scan_combined means.

    Per head, with dt = softplus(dt + dt_bias) where asked and a_t = dt_t A::

        h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T        y_t = (h_t C_t + D x_t) silu(z_t)

    ``bidirectional`` adds the same scan from the last token to the first, from the same products; as one matrix, with
    w_ij = dt_j C_i . B_j::

        y_i = sum_{j<i} exp(a_{j+1} + ... + a_i) w_ij x_j + sum_{j>i} exp(a_i + ... + a_{j-1}) w_ij x_j + d_i x_i

    Its diagonal is d_i = 2 w_ii + D for ``diagonal="scanned"`` (the sum of two scans, each with its own token) and
    d_i = D for ``diagonal="free"`` (the quasi-separable mixer: D is learned or computed from the token).

    Args:
        x, z: (batch, L, H, P), float32, bfloat16, float16 or float64. On a GPU, ``cuda`` takes bfloat16 with N up to
            128 (for gradients P and N up to 64), ``triton`` bfloat16 and float16 with P and N up to 64; all else runs
            on ``chunked``.
        dt: (batch, L, H).
        A: (H,), negative reals, used in float32.
        B, C: (batch, L, G, N); group g serves heads [g H/G, (g+1) H/G).
        D: (H,), or (batch, L, H) for a diagonal of each token.
        dt_bias: (H,).
        chunk_size: tokens between which states are carried; ``cuda`` takes 32, 64, 128 and 256, ``triton`` its own
            only, 256 in bfloat16 and 128 in float16. Changes speed and rounding only.
        initial_state: (batch, H, P, N), or (batch, 2, H, P, N), forward then backward, if ``bidirectional``.

    Returns:
        y like x; with ``return_last_state`` also the states after the last token of each direction, shaped as
        initial_state, in float32. All inputs and both outputs are differentiable.

    Raises:
        ValueError: shapes or options that do not fit.
        RuntimeError: the backend asked for cannot run the call.

    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, sections 5 and 6; the quasi-separable form: Hwang et
    al., "Hydra", arXiv 2407.09941, section 3 (there row i takes C_{i-1} and the decay up to i-1).
    """
    given = (x, dt, A, B, C, D, dt_bias, initial_state, z)
    plain, learns = dispatch._untraced(given), torch.is_grad_enabled() and dispatch._learns(given[:8])
    layouts = [None if v is None else (v.shape, v.dtype, v.device) for v in given]
    serve = _planned if plain else _served
    chosen = serve(backend, _asked(backend), bidirectional, diagonal, chunk_size, learns, *layouts)

    D = D if D is None else D.expand(x.shape[:3])
    if initial_state is not None and not bidirectional:
        initial_state = initial_state[:, None]
    arguments = (x, dt, A, B, C, D, dt_bias, initial_state)
    options = (dt_softplus, bidirectional, diagonal == "scanned", chunk_size, return_last_state)
    if chosen == "reference":
        y, last = ssd_reference.ssd(*arguments, *options)
    elif not plain and isinstance(x.shape[1], torch.SymInt) and torch.compiler.is_exporting():
        y, last = torch.ops.mambavision.ssd(*arguments, *options, dispatch.AUTOMATIC)  # its chunks cannot be counted
    elif chosen == "chunked":
        y, last = ssd_chunked.ssd(*arguments, *options)
    elif not plain:
        y, last = torch.ops.mambavision.ssd(*arguments, *options, chosen)
    elif learns:
        y, last = _SSD.apply(*arguments, *options, chosen)
    else:
        y, last = _kernel(chosen).ssd(*arguments, *options)
    if z is not None:
        dtype = torch.promote_types(y.dtype, torch.float32)
        y = (y.to(dtype) * F.silu(z.to(dtype))).to(x.dtype)
    return (y, last if bidirectional else last[:, 0]) if return_last_state else y


def _served(
    backend: str | None,
    asked: str | None,
    bidirectional: bool,
    diagonal: str,
    chunk_size: int | None,
    learns: bool,
    *layouts: tuple | None,
) -> SSDBackend:
    """The backend of a call whose tensors fit together: ``layouts`` holds shape, dtype and device of each."""
    (shape, dtype, device), _, _, (of_B, *_), _, of_D, *_ = layouts
    if len(shape) != 4 or shape[1] == 0:
        raise ValueError(f"x must be (batch, L, H, P) with L at least 1, got {tuple(shape)}")
    batch, length, H, P = shape
    if len(of_B) != 4 or of_B[2] == 0 or H % of_B[2]:
        raise ValueError(f"B must be (batch, L, G, N) with G dividing {H} heads, got {tuple(of_B)}")
    if diagonal not in get_args(Diagonal):
        raise ValueError(f"diagonal must be one of {', '.join(get_args(Diagonal))}, got {diagonal!r}")
    if diagonal == "free" and not bidirectional:
        raise ValueError('diagonal="free" is a form of the bidirectional mixer: set bidirectional=True')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    G, N = of_B[2:]
    directions = (2,) if bidirectional else ()
    expected = {
        "x": (batch, length, H, P),
        "dt": (batch, length, H),
        "A": (H,),
        "B": (batch, length, G, N),
        "C": (batch, length, G, N),
        "D": (H,) if of_D is None or len(of_D[0]) == 1 else (batch, length, H),
        "dt_bias": (H,),
        "initial_state": (batch, *directions, H, P, N),
        "z": (batch, length, H, P),
    }
    allowed = (torch.float64,) if dtype == torch.float64 else dispatch.KERNEL_DTYPES
    for (name, want), layout in zip(expected.items(), layouts, strict=True):
        if layout is None:
            continue
        if tuple(layout[0]) != want:
            raise ValueError(f"{name} must be {want}, got {tuple(layout[0])}")
        if layout[2] != device:
            raise ValueError(f"{name} is on {layout[2]}, x on {device}: move one of them")
        if name in ("x", "dt", "B", "C") and layout[1] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(str(d)[6:] for d in allowed)}, got {str(layout[1])[6:]}")
    return _choose(backend, asked, device.type, dtype, operator.index(P), operator.index(N), chunk_size, learns)


_planned = functools.lru_cache(4096)(_served)


def noncausal_ssd(x: Tensor, weight: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """Mix tokens through one state that all of them share, whatever their order (non-causal SSD, VSSD).

    Per head: ``y_i = (sum_j weight_j x_j B_j^T) C_i + D x_i``; VSSD's weight is -dt A. Two matrix products, any device.

    Args:
        x: (batch, L, H, P).
        weight: (batch, L, H).
        B, C: (batch, L, G, N); group g serves heads [g H/G, (g+1) H/G).
        D: (H,), or (batch, L, H).

    Returns:
        y like x. The state is summed in float32 and rounded to x's dtype once.

    Raises:
        ValueError: shapes that do not fit.

    Source: Shi et al., "VSSD", arXiv 2407.18559, section 3.2.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (batch, L, H, P), got {tuple(x.shape)}")
    batch, length, H, P = x.shape
    if B.dim() != 4 or B.shape[2] == 0 or H % B.shape[2]:
        raise ValueError(f"B must be (batch, L, G, N) with G dividing {H} heads, got {tuple(B.shape)}")
    G, N = B.shape[2:]
    shapes = {"weight": (batch, length, H), "B": (batch, length, G, N), "C": (batch, length, G, N)}
    for name, v in (("weight", weight), ("B", B), ("C", C)):
        if tuple(v.shape) != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(v.shape)}")
    if D is not None and tuple(D.shape) not in ((H,), (batch, length, H)):
        raise ValueError(f"D must be {(H,)} or {(batch, length, H)}, got {tuple(D.shape)}")

    def groups(v: Tensor) -> Tensor:
        return v.reshape(batch, length, G, -1).transpose(1, 2)  # (batch, G, L, heads P or N)

    state = groups(B).mT @ groups((weight[..., None] * x).to(x.dtype))
    y = (groups(C) @ state).transpose(1, 2).reshape(x.shape)
    return y if D is None else (y + D[..., None] * x).to(x.dtype)


def _asked(backend: str | None) -> str | None:
    """What was asked for, by argument or else as ``dispatch.in_effect``."""
    return backend or dispatch.in_effect()


def _choose(
    backend: str | None,
    asked: str | None,
    device: str,
    dtype: torch.dtype,
    P: int,
    N: int,
    chunk: int | None,
    learns: bool,
) -> SSDBackend:
    """What was asked for, by argument (``backend``) or otherwise, else the first that can serve the call."""
    if not asked:
        return _automatic(device, dtype, P, N, chunk, learns)
    if asked not in BACKENDS:
        if backend or asked not in dispatch.BACKENDS:
            raise ValueError(f"unknown ssd backend {asked!r}, use one of {', '.join(BACKENDS)}")
        raise RuntimeError(f"ssd has no backend {asked!r}, only {', '.join(BACKENDS)}: pass backend= to this call")
    reason = _unavailable(asked, device, dtype, P, N, chunk, learns)
    if reason is not None:
        raise RuntimeError(f"ssd backend {asked!r} cannot run this call: {reason}")
    return asked


@constant_result
def _automatic(device: str, dtype: torch.dtype, P: int, N: int, chunk: int | None, learns: bool) -> SSDBackend:
    """The first of FAST that can serve on a GPU, else ``chunked``; a fallback's reason is logged once."""
    if device == "cpu" or dtype not in dispatch.KERNEL_DTYPES:
        return "chunked"
    for fast in FAST:
        reason = _unavailable(fast, device, dtype, P, N, chunk, learns)
        if reason is None:
            return fast
        dispatch._log_once(f"ssd backend {fast!r} is passed over: {reason}")
    return "chunked"


@constant_result
def _unavailable(
    backend: SSDBackend, device: str, dtype: torch.dtype, P: int, N: int, chunk: int | None, learns: bool
) -> str | None:
    """Why a backend cannot serve, or None; of ``triton`` on a GPU only what was seen right there is served."""
    if backend == "triton" and device not in ("cpu", "cuda"):
        return f"it needs CUDA tensors, not {device}"
    if backend == "triton" and device == "cuda" and dtype in dispatch.KERNEL_DTYPES:
        if max(P, N) > KERNEL_WIDTH:
            return f"it takes headdim and d_state up to {KERNEL_WIDTH}, got {P} and {N}"
        if dtype not in KERNEL_CHUNKS:
            return f"on a GPU it takes bfloat16 and float16, got {str(dtype)[6:]}"
        if chunk not in (None, KERNEL_CHUNKS[dtype]):
            return f"its chunk_size is {KERNEL_CHUNKS[dtype]} in {str(dtype)[6:]}, got {chunk}"
    reason = dispatch.unavailable(backend, device, dtype)
    if backend != "cuda" or reason is not None:
        return reason
    if device == "cuda" and (reason := ssd_cuda.unavailable()) is not None:
        return reason
    if dtype is not torch.bfloat16:  # scores, weights and states of float16 inputs overflow float16
        return f"it computes on bfloat16 tensor cores and takes bfloat16, got {str(dtype)[6:]}"
    width = ssd_cuda_backward.WIDTH
    if learns and max(P, N) > width:
        return f"its gradients take headdim and d_state up to {width}, got {P} and {N}"
    if N > ssd_cuda.MOST_STATES:
        return f"it takes d_state up to {ssd_cuda.MOST_STATES}, got {N}"
    if chunk not in (None, *ssd_cuda.CHUNK_SIZES):
        return f"its chunk sizes are {', '.join(map(str, ssd_cuda.CHUNK_SIZES))}, got {chunk}"
    return None


@functools.cache
def _kernel(backend: str, backward: bool = False):
    """Module of a backend's ``ssd``, or of its ``ssd_backward``."""
    return importlib.import_module(f"mambavision.kernels.ssd_{backend}{'_backward' * backward}")


def _ssd(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = (x, dt, A, B, C, D, dt_bias, initial_state)
    options = (dt_softplus, bidirectional, scanned_diagonal)
    if backend == dispatch.AUTOMATIC:
        backend = _choose(None, _asked(None), x.device.type, x.dtype, x.shape[-1], B.shape[-1], chunk_size, False)
    if backend == "cuda" and any(v is not None and v.requires_grad for v in tensors):
        ssd_cuda_backward.prepare(x, dt, B, D, initial_state, *options, return_last_state)
    y, last = _kernel(backend).ssd(*tensors, *options, chunk_size, return_last_state)
    if backend in ("reference", "chunked"):  # of these y may be a view, and states are there unasked
        y, last = y.contiguous(), last if return_last_state else last[:, :0].clone()
    return y, last


def _ssd_like(
    x, dt, A, B, C, D, dt_bias, initial_state,
    dt_softplus, bidirectional, scanned_diagonal, chunk_size, return_last_state, backend,
):  # fmt: skip
    batch, _, H, P = x.shape
    directions = 1 + bidirectional if return_last_state else 0
    dtype = torch.promote_types(x.dtype, torch.float32)
    last = x.new_empty(batch, directions, H, P, B.shape[-1], dtype=dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), last


def _ssd_backward(
    grad_y: Tensor | None,
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
    backend: str,
) -> list[Tensor]:
    dispatch.check_learns(backend)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grads = _kernel(backend, True).ssd_backward(
        grad_y, grad_state, *inputs, dt_softplus, bidirectional, scanned_diagonal, chunk_size
    )
    return [g.to(v.dtype) for g, v in zip(grads, inputs, strict=True) if v is not None]


def _ssd_backward_like(
    grad_y, grad_state, x, dt, A, B, C, D, dt_bias, initial_state,
    dt_softplus, bidirectional, scanned_diagonal, chunk_size, backend,
):  # fmt: skip
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    return [torch.empty_like(v, memory_format=torch.contiguous_format) for v in inputs if v is not None]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.options = (*inputs[8:12], inputs[13])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y: Tensor | None, grad_state: Tensor | None, backward: Callable) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if grad_state is not None and grad_state.shape[1] == 0:  # not asked for
        grad_state = None
    if grad_y is None and grad_state is None:
        return (None,) * 14
    grads = iter(backward(grad_y, grad_state, *tensors, *ctx.options))
    return *(None if v is None else next(grads) for v in tensors), *(None,) * 6


def _autograd(ctx, grad_y, grad_state):
    return _gradients(ctx, grad_y, grad_state, torch.ops.mambavision.ssd_backward)


class _SSD(torch.autograd.Function):
    """A plain call that learns: what `mambavision::ssd` does, without the dispatcher's time."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return _ssd(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        return _gradients(ctx, grad_y, grad_state, _ssd_backward)


register(_ssd, "ssd", fake=_ssd_like, backward=_autograd, setup_context=_setup_context)
register(_ssd_backward, "ssd_backward", fake=_ssd_backward_like)
