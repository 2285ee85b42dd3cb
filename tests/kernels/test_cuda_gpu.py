"""What only a GPU shows of the CUDA kernels: sizes, streams, devices, the compiler, compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from mambavision.ops import multi_scan, selective_scan, ssd
from tests.kernels.test_backends import GRIDS, Case, make
from tests.kernels.test_emulated import ALL

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
CASE = Case(196, 16, "bf16", 33)
OPS = ["scan", "ssd"]


def scan(**tensors) -> Tensor:
    return multi_scan(**tensors, orders=CASE.orders, grid=GRIDS[CASE.length], backend="cuda")


def duality(**tensors) -> Tensor:
    return ssd(**tensors, dt_softplus=True, bidirectional=True, backend="cuda")


def duality_inputs(batch: int, length: int, H: int, P: int, N: int, dtype=torch.bfloat16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (batch, length, H, P),
        "dt": (batch, length, H),
        "B": (batch, length, 1, N),
        "C": (batch, length, 1, N),
    }
    tensors = {k: torch.randn(v, generator=g).to(dtype) for k, v in shapes.items()}
    return tensors | {k: torch.randn(H, generator=g) for k in ("D", "dt_bias")} | {"A": -torch.rand(H, generator=g)}


def call(op: str, device: str = "cuda"):
    """A function of either operator and its tensors."""
    function, tensors = (scan, make(CASE)) if op == "scan" else (duality, duality_inputs(2, 520, 3, 64, 64))
    return function, {k: v.to(device) for k, v in tensors.items()}


def step(function, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Output and the gradients of its sum of squares."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    y = function(**leaves)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))]


def needs_memory(gib: int) -> None:
    """Skips a test where fewer GiB of GPU memory are free, once what torch keeps of a test before is given back."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free} are free")


def test_gradients_beyond_32_bits():
    """delta and its gradient have 2.2e9 elements: the last image's addresses do not fit an int32."""
    needs_memory(40)
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


def test_gradients_of_state_space_duality_beyond_32_bits():
    """x and its gradient have 2.3e9 elements."""
    needs_memory(40)
    batch, length, H, P, N = 34, 16384, 64, 64, 16
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    leaves = normal(batch, length, H, P), normal(batch, length, H), *(normal(batch, length, 1, N) for _ in range(2))
    A, dy = -torch.ones(H, device="cuda"), normal(batch, length, H, P)

    def gradients(sequences):
        x, dt, B, C = (v[sequences].detach().requires_grad_() for v in leaves)
        return torch.autograd.grad(duality(x=x, dt=dt, A=A, B=B, C=C), (x, dt, B, C), dy[sequences])

    whole = gradients(slice(None))
    for i in (0, 17, batch - 1):
        for of_all, alone in zip(whole, gradients(slice(i, i + 1)), strict=True):
            assert (of_all[i].float() - alone[0].float()).norm() < 2e-2 * alone.float().norm()


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_runs_on_the_current_stream(op):
    """Its inputs are written late on that stream and its outputs copied there at once; no other stream waits."""
    function, tensors = call(op)
    scaled = [{k: v * (i + 1) if k == "x" else v for k, v in tensors.items()} for i in range(3)]
    step(function, tensors)  # compiles
    torch.cuda.synchronize()
    got = []
    for values in scaled:
        with torch.cuda.stream(torch.cuda.Stream()):
            late = {k: torch.zeros_like(v) for k, v in values.items()}
            torch.cuda._sleep(20_000_000)
            for k, v in late.items():
                v.copy_(values[k])
            got.append([v.clone() for v in step(function, late)])
    torch.cuda.synchronize()
    for values, results in zip(scaled, got, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, step(function, values), strict=True))


@pytest.mark.parametrize("op", OPS)
def test_threads_launch_on_streams_of_their_own(op):
    """They share what is worked out once for a layout, and a launch lets other threads go on."""
    function, tensors = call(op)
    values = [{k: v * (i + 1) if k == "x" else v for k, v in tensors.items()} for i in range(4)]
    want = [step(function, of_thread) for of_thread in values]
    torch.cuda.synchronize()

    def work(of_thread):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [step(function, of_thread) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(len(values)) as pool:
        for expected, found in zip(want, pool.map(work, values), strict=True):
            assert all(torch.equal(a, b) for one in found for a, b in zip(one, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_two_devices_at_once(op):
    """A thread each, with the first device current in both."""
    calls = [call(op, f"cuda:{i}") for i in (0, 1)]
    want = [step(*one) for one in calls]
    with ThreadPoolExecutor(2) as pool:
        for expected, found in zip(want, pool.map(lambda one: [step(*one) for _ in range(20)], calls), strict=True):
            assert all(torch.equal(a, b) for one in found for a, b in zip(one, expected, strict=True))
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_runs_on_the_device_of_its_tensors(op):
    first, second = (step(*call(op, f"cuda:{i}")) for i in (0, 1))
    assert torch.cuda.current_device() == 0
    for a, b in zip(first, second, strict=True):
        assert a.get_device() == 0 and b.get_device() == 1
        assert torch.equal(a.cpu(), b.cpu())


def test_a_graph_replays_a_training_step_of_state_space_duality():
    function, tensors = call("ssd")
    with torch.cuda.stream(torch.cuda.Stream()):  # kernels are compiled outside the graph
        step(function, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(function, tensors)
    tensors["x"].mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(function, tensors), strict=True))


def selective(**tensors) -> Tensor:
    return selective_scan(**tensors, delta_softplus=True, backend="cuda")


def selective_of(length: int) -> dict[str, Tensor]:
    return make(replace(CASE, op="selective_scan", length=length, dtype="fp32"))


def image(**tensors) -> Tensor:
    """``scan`` of images, whose height and width are its grid."""
    tokens = {k: v.flatten(1, 2) if k in ("x", "delta", "B", "C") else v for k, v in tensors.items()}
    return multi_scan(**tokens, orders=CASE.orders, grid=tuple(tensors["x"].shape[1:3]), backend="cuda")


def image_of(length: int) -> dict[str, Tensor]:
    tokens = make(replace(CASE, length=length, dtype="fp32"))
    return {k: v.unflatten(1, GRIDS[length]) if k in ("x", "delta", "B", "C") else v for k, v in tokens.items()}


def duality_of(length: int) -> dict[str, Tensor]:
    return duality_inputs(2, length, 3, 64, 64)


@pytest.mark.parametrize(
    "function, inputs, tol",
    [(selective, selective_of, 1e-5), (image, image_of, 1e-5), (duality, duality_of, 1e-2)],
    ids=["selective_scan", "multi_scan", "ssd"],
)
def test_compiled_in_one_graph_for_any_length(function, inputs, tol):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (63, 65, 196, 1134):
        tensors = {k: v.cuda() for k, v in inputs(length).items()}
        got, want = step(compiled, tensors), step(function, tensors)
        torch.testing.assert_close(got, want, rtol=10 * tol, atol=10 * tol * max(float(v.abs().max()) for v in want))
    assert counter.frame_count == 1, "one graph serves every length"


@lru_cache
def sanitizer() -> str | None:
    roots = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *(f"{r}/bin" for r in roots)]))


@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not on the path nor in CUDA_HOME")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
    command += [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
    command += ["lockstep"] * (tool == "racecheck")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[:3000] + done.stderr[-1000:]
    ran = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ran "))
    assert set(ran) >= ALL
