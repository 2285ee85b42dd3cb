"""Restoring pictures in memory or in files: any size, gray or colour, 8 or 16 bits, with or without transparency."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mambavision.backbones.serpent import pad_to_multiple
from mambavision.engine.cli import choose_device
from mambavision.engine.files import shipped_weights
from mambavision.engine.memory import free_memory, give_freed_memory_back, is_out_of_memory
from mambavision.engine.photos import find_photos
from mambavision.restoration import weights as weight_files
from mambavision.restoration.images import PhotoFile, from_array, from_pil, read_photo_file, to_array, to_pil
from mambavision.restoration.tiles import (
    ALIGNMENT,
    MIN_TILE,
    check_fits,
    choose_tile,
    measure_bytes_per_pixel,
    tiled_rows,
)
from mambavision.restoration.weights import Task

TASKS: tuple[Task, ...] = get_args(Task)
Precision = Literal["fp32", "bf16", "fp16"]
SIZES = ("l", "b", "s", "t")  # of Serpent, the largest first
OVERLAP = 32
GRAY: dict[Task, Task] = {"denoise_color": "denoise_gray", "deblur": "deblur_gray", "jpeg": "jpeg_gray"}
"""Tasks in gray. Networks of colour take noise that is the same in all channels for part of the picture."""
_TINT = 3  # of 255
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of BT.601
_NOISE: tuple[Task, ...] = ("denoise_color", "deblur")
WEIGHTS_FOLDER = shipped_weights()
_BLOCK = 16  # pixels, of JPEG with chroma at half size; a multiple of the 8 of others
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[int, int], None]
"""Called after each tile with how many of a picture are done and how many there are."""


class RestorationInferencer:
    """Restore pictures of any size.

    Args:
        task: What to do, with the weights that come with this project: blind colour denoising if neither is given. Gray
            pictures (:func:`is_gray`) are restored by the weights of the task in gray, if any.
        weights: Weights file, for all pictures; ``task``, if given too, must be its own.
        device: "cpu", "cuda" or "cuda:N"; by default a GPU where there is one.
        sigma: Noise level of the pictures in units of 1/255, for weights that take it; None: it is unknown.
        tile: Largest side of a tile in pixels, 0 for each picture in one piece, or "auto": as memory allows.
        overlap: Pixels by which tiles overlap.
        precision: "fp32", or the type of autocast. A tile that comes out with values that are not finite is done again
            in fp32.
        self_ensemble: Restore each tile in its eight rotations and reflections, and average: eight times
            slower.
        luminance: With ``task`` denoise_color, denoise the luminance of the result once more by the weights for gray:
            for noise that the channels share, as that of cameras; twice as slow.

    Attributes:
        network, metadata: As the weights file gives them.
        scale: Factor by which pictures are enlarged.
        redone: How many tiles of half precision were done again in fp32 so far.
        used: Weights files by which pictures were restored so far.

    Raises:
        FileNotFoundError: If there are no such weights.
        ValueError: If an argument does not fit, or the weights do not fit the task.
    """

    def __init__(
        self,
        task: Task | None = None,
        *,
        weights: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        sigma: float | None = None,
        tile: int | Literal["auto"] = "auto",
        overlap: int = OVERLAP,
        precision: Precision = "fp32",
        self_ensemble: bool = False,
        luminance: bool = False,
    ) -> None:
        if task is not None and task not in TASKS:
            raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
        if precision not in _AUTOCAST:
            raise ValueError(f"unknown precision {precision!r}; it is one of {', '.join(_AUTOCAST)}")
        if tile != "auto" and tile != 0 and tile < MIN_TILE:
            raise ValueError(f"tile {tile} is too small: at least {MIN_TILE} pixels, 0 for the whole picture, or auto")
        if overlap < 0 or (tile not in ("auto", 0) and overlap >= tile):
            raise ValueError(f"overlap {overlap} must be at least 0 and smaller than the tile ({tile})")
        self.weights = find_weights(task or "denoise_color") if weights is None else Path(weights)
        self.device = choose_device(None if device is None else str(device))
        network, self.metadata = weight_files.load(self.weights, self.device)
        self.network = network.eval()
        self.task: Task = self.metadata["task"]
        if task is not None and task != self.task:
            raise ValueError(f"{self.weights} is for {self.task}, not for {task}: name other weights or another task")
        config = network.config
        self.channels: int = config["in_channels"]
        self.scale: int = config["scale"]
        self.sigma = self._checked_sigma(sigma, takes=config["sigma_input"])
        self.tile, self.overlap, self.precision, self.self_ensemble = tile, overlap, precision, self_ensemble
        options = dict(device=device, sigma=sigma, tile=tile, overlap=overlap, precision=precision)
        self._options = dict(options, self_ensemble=self_ensemble) if weights is None else None
        self._gray: RestorationInferencer | None = None
        self._luminance: RestorationInferencer | None = None
        if luminance:
            if self.task != "denoise_color" or self._options is None:
                raise ValueError("luminance is denoised with the task denoise_color and the weights that come along")
            self._luminance = RestorationInferencer("denoise_gray", **self._options | dict(sigma=None))
        self.redone = 0
        self.used: set[Path] = set()
        self._bytes_per_pixel: float | None = None
        self._largest: int | None = None  # of a tile, once memory ran out
        self._said: set[str] = set()

    def __call__(self, picture, progress: Progress | None = None, *, mask: np.ndarray | None = None):
        """Restore one picture, or several.

        Args:
            picture: One of

                - array, uint8 or uint16: (H, W) gray, (H, W, 3) RGB, or (H, W, 2 or 4) with alpha; the same comes back;
                - Pillow image; one comes back, upright and of mode L, LA, RGB, RGBA or I;16;
                - path of a photo: an array comes back;
                - path of a folder, glob pattern, or a sequence of all these: a list comes back.
            progress: See ``Progress``.
            mask: For inpainting: bool (H, W), true where the picture is to be filled; all else is kept as it is.
                Without it, what is black is filled as the network sees fit.

        Raises:
            ValueError: If a picture cannot be restored by these weights, or a file is no photo, or a mask does not fit.
            FileNotFoundError: If there is nothing at a path.
            MemoryError: If memory does not even suffice for the smallest tiles.
        """
        if isinstance(picture, np.ndarray):
            return to_array(self.restore(from_array(picture), progress, mask=mask))
        if isinstance(picture, Image.Image):
            return to_pil(self.restore(from_pil(picture), progress, mask=mask))
        if isinstance(picture, str | os.PathLike):
            path = Path(picture)
            if has_magic(str(path)) and not path.exists():
                return [self(file, progress, mask=mask) for file in find_files(str(path))]
            if path.is_dir():
                return [self(file, progress, mask=mask) for file, _ in find_photos(path)]
            return to_array(self.restore(read_photo_file(path), progress, mask=mask))
        if isinstance(picture, Sequence):
            return [self(one, progress, mask=mask) for one in picture]
        raise ValueError(f"a picture is an array, a Pillow image or a path, not a {type(picture).__name__}")

    def restore(
        self, photo: PhotoFile, progress: Progress | None = None, *, mask: np.ndarray | None = None
    ) -> PhotoFile:
        """Restore a photo with all that belongs to it; its transparency is kept, or enlarged. Raises as a call does."""
        if mask is None:
            return photo.restored(self._restored(photo.pixels, progress))
        self.check_masks()
        height, width = photo.pixels.shape[:2]
        if mask.dtype != bool or mask.shape != (height, width):
            raise ValueError(f"the mask of a {width}x{height} picture is bool (H, W), not {mask.dtype} {mask.shape}")
        masked = mask[..., None]
        filled = self._restored(np.where(masked, 0, photo.pixels), progress)
        return photo.restored(np.where(masked, filled, photo.pixels))

    def check_masks(self) -> None:
        """Check that these weights fill masks. Raises ValueError if not."""
        if self.task != "inpaint":
            raise ValueError(f"a mask is for the task inpaint, {self.weights.name} is for {self.task}")

    def _restored(self, pixels: np.ndarray, progress: Progress | None) -> np.ndarray:
        height, width, channels = pixels.shape
        if self.channels == 3 and is_gray(pixels):
            if self._in_gray():
                return _tinted(self._gray._restored(pixels[..., :1], progress), pixels)
            if self.task in _NOISE:
                self._say(f"{self.weights.name} is for colour: of a gray picture, noise may stay")
        if channels > self.channels:
            raise ValueError(f"the picture is in colour, {self.weights.name} is for gray: use a task for colour")
        give_freed_memory_back()  # of the picture before: it counts as used
        need = pixels.nbytes * self.scale**2
        if need > free_memory("cpu"):
            size = f"{width * self.scale}x{height * self.scale}"
            raise MemoryError(f"the result of {size} pixels needs {need / 1e9:.1f} GB of memory, less is free")
        tile = self._choose_tile(height, width)
        while True:
            try:
                restored = self._in_tiles(pixels, tile, progress)
                self.used.add(self.weights)
                return restored if self._luminance is None else self._smoothed(restored, progress)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # outside the except clause, which holds the failed tile's tensors
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            tile = self._smaller(min(tile, max(height, width)))

    def _smoothed(self, pixels: np.ndarray, progress: Progress | None) -> np.ndarray:
        """Pixels (H, W, 3) with their luminance denoised."""
        luminance = np.stack([(row @ _LUMINANCE).round() for row in pixels]).astype(pixels.dtype)[..., None]
        denoised = self._luminance._restored(luminance, progress)
        self.used |= self._luminance.used
        return _tinted(denoised, np.concatenate([luminance, pixels], axis=2))[..., 1:]

    def _in_gray(self) -> bool:
        """Whether there are weights for the task in gray; loads them."""
        if self._gray is None and self._options is not None and self.task in GRAY:
            with contextlib.suppress(FileNotFoundError):
                self._gray = RestorationInferencer(GRAY[self.task], **self._options)
                self._gray.used = self.used
        return self._gray is not None

    def _choose_tile(self, height: int, width: int) -> int:
        whole = max(height, width)
        if self.tile == "auto":
            if whole <= MIN_TILE:
                return whole
            tile = choose_tile(height, width, self._measured(), free_memory(self.device), self.device)
        elif self.tile == 0:
            if whole > MIN_TILE:
                check_fits(height, width, self._measured(), self.device)
            return whole
        else:
            tile = self.tile
        return min(tile, self._largest or tile)

    def _measured(self) -> float:
        if self._bytes_per_pixel is None:
            with torch.inference_mode():
                self._bytes_per_pixel = measure_bytes_per_pixel(self.restore_tile, self.channels, self.device)
        return self._bytes_per_pixel

    def _smaller(self, tile: int) -> int:
        if tile <= MIN_TILE or self.tile == 0:
            advice = "use --tile auto" if self.tile == 0 else "nothing smaller is of use"
            free = f"{free_memory(self.device) / 1e9:.2f} GB"
            raise MemoryError(f"out of memory on {self.device} with tiles of {tile} pixels, {free} are free: {advice}")
        self._largest = max(tile // 2 // ALIGNMENT * ALIGNMENT, MIN_TILE)
        self._say(f"out of memory on {self.device}: going on with tiles of {self._largest} pixels")
        return self._largest

    @torch.inference_mode()
    def _in_tiles(self, pixels: np.ndarray, tile: int, progress: Progress | None) -> np.ndarray:
        height, width, channels = pixels.shape
        full = np.iinfo(pixels.dtype).max
        out = np.empty((height * self.scale, width * self.scale, channels), pixels.dtype)
        image = torch.from_numpy(pixels).permute(2, 0, 1).expand(self.channels, -1, -1)  # gray as three equal channels
        rows = tiled_rows(
            self.restore_tile, image, tile=tile, overlap=min(self.overlap, tile // 2), scale=self.scale,
            device=self.device, on_tile=progress,
        )  # fmt: skip
        for top, row in rows:
            row = row if channels == self.channels else row.mean(0, keepdim=True)
            row = (row.clamp_(0, 1) * full).round_().permute(1, 2, 0)
            out[top : top + len(row)] = row.numpy()
        return out

    def restore_tile(self, x: Tensor) -> Tensor:
        """Restore floats (1, C, H, W) in [0, 1] on the device in one piece; not clipped. In inference mode."""
        y = self._apply(x, _AUTOCAST[self.precision])
        if self.precision != "fp32" and not y.isfinite().all():
            self.redone += 1
            self._say(f"{self.precision} gave values that are not finite: such tiles are done again in fp32")
            y = self._apply(x, None)
        if not y.isfinite().all():
            raise ValueError(f"{self.weights} gives values that are not finite, even in fp32: the weights are broken")
        return y

    def _apply(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        options = {} if self.sigma is None else {"sigma": x.new_full((len(x),), self.sigma / 255)}
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if not self.self_ensemble:
                return self.network(x, **options).float()
            height, width = (side * self.scale for side in x.shape[2:])
            # turned, the blocks of JPEG and of the network's strides stay where they were
            x = pad_to_multiple(x, _BLOCK)
            total: Tensor | float = 0.0
            for transposed in (False, True):
                for axes in ((), (2,), (3,), (2, 3)):
                    turned = (x.mT if transposed else x).flip(axes)
                    y = self.network(turned.contiguous(), **options).float().flip(axes)
                    total = total + (y.mT if transposed else y)
            return total[..., :height, :width] / 8

    def _checked_sigma(self, sigma: float | None, *, takes: bool) -> float | None:
        if sigma is None:
            return None
        if not takes:
            raise ValueError(f"{self.weights.name} takes no noise level; leave out sigma")
        low, high = self.metadata.get("sigma_range", (0, 255))
        if not low <= sigma <= high:
            raise ValueError(f"sigma {sigma:g} is outside the {low:g} to {high:g} that {self.weights.name} is made for")
        return sigma

    def _say(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            print(f"note: {note}", file=sys.stderr)


def is_gray(pixels: np.ndarray) -> bool:
    """Whether pixels (H, W, C) have one channel, or three that differ by at most 3 of 255.

    Decoders of videos and WebP give gray such tints.
    """
    most = _TINT * np.iinfo(pixels.dtype).max // 255
    for part in (pixels[::16, ::16], pixels):  # of a photo in colour, few pixels tell
        if (part.max(2) - part.min(2)).max() > most:
            return False
    return True


def _tinted(gray: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """A restored first channel (H, W, 1) with the others of the picture (H, W, C) as far from it as they were."""
    if pixels.shape[2] == 1:
        return gray
    tint = pixels.astype(np.int32) - pixels[..., :1]
    return (gray + tint).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def find_weights(task: Task) -> Path:
    """The weights of a task that come with this project: of the largest Serpent, where there are several.

    Raises:
        FileNotFoundError: If there are none.
    """
    named = [WEIGHTS_FOLDER / f"serpent_{size}_{task}.safetensors" for size in SIZES]
    found = [path for path in named if path.is_file()]
    if not found:
        if not WEIGHTS_FOLDER.is_dir():
            raise FileNotFoundError(
                f"no weights for {task}: there is no folder {WEIGHTS_FOLDER}; they come with the checkout: "
                "start there, install it by pip install -e, or name a file"
            )
        there = [name for name in TASKS if any(WEIGHTS_FOLDER.glob(f"serpent_?_{name}.safetensors"))]
        raise FileNotFoundError(
            f"no weights for {task} in {WEIGHTS_FOLDER}, only for {', '.join(there) or 'nothing'}: name a file, or "
            "train one"
        )
    return found[0]


def find_files(pattern: str) -> list[Path]:
    """Files of a glob pattern, sorted.

    Raises:
        FileNotFoundError: If there are none.
    """
    files = [Path(file) for file in sorted(glob(pattern, recursive=True)) if os.path.isfile(file)]
    if not files:
        raise FileNotFoundError(f"{pattern}: no file is named like this")
    return files
