"""Sampling: noise to pictures or clips with a trained network, by seed, class and guidance, as memory allows."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mambavision.diffusion import latents
from mambavision.diffusion import weights as weight_files
from mambavision.diffusion.objectives import NUM_STEPS, Objective, Scheduler
from mambavision.diffusion.outputs import to_pil
from mambavision.engine.cli import choose_device
from mambavision.engine.cuda_graphs import CudaGraphs
from mambavision.engine.files import check_folder
from mambavision.engine.memory import free_memory, is_out_of_memory, measure_peak

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Precision = Literal["fp32", "bf16"]
OutputType = Literal["pil", "np", "pt"]
NETWORK_FILE, AUTOENCODER_FOLDER = "network.safetensors", "autoencoder"
MOST_AT_ONCE = 64  # pictures of a batch, unless more are asked for
MOST_GUIDANCE, MUCH_GUIDANCE = 1000, 20
GUIDANCE = 1.5  # of classes of pictures: far nearer to real ones than none, for the weights that come with the project
_SHARE = 0.8  # of the free memory that a batch may take: its need is measured on one picture


class ImageOutput(NamedTuple):
    """Sampled pictures; see :class:`DiffusionPipeline`."""

    images: list[Image.Image] | np.ndarray | Tensor


class VideoOutput(NamedTuple):
    """Sampled clips; see :class:`DiffusionPipeline`."""

    frames: list[list[Image.Image]] | np.ndarray | Tensor


class DiffusionPipeline:
    """Sample pictures or clips; called like diffusers' ``DiTPipeline``.

    On a GPU the network is replayed as a CUDA graph from the third step of a batch on, and batches as large after it:
    one call at a time, several threads need a pipeline each.

    Args:
        network: Denoiser of (x_t, t, labels); it is put into eval mode.
        objective: What it was trained for.
        autoencoder: Decodes its samples where they are latents; of clips frame by frame.
        class_names: Of its classes.
        guidable: Whether it was trained without its classes too (``class_dropout``), which guidance needs.

    Attributes:
        device: Where the network is; see :meth:`to`.
        graphs: What replays it; ``graphs.limit = 0`` turns that off.
        metadata: Of the weights file that it was loaded from.
        weights: That file, or a folder or checkpoint; None of one that was made otherwise.

    Raises:
        ValueError: If autoencoder or class names do not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        autoencoder: AutoencoderKL | None = None,
        class_names: Sequence[str] | None = None,
        guidable: bool = True,
    ) -> None:
        if class_names is not None and len(class_names) != network.num_classes:
            raise ValueError(f"{len(class_names)} class names are given for a network of {network.num_classes} classes")
        if autoencoder is not None and autoencoder.config.latent_channels != network.in_channels:
            raise ValueError(
                f"the autoencoder has latents of {autoencoder.config.latent_channels} channels, the network "
                f"takes {network.in_channels}: it was trained with another one"
            )
        if autoencoder is None and network.in_channels not in (1, 3):
            raise ValueError(f"the network makes latents of {network.in_channels} channels: give their autoencoder too")
        self.network, self.objective, self.autoencoder = network.eval(), objective, autoencoder
        self.graphs = CudaGraphs(self.network, "__call__", limit=1)
        self.class_names = None if class_names is None else list(class_names)
        self.guidable = guidable and network.num_classes > 0
        self.metadata: dict[str, Any] = {}
        self.weights: Path | None = None
        self._picture_bytes: dict[tuple, int] = {}  # measured, by what it depends on

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def makes_video(self) -> bool:
        """Whether samples are clips."""
        return len(self.network.input_size) == 3

    @property
    def default_precision(self) -> Precision:
        """bf16 on a GPU, since the fast scans there take it and others are many times slower; fp32 on the CPU."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def default_guidance(self) -> float:
        """1.5 of pictures with classes, where guidable; 1 (none) of others, and of clips, where it was not measured."""
        return GUIDANCE if self.guidable and not self.makes_video else 1.0

    @property
    def default_scheduler(self) -> Scheduler:
        """Euler for flows, DPM-Solver++ for what denoises in the steps of a chain."""
        return "euler" if "euler" in self.objective.schedulers else "dpm-solver++"

    def to(self, device: str | torch.device) -> DiffusionPipeline:
        """Move to a device; returns itself.

        Raises:
            ValueError: If there is no such device, or if asked for another dtype: the network stays fp32, ``precision``
                is an argument of a call.
            MemoryError: If the weights do not fit.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"{device}: the network stays in fp32; precision='bf16' of a call is autocast")
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"{device!r} is no device: cpu, cuda or cuda:N") from error
        if device.type == "cuda":
            device = choose_device(str(device))
        parts = [self.network] + ([] if self.autoencoder is None else [self.autoencoder])
        need = sum(p.numel() * p.element_size() for part in parts for p in part.parameters() if p.device != device)
        if need > (free := free_memory(device)):
            raise MemoryError(f"the weights need {need / 1e9:.2f} GB on {device}, {free / 1e9:.2f} GB are free")
        for part in parts:
            part.to(device)
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        autoencoder: str | os.PathLike | None = None,
    ) -> DiffusionPipeline:
        """Load what :meth:`save_pretrained` wrote, or a published weights file.

        Args:
            path: Folder, or ``*.safetensors``.
            device: "cpu", "cuda" or "cuda:N"; by default a GPU where there is one.
            autoencoder: Folder of a diffusers ``AutoencoderKL``, for a network of latents; by default the one that lies
                in ``path``.

        Raises:
            FileNotFoundError: If there is nothing at a path.
            ValueError: If the weights are not those of a diffusion network, or are damaged, or were trained on latents
                of another autoencoder.
            MemoryError: If they do not fit the device.
        """
        path, chosen = Path(path), choose_device(None if device is None else str(device))
        if path.is_dir() and not (path / NETWORK_FILE).is_file():
            raise FileNotFoundError(f"{path}: there is no {NETWORK_FILE} in this folder; save_pretrained makes one")
        network, objective, metadata = weight_files.load(path / NETWORK_FILE if path.is_dir() else path)
        if autoencoder is None and metadata.get("autoencoder") and (path / AUTOENCODER_FOLDER).is_dir():
            autoencoder = path / AUTOENCODER_FOLDER
        loaded = None if autoencoder is None else latents.load_autoencoder(autoencoder)
        if loaded is not None:
            latents.check_made_latents(loaded, metadata.get("autoencoder"), path)
        elif metadata.get("autoencoder"):
            raise ValueError(f"{path}: trained on latents: give their autoencoder too (--autoencoder)")
        pipeline = cls(network, objective, loaded, metadata["class_names"], metadata.get("class_dropout") != "0")
        pipeline.metadata, pipeline.weights = metadata, path
        return pipeline.to(chosen)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write weights (safetensors, fp32) and all that rebuilds the pipeline into a folder, which is made.

        Raises:
            OSError: If it cannot be written.
        """
        check_folder(folder, "folder")
        Path(folder).mkdir(parents=True, exist_ok=True)
        said = {name: self.metadata[name] for name in ("training_data", "trained_by") if name in self.metadata}
        said |= weight_files.class_dropout(self.network, self.guidable)
        if self.autoencoder is not None:
            said["autoencoder"] = latents.fingerprint(self.autoencoder)
        weight_files.save(
            self.network, Path(folder, NETWORK_FILE), objective=self.objective, class_names=self.class_names,
            metadata=said, precision="fp32",
        )  # fmt: skip
        if self.autoencoder is not None:
            self.autoencoder.save_pretrained(Path(folder, AUTOENCODER_FOLDER))

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num: int | None = None,
        *,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        **options: Any,
    ) -> ImageOutput | VideoOutput | tuple:
        """Sample.

        Args:
            class_labels, num, options: Arguments of :meth:`batches`: ``guidance_scale``, ``num_inference_steps``,
                ``scheduler``, ``seeds``, ``generator``, ``batch_size``, ``precision``, ``progress``.
            output_type: "pil": Pillow images; "np": floats (N, H, W, C) in [0, 1]; "pt": tensor (N, C, H, W) in [0, 1].
                Of clips: lists of Pillow images, (N, T, H, W, C) and (N, T, C, H, W).
            return_dict: False: return a plain tuple.

        Returns:
            ``images``, or of a video network ``frames``.

        Raises:
            ValueError: If an argument does not fit, or the network gives values that are not finite.
            MemoryError: If memory does not suffice; says what is needed.
        """
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}")
        x = torch.cat(list(self.batches(class_labels, num, **options)))
        if self.makes_video:
            x = x.transpose(1, 2)  # (N, T, C, H, W)
        if output_type == "np":
            x = x.movedim(-3, -1).numpy()
        elif output_type == "pil":
            x = to_pil(x)
        output = VideoOutput(x) if self.makes_video else ImageOutput(x)
        return output if return_dict else tuple(output)

    def batches(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num: int | None = None,
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int = 25,
        scheduler: Scheduler | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        precision: Precision | None = None,
        progress: bool = True,
    ) -> Iterator[Tensor]:
        """Sample, and hand out batch by batch: floats (B, C, H, W) or (B, C, T, H, W) in [0, 1], on the CPU.

        A picture depends on its seed (or generator), class and the settings, not on the others that it is sampled with,
        but for rounding where a device multiplies matrices of other sizes otherwise.

        Args:
            class_labels: Classes by index or name, repeated in turn up to ``num``; None: all classes in turn.
            num: How many; by default one for each of ``class_labels``.
            guidance_scale: w of classifier-free guidance, u + w * (c - u) with predictions u without and c with the
                class; 1.0 is none, and half the work; by default as ``default_guidance``.
            num_inference_steps: Of the scheduler.
            scheduler: "ddpm", "ddim" or "dpm-solver++" for noise and v predictions, "euler", "heun" or "dpm-solver++"
                for flows; by default as ``default_scheduler``.
            seeds: One for each sample.
            generator: On the CPU: one that draws the seeds, by default torch's own; or one for each sample.
            batch_size: Samples at once; by default up to 64, as memory allows.
            precision: Of the network; by default as ``default_precision``. "bf16" is autocast.
            progress: Show a progress bar.

        Raises:
            ValueError, MemoryError: As a call.
        """
        labels = self.labels(class_labels, num)
        sources = _sources(len(labels), seeds, generator)
        guidance_scale = self.default_guidance if guidance_scale is None else guidance_scale
        if not isinstance(guidance_scale, Real):
            raise ValueError(f"guidance is a number, got {guidance_scale!r}")
        if not 0 <= guidance_scale <= MOST_GUIDANCE:
            raise ValueError(f"guidance {guidance_scale} must be at least 0, and at most {MOST_GUIDANCE}; 1 is none")
        guided = guidance_scale != 1.0
        if guided and not self.network.num_classes:
            raise ValueError(f"guidance {guidance_scale:g} needs a network with classes, this one has none: leave it 1")
        if guided and not self.guidable:
            raise ValueError(
                f"guidance {guidance_scale:g} needs a network that was trained without classes too, this one had "
                "class_dropout=0: leave it 1"
            )
        if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= NUM_STEPS:
            raise ValueError(f"{num_inference_steps} steps cannot be taken: 1 to {NUM_STEPS} can")
        precision = precision or self.default_precision
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        if batch_size is not None and not _is_count(batch_size):
            raise ValueError(f"a batch of {batch_size!r} cannot be sampled: a whole number, at least 1")
        scheduler = scheduler or self.default_scheduler
        chosen = self.objective.scheduler(scheduler, clip_sample=self.autoencoder is None)
        if scheduler == "ddim" and NUM_STEPS % num_inference_steps:  # diffusers' would go to 1000 // n steps earlier
            fitting = ", ".join(str(n) for n in range(1, NUM_STEPS + 1) if not NUM_STEPS % n)
            raise ValueError(f"ddim cannot take {num_inference_steps} equal steps of {NUM_STEPS}: it can {fitting}")
        chosen.set_timesteps(num_inference_steps)
        if scheduler in ("ddpm", "dpm-solver++") and len(chosen.timesteps) > num_inference_steps:
            # rounding in diffusers; DDPM would take the noisiest step last
            raise ValueError(
                f"{scheduler} cannot take {num_inference_steps} steps: its times would go below 0; take more or fewer"
            )
        self.graphs.owner = self.network  # which may have been replaced
        size = self._fitting(batch_size, len(labels), guided, precision)
        return self._sampled(chosen, num_inference_steps, labels, sources, guidance_scale, size, precision, progress)

    def labels(self, class_labels: int | str | Sequence[int | str] | None, num: int | None) -> list[int | None]:
        """The class of each sample, None of a network without; arguments as of a call.

        Raises:
            ValueError: If there is no such class, or none is asked for.
        """
        if num is not None and not _is_count(num):
            raise ValueError(f"{num!r} samples are asked for: a whole number, at least 1")
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        if not self.network.num_classes:
            if class_labels is not None:
                raise ValueError("the network has no classes: leave them out")
            return [None] * (num or 1)
        if class_labels is None:
            return list(islice(cycle(range(self.network.num_classes)), num or 1))
        alone = isinstance(class_labels, str) or not isinstance(class_labels, Iterable)
        names = [class_labels] if alone else list(class_labels)
        if not names:
            raise ValueError("an empty list of classes: name some, or leave it out")
        indices = [self._index(name) for name in names]  # all of them, though num may be smaller
        return list(islice(cycle(indices), num or len(names)))

    def _index(self, label: int | str) -> int:
        count = self.network.num_classes
        if isinstance(label, str):
            if label not in (self.class_names or []):
                known = f"classes are {_listed(self.class_names)}" if self.class_names else "its classes have no names"
                raise ValueError(f"there is no class {label!r}: {known}")
            return self.class_names.index(label)
        if not isinstance(label, Integral) or isinstance(label, bool):
            raise ValueError(f"a class is an index or a name, got {label!r}")
        if not 0 <= label < count:
            raise ValueError(f"class {label} is out of range: there are {count}, from 0 to {count - 1}")
        return int(label)

    def _fitting(self, batch_size: int | None, num: int, guided: bool, precision: Precision) -> int:
        """How many samples to take at once."""
        wanted = min(batch_size or MOST_AT_ONCE, num)
        shape = f"{'x'.join(map(str, self.network.input_size))} {'clip' if self.makes_video else 'picture'}"
        key = (self.device, guided, precision)
        try:
            if key not in self._picture_bytes:
                self._picture_bytes[key] = self._measured(guided, precision)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("Tried to allocate ")[2].partition(". ")[0]
            part = f", {said} of it in one piece" if said else ""
            free = free_memory(self.device)
            raise MemoryError(
                f"one {shape} needs more memory than there is on {self.device}{part}; {free / 1e9:.2f} GB are free"
            ) from error
        need, free = self._picture_bytes[key], free_memory(self.device)
        fits = int(_SHARE * free / need)
        if batch_size is not None and wanted > fits:
            raise MemoryError(
                f"{wanted} of {shape} at once need about {wanted * need / 1e9:.2f} GB on {self.device}, "
                f"{free / 1e9:.2f} GB are free: use --batch-size {max(fits, 1)}"
            )
        if fits < 1:
            raise MemoryError(
                f"one {shape} needs about {need / 1e9:.2f} GB on {self.device}, {free / 1e9:.2f} GB are free"
            )
        return min(wanted, fits)

    @torch.inference_mode()
    def _measured(self, guided: bool, precision: Precision) -> int:
        """Bytes that one sample takes."""
        x = torch.zeros(1, self.network.in_channels, *self.network.input_size, device=self.device)
        labels = torch.zeros(1, dtype=torch.long, device=self.device) if self.network.num_classes else None

        def once() -> None:
            self._decode(self._predict(x, 500.0, labels, 2.0 if guided else 1.0, precision))

        once()  # libraries make their workspaces
        return max(measure_peak(once, self.device) or 0, 16 * x.nbytes)

    def _sampled(
        self,
        scheduler: Any,
        asked: int,
        labels: Sequence[int | None],
        sources: Sequence[int | torch.Generator],
        guidance: float,
        size: int,
        precision: Precision,
        progress: bool,
    ) -> Iterator[Tensor]:
        starts = range(0, len(labels), size)
        steps = len(scheduler.timesteps)
        with tqdm(total=len(starts) * steps, unit="step", desc="sampling", disable=not progress) as bar:
            try:
                for start in starts:
                    chosen = slice(start, start + size)
                    generators = [
                        torch.Generator().manual_seed(source) if isinstance(source, int) else source
                        for source in sources[chosen]
                    ]
                    scheduler.set_timesteps(asked)  # forgets the batch before
                    if len(generators) != size:
                        self.graphs.forget()  # the memory of batches of another size
                    yield self._batch(scheduler, labels[chosen], generators, guidance, precision, bar)
            finally:
                self.graphs.forget()

    @torch.inference_mode()
    def _batch(
        self,
        scheduler: Any,
        labels: Sequence[int | None],
        generators: list[torch.Generator],
        guidance: float,
        precision: Precision,
        bar: tqdm,
    ) -> Tensor:
        if hasattr(scheduler, "set_begin_index"):  # else looked up by the first time, which may come twice
            scheduler.set_begin_index(0)
        shape = (self.network.in_channels, *self.network.input_size)
        # these schedulers begin with unit variance, and take the network's input as it is
        x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        classes = torch.tensor(labels, device=self.device) if self.network.num_classes else None
        try:
            for t in scheduler.timesteps:
                prediction = self._predict(x, max(float(t), 0.0), classes, guidance, precision)  # dpm-solver++: -1
                x = scheduler.step(prediction, t, x, generator=generators, return_dict=False)[0]
                bar.update()
            if self.autoencoder is not None:
                self.graphs.forget()  # a batch is as large as memory allows for either
            images = self._decode(x)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            gc.collect()
            free = free_memory(self.device)
            raise MemoryError(
                f"out of memory on {self.device} with {len(labels)} at once, {free / 1e9:.2f} GB are free: "
                f"use --batch-size {max(len(labels) // 2, 1)}"
            ) from error
        if not images.isfinite().all():
            advice = "; try fp32" if precision != "fp32" else ": the weights are broken"
            if guidance > MUCH_GUIDANCE:
                advice = f"; try a guidance of less than {guidance:g}"
            raise ValueError(f"the network gives values that are not finite in {precision}{advice}")
        return (images / 2 + 0.5).clamp(0, 1).cpu()

    def _predict(self, x: Tensor, t: float, labels: Tensor | None, guidance: float, precision: Precision) -> Tensor:
        guided = guidance != 1.0
        if guided:
            x, labels = torch.cat([x, x]), torch.cat([labels, torch.full_like(labels, self.network.num_classes)])
        inputs = [x, torch.full((len(x),), t, device=x.device)] + ([] if labels is None else [labels])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = self.graphs(*inputs).float()
        if not guided:
            return prediction.clone()  # schedulers keep some, a replay writes to the one before
        with_class, without = prediction.chunk(2)
        return torch.lerp(without, with_class, guidance)

    def _decode(self, x: Tensor) -> Tensor:
        """Pictures in [-1, 1], about, of samples."""
        return x if self.autoencoder is None else latents.decode(self.autoencoder, x).float()


def _is_count(n: object) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool) and n >= 1


def _sources(
    num: int, seeds: Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> list[int] | list[torch.Generator]:
    """What each sample's noise comes from: its seed, or its generator."""
    if seeds is not None and generator is not None:
        raise ValueError("seeds and generator are given: pass one of them")
    if generator is not None and not isinstance(generator, torch.Generator):
        drawn = list(generator) if isinstance(generator, Iterable) else [generator]
        if not all(isinstance(v, torch.Generator) for v in drawn):
            raise ValueError(f"generator is a torch.Generator, or one for each sample, got {generator!r}")
        if len(drawn) != num:
            raise ValueError(f"{len(drawn)} generators are given for {num} samples: pass one for each, or a single one")
        return drawn
    if seeds is None:
        seeds = torch.randint(2**62, (num,), generator=generator).tolist()
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    if not all(isinstance(seed, Integral) for seed in seeds):
        raise ValueError(f"seeds are whole numbers, one for each sample, got {seeds!r}")
    if len(seeds) != num:
        raise ValueError(f"{len(seeds)} seeds are given for {num} samples: pass one for each")
    wide = next((seed for seed in seeds if not -(2**63) <= seed < 2**64), None)
    if wide is not None:
        raise ValueError(f"seed {wide} is out of range: 64 bits hold those from {-(2**63)} to {2**64 - 1}")
    return [int(seed) for seed in seeds]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ... ({len(names)} in all)"
