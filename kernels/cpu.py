"""The scan in plain C (scan.c), called through ctypes on raw pointers: no torch headers, so no ABI to match."""

import ctypes
import functools
import pathlib

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Array(ctypes.Structure):
    """A strided view of up to four axes (batch, token, scan, channel or state); strides count elements."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4), ("dtype", ctypes.c_int)]


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    here = pathlib.Path(__file__).parent
    found = [p for p in sorted(here.glob("_scan*")) if p.suffix in (".so", ".pyd", ".dll", ".dylib")]
    if not found:
        return "the C library was not built (it needs a C compiler when mambavision-zoo is installed)"
    try:
        library = ctypes.CDLL(str(found[0]))
        for name in ("scan_forward", "scan_backward"):
            getattr(library, name).restype = None
        return library
    except (OSError, AttributeError) as error:
        return f"{found[0].name} cannot be loaded: {error}"


def unavailable() -> str | None:
    """Why the C library cannot be used here, or None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def _array(v: Tensor | None) -> _Array:
    if v is None:
        return _Array(None, (ctypes.c_int64 * 4)(), 0)
    strides = [s if n > 1 else 0 for s, n in zip(v.stride(), v.shape, strict=True)]
    return _Array(v.data_ptr(), (ctypes.c_int64 * 4)(*strides), _DTYPES[v.dtype])


def _fp32(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.detach().to(torch.float32).contiguous()


def _pointer(v: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if v is None else v.data_ptr())


def _sizes(x: Tensor, delta: Tensor, A: Tensor) -> tuple[ctypes.c_int64 * 6, int]:
    batch, length, K, channels = delta.shape
    sizes = (batch, length, K, channels, A.shape[-1], x.shape[2])
    return (ctypes.c_int64 * 6)(*sizes), torch.get_num_threads()


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
    """Same contract as :func:`reference.scan`, for float32, bfloat16 and float16 on the CPU."""
    batch, length, K, channels = delta.shape
    A, D, delta_bias, initial_state = _fp32(A), _fp32(D), _fp32(delta_bias), _fp32(initial_state)
    B, C = B.contiguous(), C.contiguous()  # small, and read once a channel block
    y = x.new_empty(batch, length, channels, dtype=torch.float32) if merge else x.new_empty(delta.shape)
    state = A.new_empty(batch, *A.shape)
    sizes, threads = _sizes(x, delta, A)
    _library().scan_forward(
        sizes,
        ctypes.c_int(threads),
        ctypes.c_int(delta_softplus),
        ctypes.c_int(merge),
        *(ctypes.byref(_array(v)) for v in (x, delta, B, C, y[:, :, None] if merge else y)),
        *(_pointer(v) for v in (A, D, delta_bias, initial_state, order, state)),
    )
    return y.to(x.dtype) if merge else y, state


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
    """Gradients of x, delta, A, B, C, D, delta_bias and initial_state, in float32 or the input's dtype.

    States are recomputed from a zero or given start, chunk by chunk; nothing but the inputs is kept from the forward.
    """
    batch, length, K, channels = delta.shape
    N = A.shape[-1]
    A, D, delta_bias = _fp32(A), _fp32(D), _fp32(delta_bias)
    B, C = B.contiguous(), C.contiguous()
    initial_state, grad_state = _fp32(initial_state), _fp32(grad_state)
    sizes, threads = _sizes(x, delta, A)
    blocks = -(-channels // 16)
    splits = max(1, min(blocks, -(-threads // (batch * K))))  # channel blocks per scan that run side by side
    dx = A.new_empty(delta.shape)
    ddelta = torch.empty_like(delta, memory_format=torch.contiguous_format)
    dB, dC = (A.new_zeros(splits, batch, length, K, N) for _ in range(2))
    dA, dD, dbias, dstate = (A.new_empty(batch, *shape) for shape in (A.shape, A.shape[:2], A.shape[:2], A.shape))
    scratch = A.new_empty(threads, -(-length // 16), N, 16)
    _library().scan_backward(
        sizes,
        ctypes.c_int(threads),
        ctypes.c_int(delta_softplus),
        ctypes.c_int(splits),
        *(ctypes.byref(_array(v)) for v in (x, delta, B, C, grad_y[:, :, None] if merge else grad_y, dx, ddelta)),
        *(_pointer(v) for v in (A, D, delta_bias, initial_state, order, grad_state)),
        *(_pointer(v) for v in (dA, dB, dC, dD, dbias, dstate, scratch)),
    )
    dx = dx.sum(2, keepdim=True) if x.shape[2] == 1 and K > 1 else dx
    return dx, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0), dstate
