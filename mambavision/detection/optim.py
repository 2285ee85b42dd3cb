"""Optimiser of the Mamba-YOLO recipe: parameter groups, scaled weight decay, bf16 autocast, averaged weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from mmdet.models.layers import ExpMomentumEMA
from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.dist import get_world_size
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

ParamKind = Literal["weight", "norm", "bias"]

_NOMINAL_BATCH = 64


def split_parameters(model: nn.Module) -> dict[ParamKind, list[nn.Parameter]]:
    """Split the trainable parameters of a model by how the recipe treats them.

    ``bias``: the parameter's full name contains "bias", so the dt bias of a scan belongs here; no weight decay, own
    learning-rate warm-up. ``norm``: other parameters of a normalisation layer; no weight decay. ``weight``: all the
    rest, the scan's A_log, D, x_proj and dt_proj among them; decayed.
    """
    groups: dict[ParamKind, list[nn.Parameter]] = {"weight": [], "norm": [], "bias": []}
    seen = set()
    for module_name, module in model.named_modules():
        is_norm = any("Norm" in base.__name__ for base in type(module).__mro__)
        for name, param in module.named_parameters(prefix=module_name, recurse=False):
            if not param.requires_grad or param in seen:
                continue
            seen.add(param)
            groups["bias" if "bias" in name else "norm" if is_norm else "weight"].append(param)
    return groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MambaYOLOOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimiser with the weight-decay groups of the published Mamba-YOLO training.

    The weight decay in the config is meant for 64 images an update and is scaled to the real number:

        weight_decay * batch_size_per_gpu * world_size * accumulative_counts / 64

    Each group carries ``kind`` (see :func:`split_parameters`) and ``initial_lr``, which
    :class:`~mambavision.detection.hooks.WarmupLinearDecayHook` reads. mmengine averages gradients over
    ``accumulative_counts``, the original sums them: multiply lr by that count when it is not 1.

    Args:
        optim_wrapper_cfg: mmengine's optimiser wrapper config, with ``optimizer``.
        paramwise_cfg: ``dict(batch_size_per_gpu=int)``.

    Raises:
        ValueError: If ``batch_size_per_gpu`` is missing or not positive.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        batch_size = self.paramwise_cfg.get("batch_size_per_gpu", 0)
        if batch_size <= 0 or set(self.paramwise_cfg) != {"batch_size_per_gpu"}:
            raise ValueError(f"paramwise_cfg must be dict(batch_size_per_gpu=positive int), got {self.paramwise_cfg}")

    def add_params(self, params: list[dict], module: nn.Module, **_: object) -> None:
        """Append one parameter group a kind to ``params``."""
        accumulate = self.optim_wrapper_cfg.get("accumulative_counts", 1)
        batch = self.paramwise_cfg["batch_size_per_gpu"] * get_world_size() * accumulate
        decay = (self.base_wd or 0.0) * batch / _NOMINAL_BATCH
        for kind, group in split_parameters(module).items():
            if group:
                params.append(
                    dict(
                        params=group,
                        kind=kind,
                        weight_decay=decay if kind == "weight" else 0.0,
                        initial_lr=self.base_lr,
                    )
                )


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
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
class FusedExpMomentumEMA(ExpMomentumEMA):
    """mmdet's ExpMomentumEMA in a few GPU launches an update instead of two a tensor.

    avg += m * (source - avg) with m = (1 - momentum) * exp(-(1 + steps) / gamma) + momentum. Integer buffers are
    copied.
    """

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
