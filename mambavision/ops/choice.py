"""What the operators around the scan have in common: the choice between plain torch and Triton, and autocast."""

from typing import Literal, get_args

import torch
from torch import Tensor

from mambavision.ops import dispatch
from mambavision.ops.compile import constant_result

Around = Literal["torch", "triton"]
BACKENDS: tuple[Around, ...] = get_args(Around)


def choose(operator: str, backend: str | None, x: Tensor, size: int, most: int, unit: str) -> Around:
    """Argument, then "torch" where a scan in plain torch is asked for, then the first that can serve.

    Triton serves up to ``most`` of what ``unit`` names. Raises RuntimeError with the reason where a backend was asked
    for and cannot serve the call.
    """
    device, dtype = x.device.type, x.dtype
    if backend is None:
        plain = dispatch.in_effect() in ("reference", "chunked")
        return "torch" if plain else _automatic(operator, device, dtype, size, most, unit)
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: unknown backend {backend!r}, use one of {', '.join(BACKENDS)}")
    reason = None if backend == "torch" else _unavailable(device, dtype, size, most, unit)
    if reason is not None:
        raise RuntimeError(f"{operator}: backend {backend!r} cannot run this call: {reason}")
    return backend


@constant_result
def _automatic(operator: str, device: str, dtype: torch.dtype, size: int, most: int, unit: str) -> Around:
    if device not in ("cuda", "xpu") or dtype not in dispatch.KERNEL_DTYPES:
        return "torch"
    reason = _unavailable(device, dtype, size, most, unit)
    if reason is None:
        return "triton"
    dispatch._log_once(f"{operator}: backend 'triton' is passed over for 'torch': {reason}")
    return "torch"


@constant_result
def _unavailable(device: str, dtype: torch.dtype, size: int, most: int, unit: str) -> str | None:
    """Why Triton cannot serve, or None."""
    return f"it takes up to {most} {unit}, got {size}" if size > most else dispatch.unavailable("triton", device, dtype)


def autocasted(x: Tensor) -> Tensor:
    """A float32 x in the dtype of an autocast block, as torch's own convolutions and products take it."""
    device = x.device.type
    if x.dtype == torch.float32 and device in ("cpu", "cuda", "xpu") and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
