"""Optimiser wrappers and averaged weights that keep the GPU busy: nothing here waits for it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@OPTIM_WRAPPERS.register_module()
class AsyncOptimWrapper(OptimWrapper):
    """mmengine's OptimWrapper, but the gradient norm stays on the device.

    mmengine reads the norm of every clipped step, and so waits for the GPU. Here it is left in ``grad_norm``, which
    :class:`~mambavision.engine.hooks.DeferredRuntimeInfoHook` logs.
    """

    grad_norm: Tensor | None = None

    def _clip_grad(self) -> None:
        groups = self.optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        norm = self.clip_func(params, **self.clip_grad_kwargs)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(AsyncOptimWrapper):
    """Run the forward pass under bfloat16 autocast, on CUDA or CPU, with no loss scaling.

    bfloat16 has fp32's range, so nothing needs scaling; mmengine's ``AmpOptimWrapper`` insists on a scaler and a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enter autocast, besides what the plain wrapper does for gradient accumulation."""
        device_type = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device_type, dtype=torch.bfloat16):
            yield


@MODELS.register_module()
class FusedExpMomentumEMA(ExponentialMovingAverage):
    """Averaged weights in a few GPU launches an update instead of two a tensor.

    avg += m * (source - avg) with m = (1 - momentum) * exp(-(1 + steps) / gamma) + momentum, as mmdet's
    ExpMomentumEMA. Integer buffers are copied.

    Args:
        model: The model to be averaged.
        momentum: 1 - decay, after the start.
        gamma: Steps after which the start is forgotten to 1 / e.
        interval: Steps between two updates.
        device: Device of the averages, the model's if None.
        update_buffers: Average buffers too; False copies them.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 2000,
        interval: int = 1,
        device: torch.device | None = None,
        update_buffers: bool = False,
    ) -> None:
        super().__init__(model, momentum, interval, device, update_buffers)
        if gamma <= 0:
            raise ValueError(f"gamma={gamma} must be positive")
        self.gamma = gamma

    def update_parameters(self, model: nn.Module) -> None:
        """Average in the model's present weights (and, with ``update_buffers``, its buffers)."""
        source = model.state_dict() if self.update_buffers else dict(model.named_parameters())
        pairs = [(average, source[name].detach()) for name, average in self.avg_parameters.items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        integers = [pair for pair in pairs if not pair[0].is_floating_point()]
        if integers:
            torch._foreach_copy_(*map(list, zip(*integers, strict=True)))
        steps = int(self.steps)
        if steps % self.interval == 0:
            momentum = (1 - self.momentum) * math.exp(-(1 + steps) / self.gamma) + self.momentum if steps else 1.0
            averages, values = zip(*floats, strict=True)
            torch._foreach_lerp_([tensor.data for tensor in averages], values, momentum)
        if not self.update_buffers:
            for average, value in zip(self.module.buffers(), model.buffers(), strict=True):
                average.copy_(value)
        self.steps += 1
