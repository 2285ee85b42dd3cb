"""Training and test runs of any task: configs from the command line, and mmengine's Runner made of them."""

import argparse
import difflib
import inspect
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn
from torch.utils.data import Dataset

from mambavision.engine.checkpoint import CheckpointError, allow_mmengine_globals
from mambavision.engine.files import check_folder
from mambavision.engine.hooks import DivergedError, InitialWeightsHook, ResumedRunHook, unwrapped
from mambavision.engine.memory import is_out_of_memory
from mambavision.engine.photos import DatasetError
from mambavision.engine.sharded import ShardedRunner
from mambavision.engine.weights import build_from_checkpoint, check_fits, fitting_tensors

Task = Literal["detection", "restoration", "diffusion"]

_TOOLS: dict[Task, str] = {
    "detection": "tools/detect.py",
    "restoration": "tools/publish.py, then tools/restore.py",
    "diffusion": "tools/sample.py",
}

_READ_BY_RUNNER = ("compile", "find_unused_parameters", "model_wrapper_cfg", "sync_bn")  # beside its arguments

Check = Callable[[nn.Module, Dataset], None]
"""Raises ValueError if a model and a data set do not fit each other."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that train and test have in common, whatever the task."""
    parser.add_argument("config", help="config file, such as configs/mamba_yolo/mamba_yolo_debug.py")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/<config name>)")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--cfg-options", nargs="+", action=_KeyValues, help="KEY=VALUE pairs to override in the config")
    parser.add_argument("--data-root", help="folder of the data set, in place of the config's")


class _KeyValues(DictAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} takes KEY=VALUE pairs, got {value!r}")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, RecursionError):  # mmengine's, of brackets that are not closed, and of dict(...)
            parser.error(
                f"{option_string} takes numbers, words, lists [a,b] and tuples (a,b), not {' '.join(values)!r}; a "
                "part of a dict is named by dots, as in model.network.depth=3"
            )


def read_config(path: str | Path) -> Config:
    """Read a config file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read, or lacks a part that a run needs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config at {path}")
    try:
        cfg = Config.fromfile(path)  # which ignores its format_python_code
        # where a path in it is long, mmengine would format the text for a second, for every checkpoint
        object.__setattr__(cfg, "_format_python_code", False)
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise ValueError(f"cannot read the config {path}: {type(error).__name__}: {error}") from error
    missing = [part for part in ("model", "train_dataloader", "test_dataloader", "optim_wrapper") if part not in cfg]
    if missing:
        raise ValueError(f"{path} is no whole config: it lacks {', '.join(missing)}")
    return cfg


def task_of(args: argparse.Namespace) -> Task:
    """The task of ``args.config``: its ``task``, or detection where it does not say.

    Raises:
        FileNotFoundError, NotADirectoryError: If the config does not exist, or the work directory is a file.
        ValueError: If the config cannot be read, or is of an unknown task.
    """
    if getattr(args, "work_dir", None):
        check_folder(args.work_dir, "--work-dir")
    task = read_config(args.config).get("task", "detection")
    if task not in get_args(Task):
        raise ValueError(f"{args.config}: task must be one of {', '.join(get_args(Task))}, got {task!r}")
    return task


def check_task(cfg: Config, path: str | Path, task: Task) -> None:
    """Raise ValueError if a config is of another task than a tool's."""
    found = cfg.get("task", "detection")
    if found != task:
        raise ValueError(f"{path} is a config for {found}, not for {task}: see {_TOOLS[found]}")


def load_config(args: argparse.Namespace, adapt: Callable[[Config], None] | None = None) -> Config:
    """Read the config that the arguments name and apply the other arguments of :func:`add_config_arguments` to it.

    Args:
        args: The parsed arguments.
        adapt: Applies a task's own arguments, after the data root has been replaced and before ``--cfg-options``.

    Raises:
        FileNotFoundError: If the config does not exist.
        NotADirectoryError: If the work directory is a file.
        ValueError: If the config cannot be read, has no data root to replace or no entry that an option overrides, or
            ``adapt`` raises it.
    """
    if args.work_dir:
        check_folder(args.work_dir, "--work-dir")
    cfg = read_config(args.config)
    if args.data_root:
        if not cfg.get("data_root"):
            raise ValueError(f"{args.config} has no data_root that --data-root could replace; leave it out")
        _replace_prefix(cfg._cfg_dict, str(cfg.get("data_root", "")).rstrip("/"), args.data_root.rstrip("/"))
    if adapt:
        adapt(cfg)
    _merge(cfg, args.cfg_options or {})
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    check_folder(cfg.work_dir, "--work-dir")
    for stage in ("train", "val", "test"):
        loader = cfg.get(f"{stage}_dataloader")
        if loader and "persistent_workers" in loader and not loader.get("num_workers"):
            loader.persistent_workers = False  # torch refuses it without workers
    cfg.launcher = args.launcher
    return cfg


def _merge(cfg: Config, options: dict) -> None:
    """Override values of a config; an entry that neither it has nor a runner reads is refused: nobody would notice."""
    known = {*cfg, *inspect.signature(Runner).parameters, *_READ_BY_RUNNER}
    for key in options:
        first = key.partition(".")[0]
        if first not in known:
            near = difflib.get_close_matches(first, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ", nor does a run read one"
            raise ValueError(f"--cfg-options {key}: the config has no {first}{hint}")
    nested = [name for name in options if isinstance(cfg.get(name), dict)]
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:  # a list is shorter, a value has no entries
        raise ValueError(f"--cfg-options do not fit the config: {str(error.args[0]).partition('. ')[0]}") from error
    for name in nested:
        if not isinstance(cfg[name], dict | None):
            raise ValueError(f"--cfg-options {name}={cfg[name]}: the config has entries there, give {name}.ENTRY=VALUE")


def newest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that a run in a work directory would be resumed from, None where there is none yet."""
    latest = find_latest_checkpoint(work_dir) if Path(work_dir).is_dir() else None
    return latest and str(Path(work_dir, Path(latest).name))  # the folder may have been moved


def train(
    cfg: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    load_from: str | None = None,
    amp: Literal["bf16", "fp16"] | None = None,
    seed: int | None = None,
    sharded: bool = False,
    check: Check | None = None,
) -> Runner:
    """Train a config; returns the finished runner.

    Args:
        cfg: Config with ``work_dir`` and ``launcher``.
        resume: Go on from the newest checkpoint of the work directory, or start where there is none, and say so.
        overwrite: Remove the checkpoints of an earlier run in the work directory when this one begins.
        load_from: Checkpoint or published weights whose fitting tensors a run that is not resumed starts from.
        amp: Mixed precision.
        seed: Seed of weights, data order and augmentation.
        sharded: Spread the weights over the processes, by :class:`~mambavision.engine.sharded.ShardedRunner`.
        check: Called with the model and the training and validation sets before training starts.

    Raises:
        FileNotFoundError: If ``load_from`` does not exist.
        FileExistsError: If the work directory has checkpoints of an earlier run, neither to be resumed nor overwritten.
        DatasetError: If the data cannot be used.
        DivergedError: If the loss is no longer a number.
        ValueError: If the config cannot be run, fp16 is asked for without a GPU, or the weights do not fit the
            network, or ``check`` raises it.
    """
    allow_mmengine_globals()
    if load_from and not Path(load_from).is_file():
        raise FileNotFoundError(f"no weights at {load_from}")
    # the epoch and the rate are functions of the checkpoint's iteration: a resumed schedule goes on as it would have
    latest = newest_checkpoint(cfg.work_dir) if resume else None
    start = None if latest else (load_from or cfg.get("load_from"))
    cfg.resume, cfg.load_from = latest is not None, latest
    if amp == "fp16" and not torch.cuda.is_available():
        raise ValueError("--amp fp16 needs a GPU (its small range needs loss scaling on CUDA); use --amp bf16 here")
    if amp == "fp16":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype="float16", loss_scale="dynamic")
    elif amp == "bf16":
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"
    if seed is not None:
        cfg.randomness = dict(seed=seed)
    if not (resume or overwrite) and (there := newest_checkpoint(cfg.work_dir)):
        raise FileExistsError(
            f"{there} is of an earlier run: --resume goes on with it, --overwrite replaces it, or name another "
            "--work-dir"
        )
    _check_data_root(cfg, cfg.train_dataloader)
    optimizer = cfg.optim_wrapper.get("optimizer", {}).get("type")
    if isinstance(optimizer, str) and OPTIMIZERS.get(optimizer) is None:
        raise ValueError(f"optim_wrapper.optimizer.type={optimizer!r}: no such optimizer")
    with _build_runner(cfg, ShardedRunner if sharded else Runner) as runner:
        model = unwrapped(runner.model)
        if latest:
            check_fits(model, latest)
            runner.register_hook(ResumedRunHook())
        elif start:
            runner.register_hook(InitialWeightsHook(fitting_tensors(model, start)))
        for loop in (runner.train_loop, runner.val_loop):  # built here, so that errors of the data come before training
            if check and loop is not None:
                check(model, loop.dataloader.dataset)
        if resume and not latest:  # a mistyped work directory, or a session's first run
            message = f"no checkpoint in {cfg.work_dir}: starting from the beginning"
            print_log(message, logger="current", level=logging.WARNING)
        if overwrite and not resume and is_main_process():
            _remove_checkpoints(Path(cfg.work_dir))
        _run(runner)
    return runner


def _remove_checkpoints(folder: Path) -> None:
    for path in (*folder.glob("*.pth"), folder / "last_checkpoint"):
        if re.fullmatch(r"((best_.+_)?(iter|epoch)_\d+\.pth|last_checkpoint)", path.name):
            path.unlink(missing_ok=True)


def _run(runner: Runner) -> None:
    """Train; a ValueError of an iteration is not the user's doing, unless it is of a kind that says so."""
    try:
        runner.train()
    except (DatasetError, CheckpointError, DivergedError):
        raise
    except ValueError as error:  # show the traceback
        if not _has_started(runner):
            raise
        raise RuntimeError(f"training stopped: {error}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"memory ran out in training{_memory_taken()}: take smaller batches, or a smaller network"
        ) from error


class _StartHook(Hook):
    """Knows whether the training loop has begun; optimiser, schedules and averages are built before it does."""

    priority = "LOWEST"
    started = False

    def before_train(self, runner: Runner) -> None:
        self.started = True


def _has_started(runner: Runner) -> bool:
    return any(hook.started for hook in runner.hooks if isinstance(hook, _StartHook))


def train_iterations(
    cfg: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    load_from: str | None = None,
    amp: Literal["bf16", "fp16"] | None = None,
    seed: int | None = None,
    sharded: bool = False,
    max_seconds: float | None = None,
    check: Check | None = None,
) -> Runner:
    """:func:`train` for configs that count iterations, or for so many seconds.

    Args:
        cfg, resume, overwrite, load_from, amp, seed, sharded, check: As there.
        max_seconds: Train so long, by :class:`~mambavision.engine.hooks.WallTimeHook`, in place of the config's
            iterations and schedule of the learning rate.

    Raises:
        ValueError: Besides, if a part of the learning-rate schedule begins after the last iteration, or iterations or
            seconds are not positive numbers.
    """
    if max_seconds is not None:
        if not 0 < max_seconds < float("inf"):
            raise ValueError(f"--max-seconds {max_seconds:g}: name how many seconds to train, more than 0")
        if cfg.get("launcher", "none") != "none" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"--max-seconds trains in one process, torchrun started {os.environ['WORLD_SIZE']}")
        cfg.param_scheduler = None
        cfg.train_cfg.max_iters = 10**9
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="WallTimeHook", seconds=max_seconds)]
    for name in ("max_iters", "val_interval"):
        count = cfg.train_cfg.get(name, 1)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"train_cfg.{name}={count!r}: iterations are a whole number, at least 1")
    for part in cfg.get("param_scheduler") or ():
        begin, last = part.get("begin", 0), cfg.train_cfg.max_iters
        if begin >= last:
            raise ValueError(
                f"{part.type} begins at iteration {begin}, the run has {last}: give the schedule in the config, or "
                f"--cfg-options param_scheduler.0.end=N param_scheduler.1.begin=N with an N below {last}"
            )
    options = dict(resume=resume, overwrite=overwrite, load_from=load_from, amp=amp, seed=seed, sharded=sharded)
    return train(cfg, **options, check=check)


def refuse_detection_arguments(args: argparse.Namespace, task: str) -> None:
    """Raise ValueError if arguments for annotated photos are given to another task."""
    for name in ("train_json", "val_json", "train_images", "val_images"):
        if getattr(args, name, None):
            raise ValueError(f"--{name.replace('_', '-')} is for detection; {task} takes --data-root FOLDER")


def test(cfg: Config, checkpoint: str | Path, *, check: Check | None = None) -> dict[str, float]:
    """Evaluate a checkpoint (or published weights) on a config's test set; returns the metrics.

    Args:
        cfg: Config with ``work_dir`` and ``launcher``.
        checkpoint: The weights.
        check: Called with the model and the test set before the test starts.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it does not fit the config's network, or ``check`` raises it.
        DatasetError: If the data cannot be used.
    """
    # strict, unlike mmengine's loading, which only logs what does not fit
    state = build_from_checkpoint(cfg, checkpoint)[0].state_dict()
    _check_data_root(cfg, cfg.test_dataloader)
    with _build_runner(cfg) as runner:
        model = unwrapped(runner.model)
        if check:
            check(model, runner.test_loop.dataloader.dataset)
    model.load_state_dict(state)
    return runner.test()


def _memory_taken() -> str:
    """Who has the GPU's memory, for a message: other programs may have most of it."""
    if not torch.cuda.is_available():
        return ""
    (free, total), ours = torch.cuda.mem_get_info(), torch.cuda.memory_reserved()
    others = total - free - ours
    return f" (of the GPU's {total / 1e9:.1f} GB this run has {ours / 1e9:.1f}, others {others / 1e9:.1f})"


@contextmanager
def _build_runner(cfg: Config, kind: type[Runner] = Runner) -> Iterator[Runner]:
    """Build the runner; on an error here or in the body, remove the work directory if it is new and without a run."""
    work_dir = Path(cfg.work_dir)
    new_folders = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]
    _start_processes(cfg)
    runner = None
    try:
        try:
            runner = kind.from_cfg(cfg)
            runner.register_hook(_StartHook())
            yield runner
        except (TypeError, KeyError, AssertionError) as error:  # an argument or a type that does not exist
            if runner and _has_started(runner):
                raise
            raise ValueError(f"the config cannot be built: {str(error) or type(error).__name__}") from error
    except BaseException:
        if runner and _has_started(runner):
            raise
        if new_folders and is_main_process():
            shutil.rmtree(work_dir, ignore_errors=True)
            with suppress(OSError):  # another run's folder is in it
                for folder in new_folders[1:]:
                    folder.rmdir()
        raise


def _check_data_root(cfg: Config, loader: ConfigDict) -> None:
    """Raise DatasetError, with the config's ``data_advice``, if a loader reads from a ``data_root`` that is not there.

    Data sets say so too, but after pages of mmengine's log.
    """
    root = str(cfg.get("data_root") or "").rstrip("/")
    if root and not Path(root).exists() and any(text.startswith(root) for text in _strings(loader)):
        advice = cfg.get("data_advice", "name yours with --data-root")
        raise DatasetError(f"{root}: no such folder of data; {advice}")


def _strings(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _strings(value)


def _start_processes(cfg: Config) -> None:
    """Join torchrun's process group where there is no CUDA; mmengine would insist on it."""
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", broadcast_buffers=False, device_ids=None)


def _replace_prefix(node: ConfigDict | list, old: str, new: str) -> None:
    """Replace the leading folder ``old`` of all strings of a config."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            _replace_prefix(value, old, new)
        elif isinstance(value, str) and old and (value.rstrip("/") == old or value.startswith(old + "/")):
            node[key] = new + value[len(old) :]
