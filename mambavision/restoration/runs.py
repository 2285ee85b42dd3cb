"""Training and test runs of restoration networks from configs."""

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mambavision.engine import runs
from mambavision.restoration.batches import CropLoader
from mambavision.restoration.datasets import EvaluationSets
from mambavision.restoration.restorer import Restorer


def load_config(args: argparse.Namespace) -> Config:
    """Read a config, with the arguments of :func:`mambavision.engine.runs.add_config_arguments` in it.

    Measures of each picture go to ``val.csv`` and ``test.csv`` of the work directory, unless the config says where.

    Raises:
        FileNotFoundError, NotADirectoryError: If the config does not exist, or the work directory is a file.
        ValueError: If the config cannot be read, or arguments for detection are given.
    """
    runs.refuse_detection_arguments(args, "restoration")
    cfg = runs.load_config(args)
    for stage in ("val", "test"):
        if cfg.get(f"{stage}_evaluator"):
            cfg[f"{stage}_evaluator"].setdefault("csv", str(Path(cfg.work_dir) / f"{stage}.csv"))
    return cfg


def train(cfg: Config, **options: Any) -> Runner:
    """Train a restoration network: :func:`mambavision.engine.runs.train_iterations`, for photos that fit it."""
    return runs.train_iterations(cfg, **options, check=_check_pictures)


def test(cfg: Config, checkpoint: str | Path) -> dict[str, float]:
    """Evaluate a restoration network: :func:`mambavision.engine.runs.test`, for test sets that fit it."""
    return runs.test(cfg, checkpoint, check=_check_pictures)


def _check_pictures(model: Restorer, dataset: CropLoader | EvaluationSets) -> None:
    config = model.network.config
    expected = config["in_channels"], config.get("scale", 1)
    parts = [dataset] if isinstance(dataset, CropLoader) else dataset.datasets
    for part in parts:
        sample = part.batch(0) if isinstance(part, CropLoader) else part[0]
        found = sample["inputs"].shape[-3], sample["gt"].shape[-1] // sample["inputs"].shape[-1]
        if found != expected:
            raise ValueError(
                f"the photos have {found[0]} channels and scale {found[1]}, the network takes {expected[0]} channels "
                f"and has scale {expected[1]}: change model.network.in_channels or scale, or gray of the photos"
            )
