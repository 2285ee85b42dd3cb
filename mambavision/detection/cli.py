"""What the detection tools share: their arguments, training and test runs, loading an inferencer."""

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mambavision.detection.datasets import coco_classes
from mambavision.detection.inferencer import DetInferencer
from mambavision.engine import runs
from mambavision.engine.cli import choose_device
from mambavision.engine.photos import DatasetError


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what a detector is trained and tested on."""
    group = parser.add_argument_group("detection")
    group.add_argument("--train-json", help="COCO JSON to train on, relative to --data-root; brings its class names")
    group.add_argument("--val-json", help="COCO JSON to validate and test on, relative to --data-root")
    group.add_argument("--train-images", help="folder of the training photos, relative to --data-root")
    group.add_argument("--val-images", help="folder of the validation photos, relative to --data-root")


def load_config(args: argparse.Namespace) -> Config:
    """Read a config, with the arguments of :func:`runs.add_config_arguments` and :func:`add_data_arguments` in it.

    Raises:
        FileNotFoundError, NotADirectoryError: If the config does not exist, or the work directory is a file.
        ValueError: If the config cannot be read, or the JSON files do not fit it.
    """

    def use_json(cfg: Config) -> None:
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

    return runs.load_config(args, use_json)


def train(cfg: Config, **options: Any) -> Runner:
    """Train a detector: :func:`mambavision.engine.runs.train`, for a data set whose classes fit the network."""
    if "batch_size_per_gpu" in cfg.optim_wrapper.get("paramwise_cfg", {}):
        cfg.optim_wrapper.paramwise_cfg.batch_size_per_gpu = cfg.train_dataloader.batch_size
    _check_json(cfg.train_dataloader.dataset, "--train-json")
    return runs.train(cfg, **options, check=_check_classes)


def test(cfg: Config, checkpoint: str | Path) -> dict[str, float]:
    """Evaluate a detector: :func:`mambavision.engine.runs.test`, for a data set whose classes fit the network."""
    _check_json(cfg.test_dataloader.dataset, "--val-json")
    return runs.test(cfg, checkpoint, check=_check_classes)


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
        cfg = runs.read_config(config)
        runs.check_task(cfg, config, "detection")
        return DetInferencer.from_config(cfg, weights, device=chosen, score_thr=score_thr)
    suffix = Path(weights).suffix
    if suffix == ".pth":
        raise ValueError(f"{weights} does not say what network it is of: pass its --config too")
    if suffix != ".safetensors":
        raise ValueError(f"{weights}: weights end in .safetensors, or in .pth with their --config; name such a file")
    return DetInferencer.from_weights(weights, device=chosen, score_thr=score_thr)


def _check_classes(model: nn.Module, dataset: Dataset) -> None:
    classes, num_classes = dataset.metainfo["classes"], model.bbox_head.num_classes
    if len(classes) != num_classes:
        raise ValueError(
            f"the data set has {len(classes)} classes ({', '.join(classes[:5])}{', ...' * (len(classes) > 5)}), "
            f"the network {num_classes}: pass --cfg-options model.bbox_head.num_classes={len(classes)}"
        )


def _check_json(dataset: ConfigDict, option: str) -> None:
    path = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "")
    if dataset.type == "CocoDetDataset" and not path.is_file():
        raise DatasetError(f"{path}: no such file; name yours with --data-root and {option}")


def _use_coco_json(dataset: ConfigDict, root: Path, json_path: str, images: str | None) -> None:
    if dataset.type != "CocoDetDataset":
        raise ValueError(f"--train-json and --val-json need a config with CocoDetDataset, this one has {dataset.type}")
    dataset.update(data_root="", ann_file=str(root / json_path))
    dataset.data_prefix = dict(img=str(root / images) if images else "")
