"""Restoration networks for files that run elsewhere."""

from pathlib import Path

from mambavision.backbones.serpent import Serpent
from mambavision.engine.export import Exportable
from mambavision.engine.runs import read_config
from mambavision.engine.weights import build_from_checkpoint
from mambavision.restoration.weights import load


def exportable(weights: str | Path, config: str | None = None) -> Exportable:
    """The network of published weights, or of a checkpoint and its config.

    Raises:
        FileNotFoundError: If one of them does not exist.
        ValueError: If they do not fit each other, or are of another network.
    """
    if config is None:
        network, metadata = load(weights)
        task = metadata["task"]
    else:
        cfg = read_config(config)
        network, task = build_from_checkpoint(cfg, weights)[0].network.eval(), cfg.restores
    if not isinstance(network, Serpent):
        raise ValueError(f"{config or weights}: only Serpent is exported, this is a {type(network).__name__}")
    names = ("images", "sigma") if network.config["sigma_input"] else ("images",)
    said = {"task": task, "scale": network.scale}
    return Exportable(network, network.config["in_channels"], names, ("restored",), network.multiple, said)
