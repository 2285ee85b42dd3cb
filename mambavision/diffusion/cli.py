"""Sampling into files: weights in, pictures or clips, a grid and an archive out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mambavision.diffusion import outputs, weights
from mambavision.diffusion.latents import check_made_latents, load_autoencoder
from mambavision.diffusion.pipeline import DiffusionPipeline
from mambavision.engine.checkpoint import CheckpointError
from mambavision.engine.cli import choose_device
from mambavision.engine.files import atomic_path, check_folder, check_free, shipped_weights
from mambavision.engine.memory import free_memory
from mambavision.engine.runs import check_task, read_config
from mambavision.engine.weights import build_from_checkpoint, read_checkpoint

Output = Literal["grid", "single", "npz"]
WEIGHTS_FOLDER = shipped_weights()

Writer = Callable[[Path, np.ndarray], None]
PICTURE_WRITERS: dict[str, Writer] = {".png": outputs.write_png}
CLIP_WRITERS: dict[str, Writer] = {".gif": outputs.write_gif, ".mp4": outputs.write_mp4}


def find_weights(*, video: bool) -> Path:
    """The weights that come with this project and sample pictures, or clips.

    Raises:
        FileNotFoundError: If there are none.
    """
    for path in sorted(WEIGHTS_FOLDER.glob("*.safetensors")):
        try:
            config = weights.read_metadata(path)["config"]
        except CheckpointError:  # of another task
            continue
        if len(config["input_size"]) == 2 + video and config["in_channels"] in (1, 3):
            return path
    kind = "clips" if video else "pictures"
    raise FileNotFoundError(
        f"no weights that sample {kind} in {WEIGHTS_FOLDER}: name a file with --weights, or train one"
    )


def load_pipeline(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    device: str | None = None,
    autoencoder: str | os.PathLike | None = None,
) -> DiffusionPipeline:
    """Load published weights, a folder of a pipeline, or a training checkpoint with its config.

    Of a run with EMA the averaged weights are taken.

    Raises:
        FileNotFoundError: If there is nothing at a path.
        ValueError: If these are no weights of a diffusion network, or do not fit the config.
        MemoryError: If they do not fit the device.
    """
    if config is None:
        if Path(path).suffix == ".pth":
            raise ValueError(f"{path} is a training checkpoint: name the config it was trained by with --config")
        return DiffusionPipeline.from_pretrained(path, device=device, autoencoder=autoencoder)
    cfg, chosen = read_config(config), choose_device(device)
    check_task(cfg, config, "diffusion")
    cfg.model.compile = False
    weights.check_trained_as(cfg.model, read_checkpoint(path), path)
    model, checkpoint = build_from_checkpoint(cfg, path)
    loaded = None if autoencoder is None else load_autoencoder(autoencoder)
    trained_on = checkpoint.get("meta", {}).get("dataset_meta", {})
    if loaded is not None:
        check_made_latents(loaded, trained_on.get("autoencoder"), path)
    elif trained_on.get("autoencoder"):
        raise ValueError(f"{path}: trained on latents: give their autoencoder too (--autoencoder)")
    names = trained_on.get("classes") if model.network.num_classes else None
    guidable = weights.guidable(cfg.model, checkpoint, path)
    pipeline = DiffusionPipeline(model.network, model.objective, loaded, names, guidable)
    pipeline.weights = Path(path)
    return pipeline.to(chosen)


def check_out_dir(out_dir: str | os.PathLike) -> None:
    """Check that the output folder can be written into, or be made; makes nothing.

    Raises:
        OSError: If it cannot.
    """
    check_folder(out_dir, "--out-dir")
    there = next(folder for folder in (Path(out_dir), *Path(out_dir).absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--out-dir {out_dir}: {there} cannot be written into; name another")


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder; after an error, what was made and is still empty is removed."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def classes_of(pipeline: DiffusionPipeline, names: Sequence[str] | None) -> list[int | str] | None:
    """Classes as a pipeline takes them: what is no name of a class but a number is an index."""
    if names is None:
        return None
    known = pipeline.class_names or []
    return [int(name) if name not in known and name.removeprefix("-").isdecimal() else name for name in names]


def sample_files(
    pipeline: DiffusionPipeline,
    out_dir: str | os.PathLike,
    *,
    num: int,
    seed: int = 0,
    class_labels: Sequence[int | str] | None = None,
    save: Collection[Output] = ("grid", "single"),
    rate: float = outputs.RATE,
    overwrite: bool = False,
    **options: Any,
) -> list[Path]:
    """Sample into a folder, each file whole or not at all.

    ``single`` is 00000.png, 00001.png, ... as they are sampled, or .gif and .mp4 of clips. ``grid`` is all in one,
    grid.png, or grid.gif and grid.mp4. ``npz`` is samples.npz, see :func:`mambavision.diffusion.outputs.write_npz`.
    samples.json says how each was made.

    Args:
        pipeline: Makes the samples.
        out_dir: The folder; made if it is not there, and removed again if an error leaves it empty.
        num: How many samples.
        seed: Of the first one, the next has the next.
        class_labels: As a pipeline's.
        save: What to write.
        rate: Frames a second of clips.
        overwrite: Replace files that are there already; what else a run before wrote is removed.
        options: More arguments of :meth:`DiffusionPipeline.batches`.

    Returns:
        The files, the most telling first.

    Raises:
        ValueError, MemoryError: As a pipeline's.
        OSError: If a file cannot be written, or is there already.
    """
    check_out_dir(out_dir)
    if not 0.02 <= rate <= 1000:
        raise ValueError(f"{rate:g} frames a second cannot be shown: at least 0.02, at most 1000")
    labels = pipeline.labels(class_labels, num)
    writers = _writers(CLIP_WRITERS if pipeline.makes_video else PICTURE_WRITERS, rate)
    names = [f"grid{suffix}" for suffix in writers] * ("grid" in save) + ["samples.npz"] * ("npz" in save)
    names += [f"{i:05d}{suffix}" for i in range(num) for suffix in writers] * ("single" in save)
    targets = [Path(out_dir, name) for name in (*names, "samples.json")]
    if not overwrite:
        check_free(targets)
    batches = pipeline.batches(class_labels, num, seeds=range(seed, seed + num), **options)
    singles = writers if "single" in save else {}
    with _folder(Path(out_dir)):
        kept = list(_written(batches, out_dir, singles, keep=bool({"grid", "npz"} & set(save))))
        samples = np.concatenate(kept) if kept else None
        if "npz" in save:
            outputs.write_npz(Path(out_dir, "samples.npz"), samples, labels)
        if "grid" in save:
            grid = outputs.make_grid(samples)
            for suffix, write in writers.items():
                write(Path(out_dir, f"grid{suffix}"), grid)
        if overwrite and Path(out_dir, "samples.json").is_file():  # of a run before, which this one's will not describe
            for path in Path(out_dir).iterdir():
                if re.fullmatch(r"(\d{5,}|grid)\.(png|gif|mp4)|samples\.npz", path.name) and path not in targets:
                    path.unlink()
        with atomic_path(Path(out_dir, "samples.json")) as temporary:
            temporary.write_text(json.dumps(_said(pipeline, labels, seed, options), indent=1) + "\n")
    return targets


def _said(
    pipeline: DiffusionPipeline, labels: Sequence[int | None], seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """How samples were made, as samples.json says it."""
    defaults = dict(
        guidance_scale=pipeline.default_guidance,
        scheduler=pipeline.default_scheduler,
        precision=pipeline.default_precision,
    )
    given = {name: value for name, value in options.items() if name not in ("progress", "batch_size")}
    named = pipeline.class_names or range(pipeline.network.num_classes)
    classes = [{} if label is None else {"class": named[label]} for label in labels]
    samples = [{"seed": seed + i, **which} for i, which in enumerate(classes)]
    given = {name: value for name, value in given.items() if value is not None}
    return {"weights": pipeline.weights and str(pipeline.weights), **defaults, **given, "samples": samples}


def _writers(writers: dict[str, Writer], rate: float) -> dict[str, Writer]:
    return {
        suffix: (lambda path, clip, write=write: write(path, clip, rate)) if suffix in CLIP_WRITERS else write
        for suffix, write in writers.items()
    }


def _written(
    batches: Iterator, out_dir: str | os.PathLike, writers: dict[str, Writer], *, keep: bool
) -> Iterator[np.ndarray]:
    """Write each sample; hand its batch on, uint8 with channels last, if it is to be kept."""
    index = 0
    for batch in batches:
        samples = outputs.to_uint8(batch)
        for sample in samples:
            for suffix, write in writers.items():
                write(Path(out_dir, f"{index:05d}{suffix}"), sample)
            index += 1
        if keep:
            if samples.nbytes > free_memory("cpu"):
                raise MemoryError(f"no memory is left for more than {index} samples: sample fewer, or --save single")
            yield samples
