"""The scan in plain C (scan.c), called through ctypes on raw pointers: no torch headers, so no ABI to match."""

import ctypes
import functools
import pathlib
import struct

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_ARRAY = (0,) * 6
# scan.c's Call: 10 numbers, 7 arrays (address, four strides, dtype) and 16 addresses, 8 bytes each
_pack = struct.Struct("68q").pack


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
            getattr(library, name).argtypes = [ctypes.c_char_p]
        return library
    except (OSError, AttributeError) as error:
        return f"{found[0].name} cannot be loaded: {error}"


def unavailable() -> str | None:
    """Why the C library cannot be used here, or None if it can."""
    library = _library()
    return library if isinstance(library, str) else None


def _array(v: Tensor) -> tuple[int, ...]:
    """Address, strides over (batch, token, scan, channel or state) in elements, dtype."""
    return v.data_ptr(), *v.stride(), _DTYPES[v.dtype]


def _merged(v: Tensor) -> tuple[int, ...]:
    """The same for (batch, token, channel), which all scans share."""
    batch, token, channel = v.stride()
    return v.data_ptr(), batch, token, 0, channel, _DTYPES[v.dtype]


def _fp32(v: Tensor | None) -> Tensor | None:
    if v is None or (v.dtype == torch.float32 and v.is_contiguous()):
        return v
    return v.detach().to(torch.float32).contiguous()


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _int32(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.int32).contiguous()


def _packed(v: Tensor) -> Tensor | None:
    """Room for B or C as float32 with consecutive states, unless it is that already."""
    if v.dtype == torch.float32 and (v.stride(3) == 1 or v.shape[3] == 1):
        return None
    return v.new_empty(v.shape, dtype=torch.float32)


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
    N = A.shape[2]
    A, D, delta_bias, initial_state = _fp32(A), _fp32(D), _fp32(delta_bias), _fp32(initial_state)
    packed_B, packed_C, order = _packed(B), _packed(C), _int32(order)
    if merge:  # scans add up in y, so in float32 where there are several
        y = x.new_empty(batch, length, channels, dtype=torch.float32 if K > 1 else x.dtype)
    else:
        y = x.new_empty(delta.shape)
    state = A.new_empty(batch, K, channels, N)
    threads = torch.get_num_threads()
    _library().scan_forward(
        _pack(
            *(batch, length, K, channels, N, x.shape[2], threads, delta_softplus, merge, 1),
            *(*_array(x), *_array(delta), *_array(B), *_array(C), *(_merged(y) if merge else _array(y))),
            *(*_NO_ARRAY, *_NO_ARRAY),
            *map(_address, (A, D, delta_bias, initial_state, order, packed_B, packed_C, state)),
            *(0,) * 8,
        )
    )
    return y if y.dtype == x.dtype else y.to(x.dtype), state


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
    N = A.shape[2]
    A, D, delta_bias = _fp32(A), _fp32(D), _fp32(delta_bias)
    initial_state, grad_state = _fp32(initial_state), _fp32(grad_state)
    packed_B, packed_C, order = _packed(B), _packed(C), _int32(order)
    threads = torch.get_num_threads()
    blocks = -(-channels // 16)
    splits = max(1, min(blocks, -(-threads // max(1, batch * K))))  # channel blocks per scan that run side by side
    dx = A.new_empty(delta.shape, dtype=x.dtype if x.shape[2] == K else torch.float32)
    ddelta = torch.empty_like(delta, memory_format=torch.contiguous_format)
    dB, dC = (A.new_zeros(splits, batch, length, K, N) for _ in range(2))
    dA, dD, dbias, dstate = (A.new_empty(batch, *shape) for shape in (A.shape, A.shape[:2], A.shape[:2], A.shape))
    starts = A.new_empty(threads, -(-length // 16), N, 16)
    _library().scan_backward(
        _pack(
            *(batch, length, K, channels, N, x.shape[2], threads, delta_softplus, merge, splits),
            *(*_array(x), *_array(delta), *_array(B), *_array(C), *(_merged(grad_y) if merge else _array(grad_y))),
            *(*_array(dx), *_array(ddelta)),
            *map(_address, (A, D, delta_bias, initial_state, order, packed_B, packed_C, None, grad_state)),
            *map(_address, (dA, dB, dC, dD, dbias, dstate, starts)),
        )
    )
    dx = dx.sum(2, keepdim=True) if x.shape[2] == 1 and K > 1 else dx
    dB, dC = (v[0] if splits == 1 else v.sum(0) for v in (dB, dC))
    dA, dD, dbias = (v[0] if batch == 1 else v.sum(0) for v in (dA, dD, dbias))
    return dx, ddelta, dA, dB, dC, dD, dbias, dstate
