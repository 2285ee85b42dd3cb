"""A small call of every kernel in CUDA C++, for compute-sanitizer: ``compute-sanitizer python sanitized.py``.

With ``lockstep`` behind it, for racecheck: see :func:`in_lockstep`.

Inputs are made on the CPU, and ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` gives each tensor an allocation of its own, so that
an access outside of one is seen. Prints the names of the kernels that ran.
"""

import re
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mambavision.kernels import cuda_layout, nvrtc
from mambavision.ops import multi_scan, selective_scan, ssd

device = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# batch, grid, scans, channels, N, type: both tiles, lanes, segments, kept states and none, scans merged on chip
SCANS = [
    (1, (1, 37), 2, 5, 16, BF16),
    (2, (1, 41), 1, 67, 1, FP32),
    (1, (10, 53), 2, 3, 2, FP16),
    (1, (5, 10), 1, 9, 17, FP16),
    (8, (5, 9), 4, 240, 1, BF16),
    (8, (32, 33), 4, 240, 1, BF16),
    (2, (7, 7), 4, 96, 1, BF16),
]
SSDS = [  # length, heads, P, N, groups, chunk, both directions, initial and last states
    (150, 2, 24, 40, 1, 64, True, False),
    (70, 4, 64, 64, 2, 32, False, False),
    (300, 2, 64, 16, 2, 32, True, True),
    (520, 3, 64, 64, 1, None, True, False),
    (520, 3, 64, 64, 1, None, False, True),
]


# warp w meets all others w times before it takes over and WARPS - w times once it has passed on: one after the other
LOCKSTEP = {
    "pass_on": "for (int n = threadIdx.x / 32; n < blockDim.x / 32; n++) __syncthreads();",
    "take_over": "for (int n = 0; n < threadIdx.x / 32; n++) __syncthreads();",
}


def in_lockstep(folder: Path) -> None:
    """Let warps hand on what they have by barriers of the whole block.

    Racecheck does not follow bar.arrive: it reports two warps that do nothing but hand a number on through it
    (kernels/README.md).
    """
    intrinsics, *others = cuda_layout.MERGING
    text = intrinsics.read_text()
    for name, body in LOCKSTEP.items():
        text, count = re.subn(rf"(INLINE void {name}\(int id\)) {{[^}}]*}}", rf"\1 {{ {body} }}", text)
        assert count == 1, name
    changed = folder / intrinsics.name
    changed.write_text(text)
    cuda_layout.MERGING = (changed, *others)


def normal(*shape: int, to: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(to).to(device)


def there_and_back(function, tensors: dict[str, Tensor], **options) -> None:
    with torch.no_grad():
        function(**tensors, **options)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = function(**leaves, **options)
    ys = y if isinstance(y, tuple) else (y,)
    torch.autograd.grad(ys, list(leaves.values()), [normal(*v.shape, to=v.dtype) for v in ys])


def scans(batch: int, grid: tuple[int, int], K: int, channels: int, N: int, dtype: torch.dtype) -> None:
    length = grid[0] * grid[1]
    tensors = {
        "x": normal(batch, length, channels, to=dtype),
        "delta": normal(batch, length, K, channels, to=dtype),
        "A": -(-normal(K, channels, N).abs()).exp(),
        "B": normal(batch, length, K, N, to=dtype),
        "C": normal(batch, length, K, N, to=dtype),
        "D": normal(K, channels),
        "delta_bias": normal(K, channels),
    }
    orders = ("row", "col", "row_reverse", "col_reverse")[:K]
    there_and_back(multi_scan, tensors, orders=orders, grid=grid, backend="cuda")
    tensors["initial_state"] = normal(batch, K, channels, N)
    there_and_back(multi_scan, tensors, orders=orders, grid=grid, merge=False, return_last_state=True, backend="cuda")


def sequences() -> None:
    tensors = {name: normal(2, 19, 50, to=BF16) for name in ("u", "delta", "z")}
    tensors |= {"A": -torch.ones(19, 4, device=device), "B": normal(2, 1, 4, 50, to=BF16)}
    there_and_back(selective_scan, tensors | {"C": normal(2, 1, 4, 50, to=BF16)}, delta_softplus=True, backend="cuda")


def dualities(length: int, H: int, P: int, N: int, G: int, chunk: int | None, both: bool, states: bool) -> None:
    tensors = {
        "x": normal(2, length, H, P, to=BF16),
        "dt": normal(2, length, H, to=BF16),
        "A": -normal(H).abs(),
        "B": normal(2, length, G, N, to=BF16),
        "C": normal(2, length, G, N, to=BF16),
        "D": normal(H),
        "dt_bias": normal(H),
    }
    if states:
        tensors["initial_state"] = normal(2, 2, H, P, N) if both else normal(2, H, P, N)
    options = {"dt_softplus": True, "bidirectional": both, "chunk_size": chunk, "return_last_state": states}
    there_and_back(ssd, tensors, **options, backend="cuda")


def call_all() -> None:
    """Every call; kernels of several calls and gradients, on ``device``."""
    torch.manual_seed(0)
    for shape in SCANS:
        scans(*shape)
    sequences()
    for shape in SSDS:
        dualities(*shape)


def main() -> None:
    names, make = set(), nvrtc.kernel

    def kernel(sources, name, *rest):
        names.add(name)
        return make(sources, name, *rest)

    nvrtc.kernel = kernel
    with tempfile.TemporaryDirectory() as folder:
        if "lockstep" in sys.argv[1:]:
            in_lockstep(Path(folder))
        call_all()
    torch.cuda.synchronize()
    print("ran", *sorted(names))


if __name__ == "__main__":
    main()
