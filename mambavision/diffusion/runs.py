"""Training and test runs of denoising networks from configs."""

import argparse
from collections.abc import Mapping, Sequence
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
    latest, told = runs.newest_checkpoint(cfg.work_dir) if options.get("resume") else None, []
    if latest:
        checkpoint = read_checkpoint(latest)
        check_trained_as(cfg.model, checkpoint, latest)
        told.append(_trained_on(checkpoint))

    def check(model: Diffusion, batches: NoisyBatches | HeldOutBatches) -> None:
        classes = tuple(batches.dataset.class_names) if model.network.num_classes else ()
        told.append((classes, batches.dataset.autoencoder))
        if isinstance(batches, NoisyBatches):
            _check_alike(*told[0], *told[-1], "the training set", "what the checkpoint was trained on")
        else:
            _check_alike(*told[0], *told[-1], "the validation set")
        _check_items(model, batches)

    return runs.train_iterations(cfg, **options, check=check)


def test(cfg: Config, checkpoint: str) -> dict[str, float]:
    """The loss on a config's test set: :func:`mambavision.engine.runs.test`, for items and training that fit."""

    weights = read_checkpoint(checkpoint)
    check_trained_as(cfg.model, weights, checkpoint)
    trained_on = _trained_on(weights)

    def check(model: Diffusion, batches: HeldOutBatches) -> None:
        classes = batches.dataset.class_names if model.network.num_classes else ()
        _check_alike(*trained_on, classes, batches.dataset.autoencoder, "the test set")
        _check_items(model, batches)

    return runs.test(cfg, checkpoint, check=check)


def _trained_on(checkpoint: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """The classes and the autoencoder of what a checkpoint was trained on; () and None where it does not say."""
    said = checkpoint.get("meta", {}).get("dataset_meta") or {}
    return tuple(said.get("classes") or ()), said.get("autoencoder")


def _check_alike(
    classes: Sequence[str],
    autoencoder: str | None,
    theirs: Sequence[str],
    other: str | None,
    which: str,
    than: str = "what is trained on",
) -> None:
    """Of what is trained on and what is measured on; what one does not say passes."""
    if classes and theirs and tuple(classes) != tuple(theirs):
        lacking, more = ([name for name in a if name not in b] for a, b in ((classes, theirs), (theirs, classes)))
        said = [f"lacks {', '.join(map(repr, lacking[:3]))}"] * bool(lacking)
        said += [f"has {', '.join(map(repr, more[:3]))} besides"] * bool(more)
        said = " and ".join(said) or "has them in another order"
        raise ValueError(f"{which} has other classes than {than}, it {said}: it needs the same ones")
    if autoencoder and other and autoencoder != other:
        raise ValueError(f"the latents of {which} were made by another autoencoder than {than}")


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
