"""Networks replayed as CUDA graphs: hundreds of small launches from Python become one."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn

_EAGER_CALLS = 2  # before a shape is recorded: a shape that comes once is not worth it, and libraries warm up in them


class CudaGraphs:
    """Calls of one method of a network, replayed as CUDA graphs where that can be done.

    Without gradients and in eval mode a shape that comes a third time is recorded, and replayed from then on. Training
    steps are recorded if ``record_training`` is set (see :class:`CudaGraphHook`), for the first shape only. Everything
    else (CPU, tracing, other shapes) runs as it would without this class; so does a network that cannot be recorded.

    A replay writes to the memory of the replay before: use up the results before the next call.

    Args:
        owner: the network.
        method: name of its method; takes one tensor, returns nested tuples and lists of tensors, and may depend on the
            tensor's shape but not on its values.
        limit: shapes that stay recorded.
    """

    def __init__(self, owner: nn.Module, method: str, *, limit: int = 8) -> None:
        self.owner, self.method, self.limit = owner, method, limit
        self.record_training = False
        self._forget()

    def _forget(self) -> None:
        self._calls: Counter[tuple] = Counter()
        self._recorded: dict[tuple, Callable] = {}
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._pool = None

    def __getstate__(self) -> dict:
        """Recordings hold addresses of this network; a copy of it starts without."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, x: Tensor):
        method = getattr(self.owner, self.method)
        trains = torch.is_grad_enabled()
        if not x.is_cuda or trains != self.owner.training or (trains and not self.record_training):
            return method(x)
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return method(x)
        if self._addresses != [tensor.data_ptr() for tensor in self._tensors]:  # the network was moved or cast
            self._forget()
        key = (trains, x.shape, x.dtype, x.device, _autocast_dtype())
        if key in self._recorded:
            return self._recorded[key](x)
        self._calls[key] += 1
        if self._calls[key] <= _EAGER_CALLS or (trains and any(recorded[0] for recorded in self._recorded)):
            return method(x)
        self._recorded[key] = self._record(method, x, trains)
        return self._recorded[key](x)

    def _record(self, method: Callable, x: Tensor, trains: bool) -> Callable:
        if len(self._recorded) >= self.limit:
            del self._recorded[next(iter(self._recorded))]
        self._tensors = [*self.owner.parameters(), *self.owner.buffers()]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return _record_training(self.owner, self.method, x) if trains else _record(method, x, self._pool)
        except RuntimeError as error:
            print_log(f"not recorded as a CUDA graph: {str(error).splitlines()[0]}", "current", level=logging.WARNING)
            return method


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


@contextlib.contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """The present autocast, but weights cast inside the graph: those of the cache would be gone at a replay."""
    dtype = _autocast_dtype()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        yield


def _record(method: Callable, x: Tensor, pool: tuple[int, int]) -> Callable:
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(False), torch.no_grad(), _autocast_without_cache():
        static = x.clone()  # no inference tensor: it is written to outside inference mode as well
        with torch.cuda.graph(graph, pool=pool):
            results = method(static)

    def replay(x: Tensor):
        static.copy_(x)
        graph.replay()
        return results

    return replay


class _Method(nn.Module):
    """A method as a module: make_graphed_callables wants to know whose parameters get gradients."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def forward(self, x: Tensor):
        return getattr(self.owner, self.name)(x)


def _record_training(owner: nn.Module, method: str, x: Tensor) -> Callable:
    """Forward and backward; recording runs the network a few times, which must not count in its running statistics."""
    before = [buffer.clone() for buffer in owner.buffers()]
    with _autocast_without_cache():
        replay = torch.cuda.make_graphed_callables(_Method(owner, method), (x.clone(),), allow_unused_input=True)
    for buffer, value in zip(owner.buffers(), before, strict=True):
        buffer.copy_(value)
    return replay


@HOOKS.register_module()
class CudaGraphHook(Hook):
    """Train through CUDA graphs: for models that keep a :class:`CudaGraphs` as ``graphs``.

    One GPU, pictures of one size and no gradient accumulation (a replay writes to the gradients of the one before);
    elsewhere training goes on as without this hook.
    """

    def before_train(self, runner) -> None:
        """Switch recording on where it can be done."""
        accumulates = getattr(runner.optim_wrapper, "_accumulative_counts", 1) > 1
        if not is_model_wrapper(runner.model) and not accumulates:
            runner.model.graphs.record_training = True

    def after_train(self, runner) -> None:
        """Give the graphs' memory back."""
        if not is_model_wrapper(runner.model):
            runner.model.graphs = CudaGraphs(runner.model, runner.model.graphs.method)
