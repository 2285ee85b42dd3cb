"""Training hooks: checkpoints that survive a kill, losses read without waiting for the GPU, loss curves."""

import csv
import math
import os
import os.path as osp
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dist import all_reduce, get_world_size, is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook, RuntimeInfoHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from mambavision.engine.checkpoint import CheckpointError
from mambavision.engine.files import atomic_path


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a data-parallel wrapper, or the model itself."""
    return model.module if is_model_wrapper(model) else model


@register_backend("atomic_local", force=True)
class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, with every write whole or absent: temporary file, fsync, rename."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file; a reader sees the old content or the new one, never a part."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        with open(unfinished, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text to a file, whole or not at all."""
        self.put(obj.encode(encoding), filepath)


class _PostponingBackend(AtomicLocalBackend):
    """Only notes what `remove` is asked for."""

    def __init__(self) -> None:
        self.outdated: set[str] = set()

    def remove(self, filepath: str | Path) -> None:
        self.outdated.add(str(filepath))


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """CheckpointHook that keeps a loadable latest checkpoint at every moment, also through `kill -9`.

    A file is complete before it has its name, `last_checkpoint` changes after the file that it names is complete, and
    outdated or no longer best checkpoints are deleted last (a kill before that leaves them behind). Arguments are those
    of mmengine's CheckpointHook without `backend_args` and `file_client_args`: local folders only.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs, backend_args={"backend": "atomic_local"})

    def before_train(self, runner) -> None:
        super().before_train(runner)
        self.file_backend = _PostponingBackend()

    def after_train_epoch(self, runner) -> None:
        super().after_train_epoch(runner)
        self._remove_outdated()

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        super().after_train_iter(runner, *args, **kwargs)
        self._remove_outdated()

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        super().after_val_epoch(runner, metrics)
        self._remove_outdated()

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        # mmengine's own, but for its plain write of last_checkpoint
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts and is_main_process():
                self.file_backend.remove(osp.join(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids[0])))
            self.keep_ckpt_ids.append(step)  # a deque of max_keep_ckpts: drops its first
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = osp.join(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            self.file_backend.put_text(self.last_ckpt, osp.join(runner.work_dir, "last_checkpoint"))

    def _remove_outdated(self) -> None:
        best = {getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()}
        for path in self.file_backend.outdated - best - {self.last_ckpt}:
            Path(path).unlink(missing_ok=True)
        self.file_backend.outdated.clear()


class DivergedError(ValueError):
    """A training whose losses are no longer numbers."""


@HOOKS.register_module()
class DeferredRuntimeInfoHook(RuntimeInfoHook):
    """RuntimeInfoHook that reads the losses of ``interval`` iterations at once.

    mmengine's waits for the GPU in every iteration to read its losses. Here they stay on the device until iteration
    ``interval``, 2 ``interval`` ..., a validation, a checkpoint, or the end; then every single one is recorded.
    Whatever reads them in an iteration, such as LoggerHook and :class:`LossCurveHook`, wants an interval that is a
    multiple of this one. Losses are means over the processes. An optimiser wrapper's ``grad_norm`` is recorded too.

    Args:
        interval: Iterations between two readings; 1 waits for every loss.

    Raises:
        ValueError: If ``interval`` is less than 1.
        DivergedError: In training, if all losses that are read at once, ten or ``interval``, are not finite.
    """

    def __init__(self, *, interval: int = 50) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} must be at least 1")
        self.interval = interval
        self._pending: list[dict[str, Tensor]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Keep this iteration's losses, and read all that were kept every ``interval`` iterations."""
        norm = getattr(runner.optim_wrapper, "grad_norm", None)
        values = {name: torch.as_tensor(value).detach() for name, value in (outputs or {}).items()}
        for value in values.values():
            all_reduce(value, "mean")  # nothing in one process
        if norm is not None:
            values["grad_norm"] = torch.as_tensor(norm).detach()
        self._pending.append(values)
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self._read(runner)

    def before_val(self, runner: Runner) -> None:
        """Read what was kept, besides what RuntimeInfoHook does."""
        self._read(runner)
        super().before_val(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Read what was kept, so that a resumed run has every loss before it."""
        if self._pending:
            self._read(runner)
            checkpoint["message_hub"] = runner.message_hub.state_dict()

    def _read(self, runner: Runner) -> None:
        pending, self._pending = self._pending, []
        tensors = [value.float() for values in pending for value in values.values()]
        if tensors:
            numbers = iter(torch.stack(tensors).tolist())
            rows = [{name: next(numbers) for name in values} for values in pending]
            # a loss that is scaled may overflow once, and the step is left out
            if not any(math.isfinite(row.get("loss", 0.0)) for row in rows) and len(rows) >= min(self.interval, 10):
                raise DivergedError(
                    f"the loss of iteration {runner.iter + 1} is {rows[-1]['loss']}: training has diverged and stops, "
                    "take a lower learning rate (optim_wrapper.optimizer.lr); checkpoints before it stay"
                )
            for row in rows:
                for name, number in row.items():
                    runner.message_hub.update_scalar(f"train/{name}", number)


@HOOKS.register_module()
class WallTimeHook(Hook):
    """Train for a number of seconds instead of iterations: the rate falls with the time, and at its end training ends.

    With t the part of the time that is spent and i the iteration:

        lr = initial_lr * min(1, (i + 1) / warmup) * (final_lr_ratio + (1 - final_lr_ratio) * (1 + cos(pi t)) / 2)

    Time counts from the first iteration, validations included but for the last, and over all sessions of a run that is
    resumed. Replaces ``param_scheduler``; one process, and more ``max_iters`` than fit. Checkpoints, logs and the last
    validation are those of an ordinary end.

    Args:
        seconds: How long to train.
        warmup: Iterations in which the rate rises.
        final_lr_ratio: Rate at the end over the initial one.

    Raises:
        ValueError: If ``seconds`` is not positive or ``warmup`` less than 1; at the start, in several processes.
    """

    priority = 55  # after IterTimerHook, whose ETA is of iterations; before LoggerHook

    def __init__(self, seconds: float, *, warmup: int = 200, final_lr_ratio: float = 1e-3) -> None:
        if not seconds > 0 or warmup < 1:
            raise ValueError(f"seconds={seconds} must be positive, warmup={warmup} at least 1")
        self.seconds, self.warmup, self.final_lr_ratio = seconds, warmup, final_lr_ratio

    def before_train(self, runner: Runner) -> None:
        """Start the clock at what earlier sessions have spent; if that is all, there is no iteration."""
        if get_world_size() > 1:
            raise ValueError(f"training by wall time needs one process, there are {get_world_size()}")
        spent = runner.message_hub.runtime_info.get("train_seconds", 0.0)
        self._start = time.monotonic() - spent
        if spent >= self.seconds:
            runner.train_loop._max_iters = runner.iter  # no iteration is left
            runner.logger.warning(
                f"the checkpoint is of {spent:.0f} s of training, the run has {self.seconds:g}: nothing is left to "
                "train; --max-seconds N with a larger N goes on"
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Write the rate into the optimiser; when time is up, make this iteration the last."""
        spent = time.monotonic() - self._start
        runner.message_hub.update_info("train_seconds", spent)
        part = min(spent / self.seconds, 1.0)
        fall = self.final_lr_ratio + (1 - self.final_lr_ratio) * (1 + math.cos(math.pi * part)) / 2
        for group in runner.optim_wrapper.param_groups:
            initial = group.setdefault("initial_lr", group["lr"])
            group["lr"] = initial * min(1.0, (runner.iter + 1) / self.warmup) * fall
        if spent >= self.seconds:
            runner.train_loop._max_iters = runner.iter + 1

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Tell the logger what time is left."""
        runner.message_hub.update_info("eta", max(0.0, self.seconds - (time.monotonic() - self._start)))


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


class ResumedRunHook(Hook):
    """Say so where a checkpoint has had all iterations of the config, or its learning rates are not the config's."""

    def before_train(self, runner: Runner) -> None:
        """Compare the checkpoint, which is read now, with the config.

        Raises:
            CheckpointError: If it is of a run for a given time, and this one is not: its rate fell with the time.
        """
        loop, timed = runner.train_loop, any(isinstance(hook, WallTimeHook) for hook in runner.hooks)
        if "train_seconds" in runner.message_hub.runtime_info and not timed:
            raise CheckpointError(
                f"the run in {runner.work_dir} is one by --max-seconds: resume it by that, or go on from its weights "
                "by --load-from, in another work directory"
            )
        for part, scheduler in zip(
            runner.cfg.get("param_scheduler") or (), runner.param_schedulers or (), strict=False
        ):
            last = loop.max_epochs if scheduler.by_epoch else loop.max_iters
            if "end" not in part and scheduler.end < last:
                runner.logger.warning(
                    f"the checkpoint's learning rate falls until {scheduler.end} and stays there, the run ends at "
                    f"{last}: for a new schedule go on from its weights by --load-from, in another work directory"
                )
        rates = [group.get("initial_lr", group["lr"]) for group in runner.optim_wrapper.param_groups]
        wanted = runner.cfg.get("optim_wrapper", {}).get("optimizer", {}).get("lr")
        if wanted is not None and rates and not any(math.isclose(wanted, rate) for rate in rates):
            runner.logger.warning(
                f"the checkpoint's learning rate is {max(rates):g} and stays so, the config's is {wanted:g}: for "
                "another one go on from its weights by --load-from, in another work directory"
            )
        if loop.iter >= loop.max_iters:
            unit = "epochs" if isinstance(loop, EpochBasedTrainLoop) else "iters"
            runner.logger.warning(
                f"the checkpoint is of iteration {loop.iter}, the run has {loop.max_iters}: nothing is left to train; "
                f"--cfg-options train_cfg.max_{unit}=N with a larger N goes on"
            )


@HOOKS.register_module()
class LossCurveHook(Hook):
    """Write ``loss_curve.csv`` and ``loss_curve.png`` into the work directory, anew after every epoch and validation.

    The table is also written with every checkpoint, so that a run that goes on from it finds its rows.

    A row of the table is a mean over ``interval`` iterations (iter, epoch, lr, losses) or, with its metrics filled in,
    one validation. A resumed run drops the rows past its checkpoint and goes on in the same table.

    Args:
        interval: Iterations a row.
        metrics: Validation metrics to draw, where they occur, by what follows the last "/" of their names.

    Raises:
        ValueError: If ``interval`` is less than 1.
    """

    priority = "LOW"  # after RuntimeInfoHook has filled the message hub

    def __init__(
        self,
        *,
        interval: int = 10,
        metrics: Sequence[str] = ("bbox_mAP", "bbox_mAP_50", "mAP", "PSNR"),
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
            counts = ("iter", "epoch")
            rows = [{**row, **{name: int(row[name]) for name in counts if name in row}} for row in rows]
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
            # a resumed run may have to repeat its checkpoint's
            self.rows = [row for row in self.rows if row["iter"] < runner.iter or "lr" in row]
            self.rows.append({"iter": runner.iter, "epoch": runner.epoch, **numbers})
            self._write(Path(runner.work_dir))

    @master_only
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write the table."""
        self._write_table(Path(runner.work_dir))

    def _write(self, folder: Path) -> None:
        if self.rows:
            self._write_table(folder)
            with atomic_path(folder / "loss_curve.png") as temporary:
                self._draw(temporary)

    def _write_table(self, folder: Path) -> None:
        if not self.rows:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_path(folder / "loss_curve.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def _draw(self, path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = dict.fromkeys(name for row in self.rows for name in row)
        losses = [name for name in names if "loss" in name]
        metrics = [name for name in names if name.rpartition("/")[2] in self.metrics]
        figure = Figure(figsize=(8, 6 if metrics else 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2 if metrics else 1, 1, sharex=True, squeeze=False)[:, 0]

        def curve(axis, name: str, **style: object) -> None:
            points = [(row["iter"], row[name]) for row in self.rows if name in row]
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=name, **style)

        for name in losses:
            curve(axes[0], name, linewidth=2 if name == "loss" else 1)
        positive = all(row.get(name, 0) >= 0 for row in self.rows for name in losses)
        axes[0].set(ylabel="loss", ylim=(0, None) if positive else None)
        rate = axes[0].twinx()
        curve(rate, "lr", color="0.6", linestyle=":")
        rate.set(ylabel="learning rate", ylim=(0, None))
        for name in metrics:
            curve(axes[1], name)
        if metrics:
            parts = all(0 <= row.get(name, 0) <= 1 for row in self.rows for name in metrics)  # AP, not dB
            axes[1].set(ylabel="metric on the validation set", ylim=(0, 1) if parts else None)
        axes[-1].set(xlabel="iteration")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(loc="best", frameon=False)
        figure.savefig(path, dpi=120, format="png")
