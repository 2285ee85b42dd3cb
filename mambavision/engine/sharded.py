"""Runs whose weights, gradients, optimiser state and averages are spread over the processes (torch's FSDP)."""

from __future__ import annotations

import copy
import time
from typing import Any

import mmengine
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.runner import Runner
from mmengine.runner.checkpoint import save_checkpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def shard(model: nn.Module) -> nn.Module:
    """Spread a model's parameters over the processes, each of its network's ``blocks`` gathered when it runs.

    The model stays of its class, and may be copied: the copy has shards of its own.

    Raises:
        ValueError: In one process, or if the network has no ``blocks``.
    """
    if get_world_size() < 2:
        raise ValueError("weights are spread over several processes: start with torchrun and --launcher pytorch")
    blocks = getattr(getattr(model, "network", None), "blocks", None)
    if blocks is None:
        raise ValueError(f"{type(model).__name__} cannot be sharded: its network has no blocks")
    empty = copy.deepcopy(model).to("meta")
    for block in blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)  # so that averaged weights can be swapped in between
    model.__deepcopy__ = lambda memo: _copied(model, empty)  # torch's own refuses
    model.register_load_state_dict_pre_hook(_whole_to_shards)
    return model


def _copied(model: nn.Module, empty: nn.Module) -> nn.Module:
    """A copy of the structure ``empty`` with the shards and buffers of a model."""
    new = copy.deepcopy(empty)
    for named, wrap in ((model.named_parameters(), nn.Parameter), (model.named_buffers(), lambda buffer: buffer)):
        for name, value in named:
            owner, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(owner), leaf, wrap(value.detach().clone()))
    new.register_load_state_dict_pre_hook(_whole_to_shards)
    return new


def _whole_to_shards(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Shard the whole tensors of a state dict that is being loaded as the model's parameters are.

    torch itself copies none into a parameter that has fewer rows than there are processes.
    """
    for name, parameter in model.named_parameters():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[prefix + name] = _like(parameter, value)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor on the device of a parameter, and sharded as it is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


class ShardedRunner(Runner):
    """mmengine's Runner with a model that is sharded by :func:`shard`; checkpoints are those of an unsharded run.

    mmengine's own FSDPStrategy needs another runner, a GPU a process, and cannot average weights.
    """

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """The model on its device, sharded."""
        return shard(model.to(get_device()))

    def _init_model_weights(self) -> None:
        """Nothing: our networks do it when they are built, of one seed in all processes."""

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Gather a checkpoint, as mmengine's, from all processes; the first one writes it."""
        own = dict(epoch=self.epoch + by_epoch, iter=self.iter + (not by_epoch), cfg=self.cfg.pretty_text)
        own |= dict(seed=self.seed, experiment_name=self.experiment_name, mmengine_version=mmengine.__version__)
        own |= dict(time=time.strftime("%Y%m%d_%H%M%S"), dataset_meta=self.train_dataloader.dataset.metainfo)
        checkpoint = dict(meta=own | (meta or {}), message_hub=self.message_hub.state_dict())
        checkpoint["state_dict"] = self.model.state_dict()
        if save_optimizer:
            checkpoint["optimizer"] = self.optim_wrapper.state_dict()
        if save_param_scheduler and self.param_schedulers is not None:
            checkpoint["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers]
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        for part in ("state_dict", "ema_state_dict", "optimizer"):
            if part in checkpoint:
                checkpoint[part] = tree_map(_gathered, checkpoint[part])
        if is_main_process():
            save_checkpoint(checkpoint, f"{out_dir}/{filename}", backend_args=backend_args)

    def load_checkpoint(self, *args: Any, **options: Any) -> dict:
        """As mmengine's, and the optimiser's state is sharded as the parameters are."""
        checkpoint = super().load_checkpoint(*args, **options)
        states = checkpoint.get("optimizer", {}).get("state", {})
        for i, parameter in enumerate(self.model.parameters()):
            for name, value in states.get(i, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    states[i][name] = _like(parameter, value)
        return checkpoint


def _gathered(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if isinstance(value, Tensor) else value
