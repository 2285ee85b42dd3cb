"""dev: shapes of kernels/README.md, checks, times, plan sweeps."""
import sys, time, threading, traceback, statistics
from concurrent.futures import ThreadPoolExecutor
import torch
from mambavision.kernels import cuda, reference, chunked
from mambavision.ops import order_table
SHAPES = {  # B D K grid N
    "VMamba-T": (64, 192, 4, (56, 56), 1), "stage2": (64, 384, 4, (28, 28), 1), "stage3": (64, 768, 4, (14, 14), 1),
    "stage4": (64, 1536, 4, (7, 7), 1),
    "P2": (16, 128, 4, (160, 160), 16), "P3": (16, 256, 4, (80, 80), 16), "P5": (1, 512, 4, (20, 20), 16), "P5x16": (16, 512, 4, (20, 20), 16),
    "DiM256": (64, 2304, 1, (16, 16), 16), "DiM1024": (8, 2304, 1, (64, 64), 16),
    "Serpent": (1, 96, 4, (512, 512), 16), "next": (1, 192, 4, (256, 256), 16),
}
def make(name, dt=torch.bfloat16, seed=0):
    B, D, K, grid, N = SHAPES[name]
    L = grid[0] * grid[1]
    g = torch.Generator("cuda").manual_seed(seed)
    r = lambda *s: torch.randn(s, generator=g, device="cuda", dtype=dt)
    x = r(B, L, 1, D); delta = r(B, L, K, D).mul_(.5)
    A = -torch.rand(K, D, N, generator=g, device="cuda") * 2 - .1
    Bm, C = r(B, L, K, N), r(B, L, K, N)
    Dp = torch.rand(K, D, generator=g, device="cuda"); bias = torch.rand(K, D, generator=g, device="cuda") * .3
    order = order_table("cross", grid, x.device).index if K > 1 else None
    return x, delta, A, Bm, C, Dp, bias, None, order
def times(f, n=15):
    for _ in range(2): f()
    ev = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for a, b in ev: a.record(); f(); b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in ev)
tl = threading.local()
orig_plan, orig_merged = cuda.plan, cuda.merged_plan
def plan(*a, backward):
    p = getattr(tl, "plan", None)
    return p if p is not None else orig_plan(*a, backward=backward)
def merged_plan(*a, backward):
    m = getattr(tl, "merged_back" if backward else "merged", 0)
    return orig_merged(*a, backward=backward) if m == 0 else m
cuda.plan, cuda.merged_plan = plan, merged_plan
layout_cached = cuda._layout
cuda._layout = cuda._layout.__wrapped__
M, P = cuda.Merged, cuda.Plan
def err(a, b):
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-9))
