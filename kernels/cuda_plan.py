"""How a scan in CUDA C++ is laid over a GPU: lanes, threads, segments of time, by shapes alone.

Constants and cases were measured on an H100 (README.md).
"""

import functools
import math
from typing import NamedTuple

GROUP = 16  # channels of a merging block
_STATIC = 48 << 10  # bytes of shared memory that a kernel declares, at most
_WITHOUT_COPIES = 96 << 10  # bytes of shared memory of the largest GPU without asynchronous copies, sm_70


class Plan(NamedTuple):
    """How a scan is laid over the GPU: ``split`` lanes a channel hold ``states`` each, ``tile`` steps at once."""

    states: int
    split: int
    tile: int
    threads: int
    segment: int
    keep_decay: bool = False
    resident: int = 1
    scans: int = 1

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.threads // (self.split * self.scans)

    @property
    def partials(self) -> int:
        """Bytes of a backward's buffers of a tile's dB and dC, of four channels at a time; one warp needs but one."""
        warps = self.threads // 32
        subsets = min(2, warps) * warps * max(1, 8 // self.split)
        return 4 * subsets * (self.tile * (2 * self.states * self.split + 4) + 16)

    def steps(self, gated: bool) -> int:
        """Bytes of shared memory that a backward declares: of every step dt, x, dy, slope and gate; B, C and rows."""
        of_warps = self.threads // 32 * self.tile * (32 // self.split + 1) * (24 if gated else 16)
        return of_warps + self.tile * (16 * self.states * self.split + 16)

    def fitting(self, gated: bool, shared: int) -> "Plan":
        """A backward of as many threads as a block's ``shared`` bytes, and the declared ones' limit, allow."""
        chosen = self
        while chosen.threads > 32 and (chosen.steps(gated) > _STATIC or chosen.steps(gated) + chosen.partials > shared):
            chosen = chosen._replace(threads=chosen.threads - 32)
        return chosen


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile_steps(N: int) -> int:
    """Steps of a backward's tile, which begins at a kept state."""
    return 8 if N == 1 else 16


@functools.lru_cache(4096)
def plan(batch: int, length: int, scans: int, channels: int, N: int, processors: int, *, backward: bool) -> Plan:
    """Few lanes a channel while that fills the GPU with 8 warps a processor; then segments of time; then more lanes.

    Where 8 states a lane or kept decays begin to pay is measured on an H100 (README.md).
    """
    padded, wanted = _power_of_two(N), 8 * processors
    fewest, most, enough = max(1, padded // 16), min(padded, 16), 15 / 16 * wanted

    def warps(split: int) -> float:
        return batch * scans * channels * split / 32

    split = min(most, max(fewest, padded // (4 if backward and padded > 4 else 2 if backward else 16)))
    while split < most and padded // split > 4:
        each = padded // split
        if warps(split) >= wanted or (each == 8 and warps(split) * (2 if length >= 1024 else 1) >= enough):
            break
        split *= 2
    roomy = backward and padded == 16 and length >= 1024
    segments = math.ceil(wanted / warps(split) - 1 / 8)
    if roomy and segments > 1 and not (segments <= 4 and enough <= segments * warps(split) <= wanted):
        segments = int(2.95 * wanted / warps(split))  # just under three waves of blocks
    segments = max(1, min(segments, length // 256))
    while split < most and segments == 1 and warps(split) < enough:
        split *= 2
    states = padded // split
    tile = tile_steps(N) if backward else 16
    blocks = -(-channels * split // (32 if backward and padded > 64 else 128))
    threads = -(-channels * split // (32 * blocks)) * 32
    segment = -(-length // (segments * tile)) * tile
    lone = backward and N == 1
    # with two blocks a processor the 16 steps x 4 states of decays of a tile fit into a lane's registers
    keep = lone or (backward and padded == 16 and states == 4)
    resident = (480 if lone else 256 if keep else 384 if backward or states == 16 else 512) // threads
    return Plan(states, split, tile, threads, segment, keep_decay=keep, resident=resident)


@functools.lru_cache(4096)
def team_plan(batch: int, length: int, scans: int, channels: int, N: int, processors: int, shared: int) -> Plan | None:
    """A warp for each scan in a block, whose outputs add up on chip: one launch for a small call. None for others.

    ``shared``: bytes of shared memory a block may have.
    """
    padded = _power_of_two(N)
    split = max(1, min(padded, 16) // 2)
    blocks = batch * -(-channels * split // 32)
    sums = scans * length * 32 // split * 4
    few = 1 < scans <= 8 and scans * padded <= 128 and blocks <= 3 / 2 * processors
    if not few or length >= 512 or sums > shared - _STATIC:
        return None
    return Plan(padded // split, split, 16, 32 * scans, -(-length // 16) * 16, scans=scans)


class Merged(NamedTuple):
    """How scan_merged.cu is laid over the GPU, in blocks of 16 channels."""

    threads: int
    resident: int


@functools.lru_cache(4096)
def merged_plan(
    batch: int, length: int, channels: int, row: int, processors: int, shared: int, *, backward: bool
) -> Merged | None:
    """How to sum the scans of one state a channel on chip, or None where that does not fit or leave the GPU idle.

    ``row``: bytes of a token's 16 channels in all that is copied; ``shared``: bytes of shared memory a block may have.
    """
    blocks = batch * channels // GROUP
    if channels % GROUP or length >= 2**24 or blocks < 7 / 8 * processors or shared <= _WITHOUT_COPIES:
        return None
    spans = -(-length // 32)  # of a warp
    each = 32 * row + (1152 if backward else 448)
    wanted = max(2, 15 // max(1, shared // bytes_of_sums(length)))
    if backward and length <= 1600:
        wanted = 2 if spans <= 8 else 4
    most = min(wanted, (shared - bytes_of_sums(length) - 1152) // each)
    if most < min(spans, wanted, 4):
        return None
    warps = -(-spans // -(-spans // most))
    return Merged(32 * warps, max(1, (256 if backward else 512) // (32 * warps)))


def bytes_of_sums(length: int) -> int:
    """Bytes of a merging block's sums."""
    return -(-length // 2) * 2 * GROUP * 4
