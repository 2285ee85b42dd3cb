"""What the GPU can do at most, measured: bytes a second of a copy, exp2 a second."""

from typing import NamedTuple

import torch

from bench.timing import in_turn


class Roofs(NamedTuple):
    """``bandwidth`` counts bytes read and bytes written."""

    bandwidth: float
    exp2_rate: float

    def floor_ms(self, moved: float, exponentials: float) -> float:
        """No call that moves so many bytes and takes so many exponentials can be faster."""
        return 1e3 * max(moved / self.bandwidth, exponentials / self.exp2_rate)


def measure(budget_s: float) -> Roofs:
    """A copy of 1 GiB, and 8 chains of exp2 a thread on every processor."""
    from bench.exp2 import kernel

    blocks, block, steps = 32 * torch.cuda.get_device_properties().multi_processor_count, 1024, 2000
    source = torch.zeros(2**28, device="cuda")
    target, out = torch.empty_like(source), torch.empty(blocks * block, device="cuda")
    runs = {
        "copy": lambda: target.copy_(source),
        "exp2": lambda: kernel[(blocks,)](out, STEPS=steps, BLOCK=block, num_warps=4),
    }
    in_turn(runs, "cuda", 1.0)  # an idle card takes that long to reach its clocks
    times = in_turn(runs, "cuda", budget_s)
    moved = 2 * source.numel() * source.itemsize
    return Roofs(1e3 * moved / times["copy"].median, 1e3 * blocks * block * steps / times["exp2"].median)
