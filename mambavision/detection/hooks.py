"""Training hooks of the YOLO recipe: the learning-rate schedule, the end of mosaic, the late L1 loss."""

import numpy as np
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mambavision.detection.transforms import LetterBox, LoadPhoto, MosaicAffine
from mambavision.engine.hooks import unwrapped


@HOOKS.register_module()
class WarmupLinearDecayHook(Hook):
    """Set learning rate and momentum of every iteration: a warm-up, then a linear decay.

    With e the epoch, E their number, d = decay_part, i the iteration and W = max(round(warmup_epochs * iterations an
    epoch), warmup_min_iters):

        lr(e) = initial_lr * (1 - (1 - final_lr_ratio) * max(0, 1 - (1 - e / E) / d))

    For i <= W the rate goes linearly from 0 (from ``warmup_bias_lr`` for biases) to lr(e), and the momentum from
    ``warmup_momentum`` to its configured value. Both depend on (e, i) alone, so a resumed run needs no saved state.
    Replaces ``param_scheduler``; needs the groups of
    :class:`~mambavision.detection.optim.MambaYOLOOptimWrapperConstructor` and an epoch-based loop.

    Args:
        warmup_epochs: Length of the warm-up in epochs.
        warmup_min_iters: Least length of the warm-up in iterations.
        warmup_bias_lr: Rate the biases start from.
        warmup_momentum: Momentum at the start.
        final_lr_ratio: Rate of the last epoch (had there been one more) over the first's.
        decay_part: Part of the run, at its end, in which the rate falls; before, it is constant and E may still change.
        by_epoch: The rate falls once an epoch, as published; False counts e in fractions of an epoch, for runs of a few
            long ones.

    Raises:
        ValueError: If ``decay_part`` is not in (0, 1].
    """

    priority = "HIGHEST"  # before RuntimeInfoHook reads the rate it logs

    def __init__(
        self,
        *,
        warmup_epochs: float = 3.0,
        warmup_min_iters: int = 100,
        warmup_bias_lr: float = 0.1,
        warmup_momentum: float = 0.8,
        final_lr_ratio: float = 0.01,
        decay_part: float = 1.0,
        by_epoch: bool = True,
    ) -> None:
        if not 0 < decay_part <= 1:
            raise ValueError(f"decay_part={decay_part} must be above 0 and at most 1")
        self.warmup_epochs = warmup_epochs
        self.warmup_min_iters = warmup_min_iters
        self.warmup_bias_lr = warmup_bias_lr
        self.warmup_momentum = warmup_momentum
        self.final_lr_ratio = final_lr_ratio
        self.decay_part = decay_part
        self.by_epoch = by_epoch

    def before_train(self, runner: Runner) -> None:
        """Refuse optimisers whose groups do not say what they hold."""
        if not all("kind" in group for group in runner.optim_wrapper.optimizer.param_groups):
            raise ValueError(
                "WarmupLinearDecayHook needs optim_wrapper.constructor='MambaYOLOOptimWrapperConstructor' in the config"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Write this iteration's rate and momentum into the optimiser."""
        epoch_length = len(runner.train_dataloader)
        warmup_iters = max(round(self.warmup_epochs * epoch_length), self.warmup_min_iters)
        epoch = runner.epoch if self.by_epoch else runner.iter / epoch_length
        decayed = max(0.0, 1 - (1 - epoch / runner.max_epochs) / self.decay_part)
        decay = 1 - (1 - self.final_lr_ratio) * decayed
        wrapper = runner.optim_wrapper
        momentum = wrapper.optimizer.defaults.get("momentum")
        for group in wrapper.param_groups:
            lr = group.get("initial_lr", wrapper.optimizer.defaults["lr"]) * decay
            start_lr = self.warmup_bias_lr if group.get("kind") == "bias" else 0.0
            group["lr"] = float(np.interp(runner.iter, [0, warmup_iters], [start_lr, lr]))
            if momentum is not None:
                group["momentum"] = float(np.interp(runner.iter, [0, warmup_iters], [self.warmup_momentum, momentum]))


@HOOKS.register_module()
class CloseMosaicHook(Hook):
    """Train the last epochs on single photos: MosaicAffine gives way to LoadPhoto, LetterBox and the same affine map.

    mmdet's PipelineSwitchHook needs the second pipeline spelled out and the epoch's number, and misses the members of
    a ConcatDataset.

    Args:
        last_epochs: Epochs without mosaic at the end.
    """

    def __init__(self, *, last_epochs: int = 10) -> None:
        self.last_epochs = last_epochs

    def before_train_epoch(self, runner: Runner) -> None:
        """Change the pipelines once, also in a run resumed within the last epochs."""
        if runner.epoch < runner.max_epochs - self.last_epochs:
            return
        loader = runner.train_dataloader
        changed = [_close_mosaic(dataset) for dataset in _leaf_datasets(loader.dataset)]
        if any(changed):
            runner.logger.info(f"No mosaic from epoch {runner.epoch + 1} on.")
            loader._iterator = None  # persistent workers hold the old pipeline; the next epoch starts new ones


def _leaf_datasets(dataset: Dataset) -> list[Dataset]:
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    return [leaf for child in inner for leaf in _leaf_datasets(child)] if inner[0] is not None else [dataset]


def _close_mosaic(dataset: Dataset) -> bool:
    """Replace the mosaics of a dataset's pipeline; return whether there was one."""
    steps, closed = [], False
    for step in dataset.pipeline.transforms:
        if isinstance(step, MosaicAffine):
            closed = True
            steps += [LoadPhoto(with_boxes=True), LetterBox(step.size), step.affine]
        else:
            steps.append(step)
    dataset.pipeline.transforms = steps
    return closed


@HOOKS.register_module()
class YOLOXL1Hook(Hook):
    """Add YOLOX's L1 loss in the last epochs, as mmdet's YOLOXModeSwitchHook does besides changing mmdet's data sets.

    Args:
        last_epochs: Epochs with the L1 loss at the end.
    """

    def __init__(self, *, last_epochs: int) -> None:
        self.last_epochs = last_epochs

    def before_train_epoch(self, runner: Runner) -> None:
        """Switch the loss on."""
        model = unwrapped(runner.model)
        model.bbox_head.use_l1 = runner.epoch >= runner.max_epochs - self.last_epochs
