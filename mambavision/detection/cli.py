"""What the detection tools share: configs from the command line, training and test runs, loading an inferencer."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dist import is_main_process
from mmengine.runner import Runner, find_latest_checkpoint

from mambavision.detection.datasets import coco_classes
from mambavision.detection.hooks import InitialWeightsHook, unwrapped
from mambavision.detection.inferencer import DetInferencer
from mambavision.detection.weights import check_fits, fitting_tensors, from_checkpoint
from mambavision.engine.cli import choose_device
from mambavision.engine.files import check_folder
from mambavision.engine.photos import DatasetError


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that train and test have in common."""
    parser.add_argument("config", help="config file, such as configs/mamba_yolo/mamba_yolo_debug.py")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/<config name>)")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--cfg-options", nargs="+", action=_KeyValues, help="KEY=VALUE pairs to override in the config")
    parser.add_argument("--data-root", help="folder of the data set, in place of the config's")
    parser.add_argument("--train-json", help="COCO JSON to train on, relative to --data-root; brings its class names")
    parser.add_argument("--val-json", help="COCO JSON to validate and test on, relative to --data-root")
    parser.add_argument("--train-images", help="folder of the training photos, relative to --data-root")
    parser.add_argument("--val-images", help="folder of the validation photos, relative to --data-root")


class _KeyValues(DictAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} takes KEY=VALUE pairs, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name and apply the other arguments of :func:`add_config_arguments` to it.

    Raises:
        FileNotFoundError: If the config does not exist.
        NotADirectoryError: If the work directory is a file.
        ValueError: If the config cannot be read, or the JSON files do not fit it.
    """
    if args.work_dir:
        check_folder(args.work_dir, "--work-dir")
    cfg = _read_config(args.config)
    if args.data_root:
        _replace_prefix(cfg._cfg_dict, str(cfg.get("data_root", "")).rstrip("/"), args.data_root.rstrip("/"))
    root = Path(cfg.get("data_root", "."))
    if args.train_json:
        _use_coco_json(cfg.train_dataloader.dataset, root, args.train_json, args.train_images)
    if args.val_json:
        for stage in ("val", "test"):
            _use_coco_json(cfg[f"{stage}_dataloader"].dataset, root, args.val_json, args.val_images)
            cfg[f"{stage}_evaluator"].ann_file = str(root / args.val_json)
    if args.train_json or args.val_json:
        classes = coco_classes(root / (args.train_json or args.val_json))
        for stage in ("train", "val", "test"):
            cfg[f"{stage}_dataloader"].dataset.metainfo = dict(classes=classes)
        cfg.model.bbox_head.num_classes = len(classes)
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    check_folder(cfg.work_dir, "--work-dir")
    for stage in ("train", "val", "test"):
        loader = cfg.get(f"{stage}_dataloader")
        if loader and not loader.get("num_workers"):
            loader.persistent_workers = False  # torch refuses it without workers
    cfg.launcher = args.launcher
    return cfg


def train(
    cfg: Config,
    *,
    resume: bool = False,
    load_from: str | None = None,
    amp: Literal["bf16", "fp16"] | None = None,
    seed: int | None = None,
) -> Runner:
    """Train a config; returns the finished runner.

    Args:
        cfg: Config with ``work_dir`` and ``launcher``.
        resume: Go on from the newest checkpoint of the work directory, or start where there is none.
        load_from: Checkpoint or published weights whose fitting tensors a run that is not resumed starts from.
        amp: Mixed precision.
        seed: Seed of weights, data order and augmentation.

    Raises:
        FileNotFoundError: If ``load_from`` does not exist.
        DatasetError: If the data cannot be used.
        ValueError: If fp16 is asked for without a GPU, or the data set's classes or the weights do not fit the network.
    """
    if load_from:
        if not Path(load_from).is_file():
            raise FileNotFoundError(f"no weights at {load_from}")
    # the epoch and the rate are functions of the checkpoint's iteration: a resumed schedule goes on as it would have
    latest = find_latest_checkpoint(cfg.work_dir) if resume and Path(cfg.work_dir).is_dir() else None
    latest = latest and str(Path(cfg.work_dir, Path(latest).name))  # the folder may have been moved
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
    if "batch_size_per_gpu" in cfg.optim_wrapper.get("paramwise_cfg", {}):
        cfg.optim_wrapper.paramwise_cfg.batch_size_per_gpu = cfg.train_dataloader.batch_size
    with _build_runner(cfg) as runner:
        model = unwrapped(runner.model)
        if latest:
            check_fits(model, latest)
        elif start:
            runner.register_hook(InitialWeightsHook(fitting_tensors(model, start)))
        _check_classes(runner.train_loop.dataloader.dataset.metainfo["classes"], cfg)
        _ = runner.val_loop  # builds the validation set, so that its errors come before training
    try:
        runner.train()
    except DatasetError:
        raise
    except ValueError as error:  # not the user's doing: show the traceback
        raise RuntimeError(f"training stopped: {error}") from error
    return runner


def test(cfg: Config, checkpoint: str | Path) -> dict[str, float]:
    """Evaluate a checkpoint (or published weights) on a config's test set; returns the metrics.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it does not fit the config's network, or the data set's classes do not.
        DatasetError: If the data cannot be used.
    """
    # strict, unlike mmengine's loading, which only logs what does not fit
    state = from_checkpoint(cfg, checkpoint).state_dict()
    with _build_runner(cfg) as runner:
        _check_classes(runner.test_loop.dataloader.dataset.metainfo["classes"], cfg)
    model = unwrapped(runner.model)
    model.load_state_dict(state)
    return runner.test()


def load_inferencer(
    config: str | None, weights: str | Path, *, device: str | None = None, score_thr: float = 0.25
) -> DetInferencer:
    """Load published weights, or with a config any checkpoint of it, for inference.

    Raises:
        FileNotFoundError: If the weights or the config do not exist.
        ValueError: If they do not fit each other, the device is not cpu or cuda or is not there, or no config comes
            with weights that are not published ones.
    """
    chosen = choose_device(device)
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no weights at {weights}; name a file with --weights")
    if config is not None:
        return DetInferencer.from_config(_read_config(config), weights, device=chosen, score_thr=score_thr)
    suffix = Path(weights).suffix
    if suffix == ".pth":
        raise ValueError(f"{weights} does not say what network it is of: pass its --config too")
    if suffix != ".safetensors":
        raise ValueError(f"{weights}: weights end in .safetensors, or in .pth with their --config; name such a file")
    return DetInferencer.from_weights(weights, device=chosen, score_thr=score_thr)


def _read_config(path: str | Path) -> Config:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no config at {path}")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise ValueError(f"cannot read the config {path}: {type(error).__name__}: {error}") from error
    missing = [part for part in ("model", "train_dataloader", "test_dataloader", "optim_wrapper") if part not in cfg]
    if missing:
        raise ValueError(f"{path} is no whole config: it lacks {', '.join(missing)}")
    return cfg


@contextmanager
def _build_runner(cfg: Config) -> Iterator[Runner]:
    """Build the runner; on an error here or in the body, remove the work directory if it is new."""
    work_dir = Path(cfg.work_dir)
    new_folders = [folder for folder in (work_dir, *work_dir.parents) if not folder.exists()]
    _start_processes(cfg)
    try:
        try:
            runner = Runner.from_cfg(cfg)
        except (TypeError, KeyError) as error:  # an argument or a type that does not exist
            raise ValueError(f"the config cannot be built: {error}") from error
        yield runner
    except BaseException:
        if new_folders and is_main_process():
            shutil.rmtree(work_dir, ignore_errors=True)
            with suppress(OSError):  # another run's folder is in it
                for folder in new_folders[1:]:
                    folder.rmdir()
        raise


def _check_classes(classes: Sequence[str], cfg: Config) -> None:
    num_classes = cfg.model.bbox_head.num_classes
    if len(classes) != num_classes:
        raise ValueError(
            f"the data set has {len(classes)} classes ({', '.join(classes[:5])}{', ...' * (len(classes) > 5)}), "
            f"the network {num_classes}: pass --cfg-options model.bbox_head.num_classes={len(classes)}"
        )


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


def _use_coco_json(dataset: ConfigDict, root: Path, json_path: str, images: str | None) -> None:
    if dataset.type != "CocoDetDataset":
        raise ValueError(f"--train-json and --val-json need a config with CocoDetDataset, this one has {dataset.type}")
    dataset.update(data_root="", ann_file=str(root / json_path))
    dataset.data_prefix = dict(img=str(root / images) if images else "")
