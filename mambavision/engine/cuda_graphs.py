"""Networks and training steps replayed as CUDA graphs: hundreds of small launches from Python become one."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

_EAGER_CALLS = 2  # before a shape is recorded: a shape that comes once is not worth it, and libraries warm up in them


class _Recorder:
    """What has recordings, in attributes whose names begin with an underscore.

    Recordings hold addresses of one network; a copy of it starts without.
    """

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.forget()


class CudaGraphs(_Recorder):
    """Calls of one method of a network, replayed as CUDA graphs where that can be done.

    Without gradients and in eval mode a shape that comes a third time is recorded, and replayed from then on. Training
    steps are recorded if ``record_training`` is set (see :class:`CudaGraphHook`), for the first shape only. Everything
    else (CPU, tracing, other shapes) runs as it would without this class.

    A replay writes to the memory of the replay before: use up the results before the next call, and clear gradients
    before the next backward. Hooks on submodules run once, when a shape is recorded; a submodule that is replaced after
    that is not noticed, weights that are replaced, moved or frozen are. Not for several threads.

    Args:
        owner: the network.
        method: name of its method; takes tensors of one device, returns nested tuples and lists of tensors, and may
            depend on the tensors' shapes but not on their values.
        limit: shapes to predict that are recorded, the first that come thrice; 0 records nothing.

    Raises:
        RuntimeError: from a call that cannot be recorded, because the method waits for the GPU, for example.
    """

    def __init__(self, owner: nn.Module, method: str, *, limit: int = 16) -> None:
        self.owner, self.method, self.limit = owner, method, limit
        self.record_training = False
        self.forget()

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._calls: Counter[tuple] = Counter()
        self._recorded: dict[tuple, Callable] = {}
        self._modules: list[nn.Module] = []
        self._recorded_state: dict[bool, list] = {}  # of training, of prediction: they differ in what trains
        self._pool = None

    def _state(self) -> list:
        """What a recording relies on: where each tensor lies, what wants gradients, what trains."""
        state: list = [module.training for module in self._modules]
        for module in self._modules:
            state += [(p.data_ptr(), p.requires_grad) for p in module._parameters.values() if p is not None]
            state += [buffer.data_ptr() for buffer in module._buffers.values() if buffer is not None]
        return state

    def __call__(self, *inputs: Tensor):
        method, device = getattr(self.owner, self.method), inputs[0].device
        trains = torch.is_grad_enabled()
        if not inputs[0].is_cuda or self.limit == 0:
            return method(*inputs)
        if trains != self.owner.training or (trains and not self.record_training):
            return method(*inputs)
        learns = any(x.requires_grad for x in inputs)
        if learns or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return method(*inputs)
        key = (trains, *((x.shape, x.dtype) for x in inputs), device, _autocast_dtype())
        with torch.cuda.device(device):
            if trains in self._recorded_state and self._recorded_state[trains] != self._state():
                self.forget()  # the network was moved, cast, frozen or given other weights
            if key not in self._recorded:
                self._calls[key] += 1
                full = sum(recorded[0] == trains for recorded in self._recorded) >= (1 if trains else self.limit)
                if full or self._calls[key] <= _EAGER_CALLS:
                    return method(*inputs)
                self._recorded[key] = self._record(inputs, trains)
            return self._recorded[key](inputs)

    def _record(self, inputs: tuple[Tensor, ...], trains: bool) -> Callable:
        self._modules = list(self.owner.modules())
        self._recorded_state[trains] = self._state()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return (_TrainingGraphs if trains else _InferenceGraph)(self.owner, self.method, inputs, self._pool)
        except RuntimeError as error:
            raise RuntimeError(
                f"{type(self.owner).__name__}.{self.method} cannot be recorded as a CUDA graph; graphs.limit = 0 turns "
                f"recording off: {error}"
            ) from error


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


@contextlib.contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """The present autocast, but weights cast inside the graph: those of the cache would be gone at a replay."""
    dtype = _autocast_dtype()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None, cache_enabled=False):
        yield


@contextlib.contextmanager
def _capture(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Record what this thread launches; others, such as a data loader's, may allocate meanwhile."""
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError:
        # torch's generator is left as in a recording and draws nothing until the end of one that succeeds
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.empty(1, device="cuda").zero_()
        raise


def _copy(to: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    for x, value in zip(to, inputs, strict=True):
        x.copy_(value)


class _InferenceGraph:
    def __init__(self, owner: nn.Module, method: str, inputs: tuple[Tensor, ...], pool: tuple[int, int]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(False), torch.no_grad(), _autocast_without_cache():
            self.inputs = tuple(x.clone() for x in inputs)  # no inference tensors: they are written to outside it too
            getattr(owner, method)(*self.inputs)  # what is compiled is compiled for these modes here
            with _capture(self.graph, pool):
                self.results = getattr(owner, method)(*self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]):
        _copy(self.inputs, inputs)
        self.graph.replay()
        return self.results


class _Method(nn.Module):
    """A method as a module, for functional_call."""

    def __init__(self, owner: nn.Module, method: str) -> None:
        super().__init__()
        self.owner, self.method = owner, method

    def forward(self, *inputs: Tensor):
        return getattr(self.owner, self.method)(*inputs)


class _TrainingGraphs:
    """One graph forward, one backward, with gradients of the owner's parameters."""

    def __init__(self, owner: nn.Module, method: str, inputs: tuple[Tensor, ...], pool: tuple[int, int]) -> None:
        named = {f"owner.{name}": p for name, p in owner.named_parameters() if p.requires_grad}
        self.parameters = tuple(named.values())
        # the same memory as new leaves: the parameters' own accumulators belong to the stream of the steps before
        leaves = {name: p.detach().requires_grad_() for name, p in named.items()}
        statistics = [buffer.clone() for buffer in owner.buffers()]
        self.inputs = tuple(x.clone() for x in inputs)

        def forward() -> list[Tensor]:
            with _autocast_without_cache():
                results = torch.func.functional_call(_Method(owner, method), leaves, self.inputs)
            flat, self.structure = tree_flatten(results)
            return flat

        def backward() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(self.results, tuple(leaves.values()), self.grad_results, allow_unused=True)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set up what they need for this stream
            self.results = forward()
            self.grad_results = [torch.zeros_like(result) for result in self.results]
            backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _capture(self.forward_graph, pool, stream):
            self.results = forward()
        with _capture(self.backward_graph, pool, stream):
            self.gradients = backward()
        self.results = [result.detach() for result in self.results]
        for buffer, value in zip(owner.buffers(), statistics, strict=True):
            buffer.copy_(value)  # as if the network had not run here

    def __call__(self, inputs: tuple[Tensor, ...]):
        _copy(self.inputs, inputs)
        return tree_unflatten(_Replay.apply(self, *self.parameters), self.structure)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs: _TrainingGraphs, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        graphs.forward_graph.replay()
        return tuple(result.detach() for result in graphs.results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graphs = ctx.graphs
        if any(parameter.grad is not None for parameter in graphs.parameters):
            raise RuntimeError(
                "a replayed backward writes over the gradients of the one before: clear them with "
                "zero_grad(set_to_none=True), and do not accumulate"
            )
        torch._foreach_copy_(graphs.grad_results, list(gradients))
        graphs.backward_graph.replay()
        return None, *(None if gradient is None else gradient.detach() for gradient in graphs.gradients)


class StepGraphs(_Recorder):
    """Training steps of a model whose forward, loss and backward pass are replayed as one CUDA graph.

    For losses that depend on the shapes of a batch and not on its values, so that nothing of a step waits for the GPU.
    A shape is recorded when it comes a third time, and one only: the recording of another shape, a progressive
    schedule's next, replaces it. The optimiser steps outside, so its rate is free to change. Without a GPU, before a
    recording, and unless ``record_training`` is set (see :class:`CudaGraphHook`), a step runs as mmengine's does.

    The recording is of the model's weights where they lie: they may be written to, but not replaced, moved or frozen.

    Args:
        model: Its ``forward(**batch, mode="loss")`` returns losses.

    Raises:
        RuntimeError: From a step that cannot be recorded, because it waits for the GPU, for example.
    """

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.record_training = False
        self.forget()

    def forget(self) -> None:
        """Drop the recording and its memory."""
        self._calls: Counter[tuple] = Counter()
        self._recorded: tuple[tuple, _StepGraph] | None = None

    def __call__(self, batch: Mapping[str, Tensor], optim_wrapper: OptimWrapper) -> dict[str, Tensor] | None:
        """Step the weights by a replay; returns what mmengine logs, or None if this batch has to be stepped eagerly."""
        if not self.record_training or not all(value.is_cuda for value in batch.values()):
            return None
        key = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        if self._recorded is None or self._recorded[0] != key:
            self._calls[key] += 1
            if self._calls[key] <= _EAGER_CALLS:
                return None
            self.forget()
            try:
                self._recorded = key, _StepGraph(self.model, batch, optim_wrapper)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the training step of {type(self.model).__name__} cannot be recorded as a CUDA graph; leave "
                    f"CudaGraphHook out of the config: {error}"
                ) from error
        log_vars = self._recorded[1](batch)
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        return log_vars


def _laid_out_like(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """The gradient with its parameter's strides, as backward() would leave it; fused optimisers rely on that."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class _StepGraph:
    def __init__(self, model: BaseModel, batch: Mapping[str, Tensor], optim_wrapper: OptimWrapper) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # the same memory as new leaves: the parameters' own accumulators belong to the stream of the steps before
        # (as Parameters, of which what is compiled need not be compiled anew)
        leaves = {name: nn.Parameter(p.detach()) for name, p in named.items()}
        self.batch = {name: value.clone() for name, value in batch.items()}

        def step() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with optim_wrapper.optim_context(model):
                losses = torch.func.functional_call(model, leaves, kwargs={**self.batch, "mode": "loss"})
            loss, log_vars = model.parse_losses(losses)
            self.names = tuple(log_vars)
            gradients = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
            gradients = tuple(map(_laid_out_like, gradients, leaves.values()))
            return torch.stack([value.detach().float() for value in log_vars.values()]), gradients

        statistics = [buffer.clone() for buffer in model.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set up what they need for this stream
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with _capture(self.graph, torch.cuda.graph_pool_handle(), stream):
            self.values, gradients = step()
        for buffer, value in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(value)  # as if the step had not run here
        self.gradients = tuple(zip(named.values(), gradients, strict=True))

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        torch._foreach_copy_(list(self.batch.values()), list(batch.values()))
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return dict(zip(self.names, self.values.clone(), strict=True))


@HOOKS.register_module()
class CudaGraphHook(Hook):
    """Train through CUDA graphs: for models that keep :class:`CudaGraphs` or :class:`StepGraphs` as ``graphs``.

    One GPU, pictures of one size at a time and no gradient accumulation (a replay writes to the gradients of the one
    before); elsewhere training goes on as without this hook. So it does in fp16 where :class:`StepGraphs` would record
    the backward pass too: the loss is not scaled there.
    """

    def before_train(self, runner) -> None:
        """Switch recording on where it can be done."""
        graphs = getattr(runner.model, "graphs", None)
        accumulates = getattr(runner.optim_wrapper, "_accumulative_counts", 1) > 1
        scales = isinstance(graphs, StepGraphs) and hasattr(runner.optim_wrapper, "loss_scaler")
        if isinstance(graphs, CudaGraphs | StepGraphs) and not accumulates and not scales and get_world_size() == 1:
            graphs.record_training = True

    def after_train(self, runner) -> None:
        """Give the graphs' memory back."""
        graphs = getattr(runner.model, "graphs", None)
        if isinstance(graphs, CudaGraphs | StepGraphs):
            graphs.record_training = False
            graphs.forget()
