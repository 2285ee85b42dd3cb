"""Which implementation runs a scan, and its registration with torch (autograd, torch.compile, export)."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import operator
import os
import platform
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambavision.kernels import chunked, reference
from mambavision.ops.compile import constant_result, register

Backend = Literal["reference", "chunked", "cpu", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENVIRONMENT = "MAMBAVISION_BACKEND"
AUTOMATIC = "automatic"  # in traced programs: the first that can serve when it runs
FAST: dict[str, tuple[Backend, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}
MOST_STATES: dict[Backend, int] = {"cuda": 128, "cpu": 1024}  # lanes that share a channel; a thread's stack
PLAIN = (Tensor, torch.nn.Parameter)
TENSORS = ("x or u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state", "the order table", "z")
GATING: tuple[Backend, ...] = ("reference", "cuda")  # backends that take z; after others it multiplies what they return
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPED = ("x or u", "delta", "B", "C", "z")  # have one of them, the others are converted

_logger = logging.getLogger("mambavision")
_chosen: list[Backend] = []
_portable = False


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run every scan in the block on one backend (an explicit ``backend=`` argument still wins)."""
    _chosen.append(_known(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.pop()


@contextlib.contextmanager
def portable_scans() -> Iterator[None]:
    """Trace scans in the block as ``mambavision::scan``, which then runs on the first backend that can serve it there.

    Without, a program of ``torch.export`` holds the backend that was chosen while it was traced.
    """
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def describe_backends() -> str:
    """One line per backend, available or why not; what is chosen, and the versions that a bug report needs."""
    rows = [f"mambavision scan backends (torch {torch.__version__}, Python {platform.python_version()}):"]
    for name in BACKENDS:
        device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
        reason = unavailable(name, device, torch.float32)
        if reason and name in ("triton", "cuda") and device == "cpu":
            reason = "torch sees no CUDA device"
        rows.append(f"  {name:10s} {'available' if reason is None else 'not available: ' + reason}")
    rows.append(f"  automatic: {automatic('cpu', torch.float32)} on CPU tensors")
    if torch.cuda.is_available():
        rows[-1] += f", {automatic('cuda', torch.float32)} on {torch.cuda.get_device_name()}"
    if _chosen:
        rows.append(f"  in effect: {_chosen[-1]}, by use_backend")
    if name := os.environ.get(ENVIRONMENT):
        state = "passed over for use_backend" if _chosen else "in effect" if name in BACKENDS else "an unknown backend"
        rows.append(f"  ${ENVIRONMENT}={name}: {state}")
    return "\n".join(rows)


def choose(backend: Backend | None, device: str, dtype: torch.dtype, states: int) -> Backend:
    """Argument, then :func:`use_backend`, then $MAMBAVISION_BACKEND, then the first that can serve the call.

    Raises RuntimeError with the reason where a backend was asked for and cannot serve the call.
    """
    return _chosen_of(_asked(backend), device, dtype, states)


def _asked(backend: Backend | None) -> Backend | None:
    if backend is not None:
        return _known(backend, "backend")
    name = in_effect()
    return None if name is None else _known(name, f"${ENVIRONMENT}")


def in_effect() -> str | None:
    """What is asked for without an argument: by :func:`use_backend`, else $MAMBAVISION_BACKEND, or by torch.func."""
    if _chosen:
        return _chosen[-1]
    return os.environ.get(ENVIRONMENT) or ("chunked" if _differentiated_by_func() else None)


def _differentiated_by_func() -> bool:
    """Whether torch.func.grad or vjp, or forward mode is at work, which the kernels' operators do not take."""
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    kinds = torch._C._functorch.TransformType
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in torch._C._functorch.get_interpreter_stack())


def _chosen_of(asked: Backend | None, device: str, dtype: torch.dtype, states: int) -> Backend:
    if asked is None:
        return automatic(device, dtype, _crowded(states))
    reason = unavailable(asked, device, dtype, _crowded(states))
    if reason is not None:
        raise RuntimeError(f"scan backend {asked!r} cannot run this call: {reason}")
    return asked


def _crowded(states: int) -> tuple[Backend, ...]:
    """Backends that cannot hold so many states."""
    return tuple(backend for backend, most in MOST_STATES.items() if states > most)


@constant_result
def automatic(device: str, dtype: torch.dtype, crowded: tuple[Backend, ...] = ()) -> Backend:
    """The first fast backend of a device that can serve, else ``chunked``; a fallback's reason is logged once."""
    if dtype not in KERNEL_DTYPES:
        return "chunked"
    for fast in FAST.get(device, ()):
        reason = unavailable(fast, device, dtype, crowded)
        if reason is None:
            return fast
        _log_once(f"scan backend {fast!r} is passed over: {reason}")
    return "chunked"


@constant_result
def unavailable(backend: Backend, device: str, dtype: torch.dtype, crowded: tuple[Backend, ...] = ()) -> str | None:
    """Why a backend cannot serve tensors of this device and dtype, or None if it can; see :func:`_crowded`."""
    if backend in ("reference", "chunked"):
        return None
    if backend in crowded:
        return f"it holds up to {MOST_STATES[backend]} states"
    if dtype not in KERNEL_DTYPES:
        return f"it computes in float32 and takes float32, bfloat16 or float16, not {_names((dtype,))}"
    if backend == "cpu":
        return _kernel("cpu").unavailable() if device == "cpu" else f"it needs CPU tensors, not {device}"
    if backend == "cuda":
        return _kernel("cuda").unavailable() if device == "cuda" else f"it needs CUDA tensors, not {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device not in ("cuda", "xpu") and (device != "cpu" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "it needs CUDA tensors (or TRITON_INTERPRET=1, for tests)"
    return None


@functools.cache
def _kernel(backend: Backend):
    return importlib.import_module(f"mambavision.kernels.{backend}")


@functools.cache
def _log_once(message: str) -> None:
    _logger.warning(message)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _known(name: str, where: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown scan backend {name!r}, use one of {', '.join(BACKENDS)}")
    return name


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
    backend: Backend | None,
    *,
    z: Tensor | None = None,
    want_state: bool = True,
    check: tuple = (),
) -> tuple[Tensor, Tensor | None]:
    """K selective scans on the chosen backend; the contract is that of :func:`mambavision.kernels.reference.scan`.

    x may also be (batch, L, D), for all scans. Without ``want_state`` the last state may be None. ``z`` is not for
    merged scans. ``check``: a function of the shapes of all tensors, in their order here and z behind them, and what
    else it takes; it is called for the first call of a kind, and raises what is wrong.
    """
    tensors = (x, delta, A, B, C, D, delta_bias, initial_state, order, z)
    plain, asked = _untraced(tensors), _asked(backend)
    if asked not in (None, "reference", "chunked") and torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(f"scan backend {asked!r} has no forward mode: backend='chunked' has")
    if plain:
        layouts = [None if v is None else (v.shape, v.stride(), v.dtype, v.device) for v in tensors]
        chosen, scans = _planned(asked, delta_softplus, merge, check, *layouts)
    else:
        layouts = [None if v is None else (v.shape, None, v.dtype, v.device) for v in tensors]
        chosen, scans = _served(asked, check, layouts), None
    portable = _portable and not plain
    if z is not None and (portable or chosen not in GATING):
        y, state = scan(*tensors[:8], order, delta_softplus, merge, backend)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (y.to(dtype) * F.silu(z.to(dtype))).to(x.dtype), state
    if scans is not None:
        if torch.is_grad_enabled() and _learns(tensors):
            return _Scan.apply(scans, want_state, *tensors)
        return scans.forward(tensors, None, want_state)
    arguments = (_of_each(x), *tensors[1:9], delta_softplus, merge)
    if portable:
        return torch.ops.mambavision.scan(*arguments, None, False, AUTOMATIC)[:2]
    if chosen == "reference":
        return reference.scan(*arguments, z=z)
    if chosen == "chunked":
        return chunked.scan(*arguments)
    keep = torch.is_grad_enabled() and _learns(tensors)
    return torch.ops.mambavision.scan(*arguments, z, keep, chosen)[:2]


def _of_each(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 3 else x


def _served(asked: Backend | None, check: tuple, layouts: Sequence[tuple | None]) -> Backend:
    """The backend of a call whose tensors fit together: ``layouts`` holds shape, strides, dtype and device of each."""
    if check:
        check[0]([None if layout is None else layout[0] for layout in layouts], *check[1:])
    (_, _, dtype, device), (A, *_) = layouts[0], layouts[2]
    allowed = (torch.float64,) if dtype == torch.float64 else KERNEL_DTYPES
    for name, layout in zip(TENSORS, layouts, strict=True):
        if layout is None:
            continue
        if layout[2] not in allowed and name in TYPED:
            raise ValueError(f"{name} must be {_names(allowed)}, got {_names(layout[2:3])}")
        if layout[3] != device:
            raise ValueError(f"{name} is on {layout[3]}, x or u on {device}: move one of them")
    return _chosen_of(asked, device.type, dtype, operator.index(A[-1]))


@functools.lru_cache(4096)
def _planned(
    asked: Backend | None, softplus: bool, merge: bool, check: tuple, *layouts: tuple | None
) -> tuple[Backend, "_Scans | None"]:
    """The backend of a call and, if it is one of kernels, what of the call can be worked out from layouts alone."""
    backend = _served(asked, check, layouts)
    if backend in ("reference", "chunked"):
        return backend, None
    if backend == "cuda":
        own = (None if layout is None else layout[:3] for layout in layouts)
        return backend, _kernel("cuda").scans_of(layouts[0][3].index, softplus, merge, *own)
    return backend, _Scans(_kernel(backend), softplus, merge)


class _Scans(NamedTuple):
    """Scans by kernels that work nothing out beforehand; as :class:`mambavision.kernels.cuda.Scans`."""

    kernel: ModuleType
    softplus: bool
    merge: bool

    def kept(self, tensors: tuple[Tensor | None, ...]) -> None:
        return None

    def forward(
        self, tensors: tuple[Tensor | None, ...], starts: None, want_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.kernel.scan(_of_each(tensors[0]), *tensors[1:9], self.softplus, self.merge)

    def backward(
        self, dy: Tensor, gradient: Tensor | None, tensors: tuple[Tensor | None, ...], starts: None
    ) -> tuple[Tensor | None, ...]:
        x, *others, _ = tensors
        dx, *grads = self.kernel.scan_backward(dy, gradient, _of_each(x), *others, self.softplus, self.merge)
        grads = (None if v is None else grad for v, grad in zip(others, grads, strict=False))
        return dx.view(x.shape), *grads, None


class _Scan(torch.autograd.Function):
    """A plain call that learns: what `mambavision::scan` does, in a fraction of the dispatcher's time."""

    @staticmethod
    def forward(ctx, scans, want_state, *tensors):
        starts = scans.kept(tensors)
        ctx.save_for_backward(*tensors, starts)
        ctx.scans = scans
        ctx.set_materialize_grads(False)
        return scans.forward(tensors, starts, want_state)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, gradient):
        *tensors, starts = ctx.saved_tensors
        if dy is None and gradient is None:
            return (None,) * 12
        dy = _zeros(tensors[0], tensors[1], ctx.scans.merge) if dy is None else dy
        grads = ctx.scans.backward(dy, gradient, tensors, starts)
        return None, None, *grads[:8], None, grads[8]


def _zeros(x: Tensor, delta: Tensor, merge: bool) -> Tensor:
    """The gradient of a y that nothing depends on."""
    return x.new_zeros(delta.shape[:2] + delta.shape[3:] if merge else delta.shape)


def _learns(tensors: tuple[Tensor | None, ...]) -> bool:
    for v in tensors:
        if v is not None and v.requires_grad:
            return True
    return False


def _nothing_listens(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether only the numbers are wanted: no gradient either. Such calls go straight to the kernel."""
    return _untraced(tensors) and not (torch.is_grad_enabled() and _learns(tensors))


def _untraced(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether no graph, transform, mode or subclass needs the operator itself, which takes the dispatcher's time."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch.autograd._profiler_enabled():
        return False
    for v in tensors:
        if v is not None and type(v) not in PLAIN:
            return False
    return True


def _scan(
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
    z: Tensor | None,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (x, delta, A, B, C, D, delta_bias, initial_state, order, delta_softplus, merge)
    backend = choose(None, x.device.type, x.dtype, A.shape[-1]) if backend == AUTOMATIC else backend
    starts = _empty_starts(x, delta, A, keep, backend)
    return *_kernel(backend).scan(*arguments, **_options(z, starts)), starts


def _options(z: Tensor | None, starts: Tensor) -> dict[str, Tensor]:
    """What only some backends take, where it is there."""
    return ({} if z is None else {"z": z}) | ({"starts": starts} if starts.numel() else {})


def _empty_starts(x: Tensor, delta: Tensor, A: Tensor, keep: bool, backend: str) -> Tensor:
    """Where the forward keeps states for its backward: without elements if it is not to, or the backend keeps none."""
    kept = _kernel("cuda").kept_states(x, delta, A) if keep and backend == "cuda" else None
    shape, dtype = kept or ((0,), torch.float32)
    return x.new_empty(shape, dtype=dtype)


def _scan_like(x, delta, A, B, C, D, delta_bias, initial_state, order, delta_softplus, merge, z, keep, backend):
    batch, length, K, channels = delta.shape
    y = x.new_empty((batch, length, channels) if merge else (batch, length, K, channels))
    return y, x.new_empty(batch, *A.shape, dtype=torch.float32), _empty_starts(x, delta, A, keep, backend)


def check_learns(backend: str) -> None:
    """Raise RuntimeError in a program that chooses its backend when it runs, without regard to gradients."""
    if backend == AUTOMATIC:
        raise RuntimeError("an exported scan has no gradient: train the module that it was exported from")


def _scan_backward(
    grad_y: Tensor | None,
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
    z: Tensor | None,
    starts: Tensor,
    delta_softplus: bool,
    merge: bool,
    backend: str,
) -> list[Tensor]:
    check_learns(backend)
    inputs = (x, delta, A, B, C, D, delta_bias, initial_state)
    if grad_y is None:
        grad_y = _zeros(x, delta, merge)
    options = _options(z, starts)
    grads = _kernel(backend).scan_backward(grad_y, grad_state, *inputs, order, delta_softplus, merge, **options)
    inputs = inputs if z is None else (*inputs, z)
    return [g.to(v.dtype) for g, v in zip(grads, inputs, strict=True) if v is not None]


def _scan_backward_like(
    grad_y, grad_state, x, delta, A, B, C, D, delta_bias, initial_state, order, z, starts, delta_softplus, merge,
    backend
):  # fmt: skip
    inputs = (x, delta, A, B, C, D, delta_bias, initial_state, z)
    return [torch.empty_like(v, memory_format=torch.contiguous_format) for v in inputs if v is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.merge, z, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, z, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad_y, grad_state, _):
    tensors = ctx.saved_tensors
    if grad_y is None and grad_state is None:
        return (None,) * 14
    grads = iter(
        torch.ops.mambavision.scan_backward(grad_y, grad_state, *tensors, ctx.delta_softplus, ctx.merge, ctx.backend)
    )
    of_inputs = [None if v is None else next(grads) for v in tensors[:8]]
    of_z = None if tensors[9] is None else next(grads)
    return *of_inputs, None, None, None, of_z, None, None


register(_scan, "scan", fake=_scan_like, backward=_autograd, setup_context=_setup_context)
register(_scan_backward, "scan_backward", fake=_scan_backward_like)
