"""The scan in CUDA C++ (scan.cu), compiled at first use by NVRTC."""

import ctypes
import functools
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from mambavision.kernels import nvrtc

_SOURCE = pathlib.Path(__file__).with_name("scan.cu")
_THREADS = 128
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(n, ctypes.c_int64) for n in ("batch", "token", "scan", "inner")]


class _Call(ctypes.Structure):
    _fields_ = (
        [(n, ctypes.c_int64) for n in ("batch", "length", "scans", "channels")]
        + [(n, _Strided) for n in ("x", "delta", "B", "C", "y")]
        + [(n, ctypes.c_void_p) for n in ("A", "D", "bias", "initial", "order", "last", "starts", "dx", "ddelta")]
        + [(n, ctypes.c_void_p) for n in ("dA", "dB", "dC", "dD", "dbias", "dinitial")]
        + [(n, ctypes.c_int) for n in ("softplus", "write_starts")]
    )


class _Plan:
    """How N states are laid over lanes: ``split`` lanes a channel hold ``states`` each."""

    def __init__(self, N: int) -> None:
        self.states = min(4, _power_of_two(N))
        self.split = _power_of_two(-(-N // self.states))
        self.tile = 16 if self.states * self.split <= 32 else 8
        self.channels = _THREADS // self.split
        self.defines = (f"N={N}", f"STATES={self.states}", f"SPLIT={self.split}", f"TILE={self.tile}")


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


_plan = functools.cache(_Plan)


def unavailable() -> str | None:
    """Why CUDA kernels cannot be compiled here, or None if they can."""
    return nvrtc.unavailable()


def _strided(v: Tensor) -> _Strided:
    """An axis of size 1 is broadcast."""
    return _Strided(v.data_ptr(), *(s if n > 1 else 0 for s, n in zip(v.stride(), v.shape, strict=True)))


def _launch(name: str, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, y: Tensor, dx_type: torch.dtype, N: int, **rest):
    """Fill the kernel's argument from tensors and launch one block a (channel block, scan, batch)."""
    batch, length, K, channels = delta.shape
    plan = _plan(N)
    types = {"X": x.dtype, "DELTA": delta.dtype, "B": B.dtype, "C": C.dtype, "Y": y.dtype, "DX": dx_type}
    by_token = {n: v.stride(1) == 1 and v.stride(3) != 1 for n, v in dict(X=x, DELTA=delta, B=B, C=C, Y=y).items()}
    defines = plan.defines + tuple(f"{n}_TYPE={_TYPES[t]}" for n, t in types.items())
    defines += tuple(f"{n}_BY_TOKEN={int(v)}" for n, v in by_token.items())
    function = nvrtc.kernel(_SOURCE, name, defines, x.device.index)
    call = _Call(batch, length, K, channels, *(_strided(v) for v in (x, delta, B, C, y)))
    for field, value in rest.items():
        setattr(call, field, value.data_ptr() if isinstance(value, Tensor) else value)
    with torch.cuda.device(x.device):
        nvrtc.launch(function, (-(-channels // plan.channels), K, batch), _THREADS, call)


def _parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.detach().float().contiguous() for v in tensors]


def _order(order: Tensor | None) -> Tensor | None:
    return None if order is None else order.to(torch.int32).contiguous()


def _new(like: Tensor) -> Callable[..., Tensor]:
    return functools.partial(torch.empty, device=like.device, dtype=torch.float32)


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
    """Same contract as :func:`reference.scan`, for float32, bfloat16 and float16 on an NVIDIA GPU, N up to 128."""
    batch, length, K, channels = delta.shape
    A, D, delta_bias, initial_state = _parameters(A, D, delta_bias, initial_state)
    new = _new(x)
    y = new(batch, length, K, channels) if merge and K > 1 else x.new_empty(delta.shape)
    last = new(batch, *A.shape)
    _launch(
        "scan_forward", x, delta, B, C, y, torch.float32, A.shape[-1],
        A=A, D=D, bias=delta_bias, initial=initial_state, order=_order(order), last=last, softplus=delta_softplus,
    )  # fmt: skip
    return y.sum(2).to(x.dtype) if merge else y, last


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
    """Gradients of x, delta, A, B, C, D, delta_bias and initial_state; states are recomputed, none are kept."""
    batch, length, K, channels = delta.shape
    A, D, delta_bias, initial_state, grad_state = _parameters(A, D, delta_bias, initial_state, grad_state)
    order, new = _order(order), _new(x)
    N = A.shape[-1]
    plan = _plan(N)
    grad_y = (grad_y[:, :, None] if merge else grad_y).expand(batch, length, -1, channels)
    starts = new(batch, K, -(-length // plan.tile), channels, N)
    common = dict(A=A, bias=delta_bias, order=order, starts=starts, softplus=delta_softplus)
    _launch(
        "scan_forward", x, delta, B, C, grad_y, torch.float32, N, initial=initial_state, write_starts=1, **common
    )  # fmt: skip
    shared_x = x.shape[2] == 1 and K > 1  # its gradients add up over the scans
    dx = torch.empty(delta.shape, device=x.device, dtype=torch.float32 if shared_x else x.dtype)
    ddelta = torch.empty(delta.shape, device=x.device, dtype=delta.dtype)
    dB, dC = (new(-(-channels // plan.channels), batch, length, K, N) for _ in range(2))
    dA, dstate = (new(batch, K, channels, N) for _ in range(2))
    dD, dbias = (new(batch, K, channels) for _ in range(2))
    _launch(
        "scan_backward", x, delta, B, C, grad_y, dx.dtype, N, D=D, last=grad_state,
        dx=dx, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias, dinitial=dstate, **common,
    )  # fmt: skip
    dx = dx.sum(2, keepdim=True) if shared_x else dx
    return dx, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0), dbias.sum(0), dstate
