"""Restoring pictures larger than memory: overlapping tiles, blended, row of tiles by row of tiles.

(C, H, W) are channels, height and width of a picture; s is the factor by which a network enlarges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mambavision.engine.memory import GROWING_SEGMENTS, free_memory, measure_peak, segments_grow

MIN_TILE = 64
ALIGNMENT = 32  # pixels; tiles start at multiples of a U-Net's stride, or its patches fall elsewhere than in the whole
_SHARE = {"cuda": 0.8, "cpu": 0.5}  # of the free memory that tiles may take: the GPU's peak is measured, the CPU's near
_SHARE_WHOLE = {"cuda": 0.8, "cpu": 1.0}  # the same of pictures in one piece
_SHARE_GROWING = 0.9  # the same where torch's allocator leaves no gaps
_LARGEST_ON_CPU = 768  # pixels; larger tiles are no faster there, and the progress bar stands still for minutes
_PROBE = {"cuda": 256, "cpu": 128}  # pixels, side of the tile whose memory is measured
_ASSUMED = 16384  # bytes a pixel, where the system does not tell how much memory a probe took
_FULL = {torch.uint8: 255, torch.uint16: 65535}  # white

Network = Callable[[Tensor], Tensor]  # (1, C, H, W) in [0, 1] -> (1, C, s*H, s*W)


def run_tiled(
    network: Network,
    image: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: int = 1,
    device: str | torch.device = "cpu",
    on_tile: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Restore a picture tile by tile; see :func:`tiled_rows`.

    Returns:
        float32 (C, s*H, s*W), on the CPU.
    """
    rows = tiled_rows(network, image, tile=tile, overlap=overlap, scale=scale, device=device, on_tile=on_tile)
    return torch.cat([row for _, row in rows], dim=1)


def tiled_rows(
    network: Network,
    image: Tensor,
    *,
    tile: int,
    overlap: int,
    scale: int = 1,
    device: str | torch.device = "cpu",
    on_tile: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Restore a picture tile by tile, and yield its rows as they are finished.

    Where tiles overlap, they are blended by weights that fall as a raised cosine and sum to one. In memory at a time
    are one tile on the device, and one row of tiles as floats on the CPU.

    Args:
        network: Restores one tile; see ``Network``.
        image: (C, H, W) on the CPU: floats, or uint8 or uint16 that are scaled to [0, 1].
        tile: Largest side of a tile, pixels of ``image``.
        overlap: Least overlap of neighbouring tiles, pixels of ``image``.
        scale: The network's s.
        device: Where the network is.
        on_tile: Called after each tile with how many are done and how many there are.

    Yields:
        (first row, float32 (C, rows, s*W) on the CPU), from top to bottom.

    Raises:
        ValueError: If the overlap is negative or not smaller than the tile.
    """
    height, width = image.shape[1:]
    rows, columns = tile_spans(height, tile, overlap), tile_spans(width, tile, overlap)
    row_weights = [w.to(device) for w in blend_weights(rows, scale)]
    column_weights = [w.to(device) for w in blend_weights(columns, scale)]
    done = 0
    band = torch.empty(image.shape[0], 0, width * scale)
    for index, (top, bottom) in enumerate(rows):
        grown = torch.zeros(image.shape[0], (bottom - top) * scale, width * scale)
        grown[:, : band.shape[1]] = band  # what earlier rows of tiles have left of their lower edges
        band = grown
        for (left, right), weight in zip(columns, column_weights, strict=True):
            y = network(_as_float(image[None, :, top:bottom, left:right].to(device)))[0].float()
            y = y * weight * row_weights[index][:, None]
            band[:, :, left * scale : right * scale] += y.cpu()
            done += 1
            if on_tile is not None:
                on_tile(done, len(rows) * len(columns))
        finished = (rows[index + 1][0] if index + 1 < len(rows) else height) - top
        yield top * scale, band[:, : finished * scale]
        band = band[:, finished * scale :]


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Cut a side into the fewest tiles, all of about the same length; returns (start, stop) of each.

    Starts are multiples of ``ALIGNMENT`` where there are several, and overlaps may be larger than asked for by that.

    Raises:
        ValueError: If the overlap is negative or not smaller than the tile.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} pixels cannot overlap by {overlap}: pass 0 <= overlap < tile")
    if length <= tile:
        return [(0, length)]
    unit = ALIGNMENT if tile >= 2 * ALIGNMENT else 1
    whole, most = math.ceil(length / unit), tile // unit
    shared = min(math.ceil(overlap / unit), most - 1)
    count = math.ceil((whole - shared) / (most - shared))
    size = math.ceil((whole + (count - 1) * shared) / count)
    starts = [round(index * (whole - size) / max(count - 1, 1)) for index in range(count)]
    return [(start * unit, min((start + size) * unit, length)) for start in starts]


def blend_weights(spans: list[tuple[int, int]], scale: int = 1) -> list[Tensor]:
    """Weights of overlapping spans, one (s*length,) each: raised cosines over the overlaps, of sum one everywhere."""
    weights = [torch.ones((stop - start) * scale) for start, stop in spans]
    for (earlier, later), ((_, stop), (start, _)) in zip(pairwise(weights), pairwise(spans), strict=True):
        n = (stop - start) * scale
        if n > 0:
            rise = 0.5 - 0.5 * torch.cos(math.pi * (torch.arange(n) + 0.5) / n)
            later[:n] *= rise
            earlier[-n:] *= 1 - rise
    total = torch.zeros(spans[-1][1] * scale)  # one, but where three spans meet
    for (start, stop), weight in zip(spans, weights, strict=True):
        total[start * scale : stop * scale] += weight
    return [weight / total[start * scale : stop * scale] for (start, stop), weight in zip(spans, weights, strict=True)]


def choose_tile(height: int, width: int, bytes_per_pixel: float, free: int, device: str | torch.device) -> int:
    """Side of the largest tile that memory allows for a picture; at least ``MIN_TILE``.

    Args:
        height, width: Of the picture, pixels.
        bytes_per_pixel: What the network takes, see :func:`measure_bytes_per_pixel`.
        free: Bytes that are free on the device.
        device: Where the network is.
    """
    device = torch.device(device)
    pixels = _SHARE[device.type] * free / bytes_per_pixel
    side = max(height, width)
    if device.type == "cpu" and side > _LARGEST_ON_CPU:
        side = _LARGEST_ON_CPU
    if min(side, height) * min(side, width) <= pixels:
        return max(side, MIN_TILE)
    return max(int(math.sqrt(pixels)) // ALIGNMENT * ALIGNMENT, MIN_TILE)


def measure_bytes_per_pixel(network: Network, channels: int, device: str | torch.device) -> float:
    """Run a network on a small tile and return the memory it took beside its weights, in bytes per input pixel.

    The tile itself is counted.
    """
    device = torch.device(device)
    side = _PROBE[device.type]
    x = torch.rand(1, channels, side, side).to(device)
    if device.type == "cuda":
        network(x)  # workspaces of the libraries, made once
    taken = measure_peak(lambda: network(x), device)
    return float(_ASSUMED) if taken is None else max(taken, 0) / side**2 + 4.0 * channels


def check_fits(height: int, width: int, bytes_per_pixel: float, device: str | torch.device) -> None:
    """Check that a picture fits the device in one piece, before it is begun.

    On a GPU, tensors may take 0.8 of the free memory: torch's allocator leaves gaps between blocks of hundreds of MB.
    Of an H100's 83.9 GB free, 72.1 GB of tensors (8192x8192 pixels, Serpent-S, bf16) ran out of memory, and 55.6 GB
    (7168x7168) did not, for which 81.2 GB were reserved. With ``GROWING_SEGMENTS`` 0.9: 72.1 GB and 77.0 did not.

    Raises:
        MemoryError: If it does not fit; says what it needs, with what the allocator does.
    """
    device = torch.device(device)
    grows = device.type == "cuda" and segments_grow()
    tensors, free = height * width * bytes_per_pixel, free_memory(device)
    need = tensors / (_SHARE_GROWING if grows else _SHARE_WHOLE[device.type])
    if need > free:
        advice = "use --tile auto"
        if device.type == "cuda" and not grows and tensors / _SHARE_GROWING <= free:
            advice += f", or set {GROWING_SEGMENTS}, with which {tensors / _SHARE_GROWING / 1e9:.1f} GB do"
        raise MemoryError(
            f"{width}x{height} pixels in one piece need about {need / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are "
            f"free: {advice}"
        )


def _as_float(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x.float() / _FULL[x.dtype]
