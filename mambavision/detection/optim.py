"""Optimiser of the Mamba-YOLO recipe: parameter groups and scaled weight decay."""

from typing import Literal

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.dist import get_world_size
from mmengine.optim import DefaultOptimWrapperConstructor
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
