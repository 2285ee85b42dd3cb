"""Training hooks that mmengine and mmdet lack: the YOLO learning-rate schedule and loss curves."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmdet.registry import HOOKS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from mambavision.detection.transforms import LetterBox, LoadPhoto, MosaicAffine
from mambavision.engine import hooks as _engine_hooks  # noqa: F401 (registers AtomicCheckpointHook)
from mambavision.engine.files import atomic_path


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model


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


class InitialWeightsHook(Hook):
    """Load tensors into the model before the first iteration, after mmengine has initialised it.

    Args:
        state: Names and tensors of the model, not necessarily all; :func:`~.weights.fitting_tensors` finds them.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def before_train(self, runner: Runner) -> None:
        """Load them; averaged weights start as a copy after the first iteration."""
        model = unwrapped(runner.model)
        model.load_state_dict(self.state, strict=False)
        self.state = {}


@HOOKS.register_module()
class LossCurveHook(Hook):
    """Write ``loss_curve.csv`` and ``loss_curve.png`` into the work directory, anew after every epoch.

    A row of the table is a mean over ``interval`` iterations (iter, epoch, lr, losses) or, with its metrics filled in,
    one validation. A resumed run drops the rows past its checkpoint and goes on in the same table.

    Args:
        interval: Iterations a row.
        metrics: Names of the validation metrics to draw, where they occur.

    Raises:
        ValueError: If ``interval`` is less than 1.
    """

    priority = "LOW"  # after RuntimeInfoHook has filled the message hub

    def __init__(
        self,
        *,
        interval: int = 10,
        metrics: Sequence[str] = ("coco/bbox_mAP", "coco/bbox_mAP_50", "pascal_voc/mAP"),
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        self.interval = interval
        self.metrics = tuple(metrics)
        self.rows: list[dict[str, float]] = []

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Take over the rows of the run that is being resumed."""
        path = Path(runner.work_dir) / "loss_curve.csv"
        if runner.iter > 0 and path.is_file():
            with open(path, newline="") as file:
                rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["iter"] <= runner.iter]

    @master_only
    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Add a row every ``interval`` iterations."""
        if not (self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)):
            return
        scalars = runner.message_hub.log_scalars
        lr = scalars.get("train/base_lr", scalars["train/lr"]).current()
        losses = {
            name.removeprefix("train/"): float(history.mean(self.interval))
            for name, history in scalars.items()
            if name.startswith("train/") and "loss" in name
        }
        self.rows.append({"iter": runner.iter + 1, "epoch": runner.epoch + 1, "lr": float(lr), **losses})

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        """Write both files."""
        self._write(Path(runner.work_dir))

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Add a row of metrics and write both files, when training."""
        numbers = {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        if self.rows and numbers:
            self.rows.append({"iter": runner.iter, "epoch": runner.epoch, **numbers})
            self._write(Path(runner.work_dir))

    def _write(self, folder: Path) -> None:
        if not self.rows:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_path(folder / "loss_curve.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        with atomic_path(folder / "loss_curve.png") as temporary:
            self._draw(temporary)

    def _draw(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        losses = [name for name in dict.fromkeys(name for row in self.rows for name in row) if "loss" in name]
        metrics = [name for name in self.metrics if any(name in row for row in self.rows)]
        figure = Figure(figsize=(8, 6 if metrics else 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2 if metrics else 1, 1, sharex=True, squeeze=False)[:, 0]

        def curve(axis, name: str, **style: object) -> None:
            points = [(row["iter"], row[name]) for row in self.rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=name, **style)

        for name in losses:
            curve(axes[0], name, linewidth=2 if name == "loss" else 1)
        axes[0].set(ylabel="loss", ylim=(0, None))
        rate = axes[0].twinx()
        curve(rate, "lr", color="0.6", linestyle=":")
        rate.set(ylabel="learning rate", ylim=(0, None))
        for name in metrics:
            curve(axes[1], name)
        if metrics:
            axes[1].set(ylabel="metric on the validation set", ylim=(0, 1))
        axes[-1].set(xlabel="iteration")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(loc="best", frameon=False)
        figure.savefig(path, dpi=120, format="png")
