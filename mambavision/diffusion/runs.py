"""Training and test runs of denoising networks from configs."""

import argparse
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mambavision.diffusion.batches import HeldOutBatches, NoisyBatches
from mambavision.diffusion.diffusion import Diffusion
from mambavision.diffusion.weights import check_trained_as
from mambavision.engine import runs
from mambavision.engine.weights import read_checkpoint


def load_config(args: argparse.Namespace) -> Config:
    """Read a config, with the arguments of :func:`mambavision.engine.runs.add_config_arguments` in it.

    Raises:
        FileNotFoundError, NotADirectoryError: If the config does not exist, or the work directory is a file.
        ValueError: If the config cannot be read, or arguments for detection are given.
    """
    runs.refuse_detection_arguments(args, "diffusion")
    return runs.load_config(args)


def train(cfg: Config, **options: Any) -> Runner:
    """Train a denoising network: :func:`mambavision.engine.runs.train_iterations`, for items that fit it."""
    latest = runs.newest_checkpoint(cfg.work_dir) if options.get("resume") else None
    if latest:
        check_trained_as(cfg.model, read_checkpoint(latest), latest)
    told = []

    def check(model: Diffusion, batches: NoisyBatches | HeldOutBatches) -> None:
        told.append((batches.dataset.class_names if model.network.num_classes else (), batches.dataset.autoencoder))
        _check_alike(*told[0], *told[-1], "the validation set")
        _check_items(model, batches)

    return runs.train_iterations(cfg, **options, check=check)


def test(cfg: Config, checkpoint: str) -> dict[str, float]:
    """The loss on a config's test set: :func:`mambavision.engine.runs.test`, for items and training that fit."""

    def check(model: Diffusion, batches: HeldOutBatches) -> None:
        weights, ours = read_checkpoint(checkpoint), batches.dataset
        check_trained_as(cfg.model, weights, checkpoint)
        trained_on = weights.get("meta", {}).get("dataset_meta", {})
        names = tuple(trained_on.get("classes") or ()) if model.network.num_classes else ()
        _check_alike(names, trained_on.get("autoencoder"), ours.class_names, ours.autoencoder, "the test set")
        _check_items(model, batches)

    return runs.test(cfg, checkpoint, check=check)


def _check_alike(
    classes: Sequence[str], autoencoder: str | None, theirs: Sequence[str], other: str | None, which: str
) -> None:
    """Of what is trained on and what is measured on; what one does not say passes."""
    if classes and theirs and tuple(classes) != tuple(theirs):
        lacking, more = ([name for name in a if name not in b] for a, b in ((classes, theirs), (theirs, classes)))
        said = [f"lacks {', '.join(map(repr, lacking[:3]))}"] * bool(lacking)
        said += [f"has {', '.join(map(repr, more[:3]))} besides"] * bool(more)
        said = " and ".join(said) or "has them in another order"
        raise ValueError(f"{which} has other classes than what is trained on, it {said}: it needs the same ones")
    if autoencoder and other and autoencoder != other:
        raise ValueError(f"the latents of {which} were made by another autoencoder than those that are trained on")


def _check_items(model: Diffusion, batches: NoisyBatches | HeldOutBatches) -> None:
    network, dataset = model.network, batches.dataset
    found, expected = (dataset.channels, *dataset.size), (network.in_channels, *network.input_size)
    if found != expected:
        raise ValueError(
            f"the data set has items of {found} (channels, size), the network takes {expected}: change the data set's "
            "size, or model.network.in_channels and input_size"
        )
    if network.num_classes not in (0, len(dataset.class_names)):
        raise ValueError(
            f"the data set has {len(dataset.class_names)} classes, the network {network.num_classes}: change "
            "model.network.num_classes; 0 trains without classes"
        )
