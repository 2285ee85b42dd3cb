"""A small shape of every CUDA scan kernel, for compute-sanitizer: ``compute-sanitizer python sanitized.py``.

Inputs are made on the CPU and tensors have allocations of their own, so that an access outside of one is seen.
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from mambavision.kernels import cuda

SHAPES = [  # batch, length, scans, channels, N, type: both tiles, several segments, lanes and kept states
    (1, 37, 2, 5, 16, torch.bfloat16),
    (2, 41, 1, 67, 1, torch.float32),
    (1, 530, 2, 3, 2, torch.float16),
    (1, 50, 1, 9, 17, torch.float32),
]


def scan_there_and_back(batch: int, length: int, scans: int, channels: int, N: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)

    def normal(*shape, to=dtype):
        return torch.randn(shape, generator=g).to(to).to("cuda")

    f32 = torch.float32
    order = torch.stack([torch.randperm(length, generator=g) for _ in range(scans)]).to("cuda", torch.int32)
    inputs = [normal(batch, length, 1, channels), normal(batch, length, scans, channels)]
    inputs += [-torch.rand(scans, channels, N, generator=g).to("cuda")]
    inputs += [normal(batch, length, scans, N), normal(batch, length, scans, N)]
    inputs += [
        normal(scans, channels, to=f32),
        normal(scans, channels, to=f32),
        normal(batch, scans, channels, N, to=f32),
    ]
    dy, dlast = normal(batch, length, channels), normal(batch, scans, channels, N, to=f32)
    kept = cuda.kept_states(*inputs[:3])
    for starts in (None, kept and torch.empty(kept[0], dtype=kept[1], device="cuda")):
        cuda.scan(*inputs, order, True, True, starts=starts)
        cuda.scan_backward(dy, dlast, *inputs, order, True, True, starts=starts)
    torch.cuda.synchronize()


if __name__ == "__main__":
    for shape in SHAPES:
        scan_there_and_back(*shape)
    print("scanned", len(SHAPES))
