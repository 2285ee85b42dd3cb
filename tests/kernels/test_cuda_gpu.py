"""What only a GPU shows of the CUDA kernels: sizes, streams, devices, the compiler, compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from mambavision.ops import multi_scan, selective_scan
from tests.kernels.test_backends import GRIDS, Case, make

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
CASE = Case(196, 16, "bf16", 33)


def inputs(case: Case = CASE, device: str = "cuda") -> dict[str, torch.Tensor]:
    return {k: v.to(device).requires_grad_() for k, v in make(case).items()}


def step(leaves, case: Case = CASE, backend: str = "cuda") -> list[torch.Tensor]:
    """y and the gradients of its sum of squares."""
    y = multi_scan(**leaves, orders=case.orders, grid=GRIDS[case.length], backend=backend)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))]


def test_gradients_beyond_32_bits():
    """delta and its gradient have 2.2e9 elements: the last image's addresses do not fit an int32."""
    free = torch.cuda.mem_get_info()[0]
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free >> 30} are free")
    batch, length, dim, scans = 33, 16384, 1024, 4
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    leaves = [normal(batch, length, dim), normal(batch, length, scans, dim), normal(batch, length, scans, 1)]
    leaves.append(normal(batch, length, scans, 1))
    A, dy = -torch.ones(scans, dim, 1, device="cuda"), normal(batch, length, dim)

    def gradients(images):
        x, delta, B, C = (v[images].detach().requires_grad_() for v in leaves)
        y = multi_scan(x, delta, A, B, C, orders="cross", grid=(128, 128), backend="cuda")
        return torch.autograd.grad(y, (x, delta, B, C), dy[images])

    whole = gradients(slice(None))
    for i in (0, 17, batch - 1):
        for all_images, alone in zip(whole, gradients(slice(i, i + 1)), strict=True):
            error = (all_images[i].float() - alone[0].float()).norm() / alone.float().norm()
            assert error < 1e-2  # one image may be cut into segments


def test_a_kernel_runs_on_the_current_stream():
    """Its inputs are written late on that stream and its outputs copied there at once; no other stream waits."""
    leaves = {k: v.detach() for k, v in inputs().items()}
    scaled = [{k: v * (i + 1) if k == "x" else v for k, v in leaves.items()} for i in range(3)]
    step({k: v.clone().requires_grad_() for k, v in leaves.items()})  # compiles
    torch.cuda.synchronize()
    got = []
    for values in scaled:
        with torch.cuda.stream(torch.cuda.Stream()):
            late = {k: torch.zeros_like(v) for k, v in values.items()}
            torch.cuda._sleep(20_000_000)
            for k, v in late.items():
                v.copy_(values[k])
            got.append([v.clone() for v in step({k: v.requires_grad_() for k, v in late.items()})])
    torch.cuda.synchronize()
    for values, results in zip(scaled, got, strict=True):
        want = step({k: v.clone().requires_grad_() for k, v in values.items()})
        assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_kernel_runs_on_the_device_of_its_tensors():
    first, second = (step(inputs(device=f"cuda:{i}")) for i in (0, 1))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert a.get_device() == 0 and b.get_device() == 1
        assert torch.equal(a.cpu(), b.cpu())


def test_compiled_in_one_graph_for_any_length():
    names = list(make(replace(CASE, op="selective_scan")))

    def function(*values):
        return selective_scan(**dict(zip(names, values, strict=True)), delta_softplus=True, backend="cuda")

    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (17, 70, 196, 1134):
        case = replace(CASE, op="selective_scan", length=length, dtype="fp32")
        leaves = list(inputs(case).values())
        got, want = compiled(*leaves), function(*leaves)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1, "one graph serves every length"


@lru_cache
def sanitizer() -> str | None:
    roots = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *(f"{r}/bin" for r in roots)]))


@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not on the path nor in CUDA_HOME")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    command += [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "scanned" in done.stdout, (done.stdout + done.stderr)[-4000:]
