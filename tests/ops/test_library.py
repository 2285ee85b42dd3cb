"""Registration (opcheck, compile, export, gradcheck), the choice of implementation, autocast."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mambavision.ops import Backend, describe_backends, multi_scan, order_table, scan_order, selective_scan, use_backend

ROOT = Path(__file__).resolve().parents[2]
GRID = (3, 4)


def selective_args(length=12, *, dtype=torch.float32, options=True, requires_grad=True, device="cpu"):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = {
        "u": normal(2, 4, length),
        "delta": normal(2, 4, length),
        "A": -torch.rand(4, 3, generator=g, dtype=torch.float64) - 0.1,
        "B": normal(2, 2, 3, length),
        "C": normal(2, 2, 3, length),
    }
    if options:
        args |= {"D": normal(4), "z": normal(2, 4, length), "delta_bias": normal(4), "initial_state": normal(2, 4, 3)}
    return {k: v.to(device, dtype).requires_grad_(requires_grad) for k, v in args.items()}


def multi_args(length=12, scans=4, *, dtype=torch.float32, rank=None, options=True, requires_grad=True, device="cpu"):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = {
        "x": normal(2, length, 5),
        "delta": normal(2, length, scans, rank or 5),
        "A": -torch.rand(scans, 5, 3, generator=g, dtype=torch.float64) - 0.1,
        "B": normal(2, length, scans, 3),
        "C": normal(2, length, scans, 3),
    }
    if options:
        args |= {"D": normal(scans, 5), "delta_bias": normal(scans, 5), "initial_state": normal(2, scans, 5, 3)}
    if rank:
        args["dt_weight"] = normal(scans, 5, rank)
    return {k: v.to(device, dtype).requires_grad_(requires_grad) for k, v in args.items()}


class Recorder(TorchDispatchMode):
    """Every mambavision:: operator that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mambavision":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def fresh(value, differentiable):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(differentiable and value.is_floating_point())
    return value


CALLS = {
    "selective": lambda backend, device: selective_scan(
        **selective_args(device=device), delta_softplus=True, return_last_state=True, backend=backend
    ),
    "selective bare": lambda backend, device: (
        selective_scan(**selective_args(options=False, device=device), backend=backend),
    ),
    "cross": lambda backend, device: multi_scan(
        **multi_args(device=device), orders="cross", grid=GRID, return_last_state=True, backend=backend
    ),
    "low rank, unmerged": lambda backend, device: (
        multi_scan(**multi_args(rank=2, device=device), orders="cross", grid=GRID, merge=False, backend=backend),
    ),
    "bare": lambda backend, device: (
        multi_scan(
            **multi_args(scans=2, options=False, device=device), orders=["hilbert", "col"], grid=GRID, backend=backend
        ),
    ),
}


def check_operators(call, backend, device="cpu"):
    """opcheck on each registered operator that one forward and backward of a public function runs."""
    with Recorder() as recorder:
        torch.autograd.backward([value.sum() for value in CALLS[call](backend, device)])
    names = {func.name() for func, _, _ in recorder.calls}
    assert len(names) >= 2, f"forward and backward are registered operators, saw only {names}"
    for func, args, kwargs in recorder.calls:
        schema = func._schema
        differentiable = "backward" not in schema.name
        args = tuple(fresh(value, differentiable) for value in args)
        kwargs = {name: fresh(value, differentiable) for name, value in kwargs.items()}
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call, backend):
    check_operators(call, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("call", CALLS)
def test_opcheck_on_cuda(call, backend):
    check_operators(call, backend, "cuda")


def test_plain_calls_go_straight_to_the_kernel_and_give_the_same_bits():
    args = selective_args(dtype=torch.float32, requires_grad=False)

    def call():
        return selective_scan(**args, delta_softplus=True, return_last_state=True, backend="cpu")

    def operators():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        return [event.key for event in profile.key_averages() if event.key.startswith("mambavision::")]

    direct = call()
    with Recorder() as recorder:
        recorded = call()
    assert [func.name() for func, _, _ in recorder.calls] == ["mambavision::scan"]
    assert operators() == ["mambavision::scan"], "a profile shows the operator"
    args["u"].requires_grad_()
    with_graph = call()
    assert with_graph[0].requires_grad and not direct[0].requires_grad
    for others in (recorded, with_graph):
        assert all(torch.equal(a, b) for a, b in zip(direct, others, strict=True))


def test_tracers_and_fake_tensors_see_the_operator():
    args = list(selective_args(requires_grad=False, options=False).values())

    def call(*values):
        return selective_scan(*values, delta_softplus=True, backend="cpu")

    graph = make_fx(call)(*args)
    assert any(node.target is torch.ops.mambavision.scan.default for node in graph.graph.nodes)
    torch.testing.assert_close(graph(*args), call(*args))
    with FakeTensorMode() as mode:
        y = call(*(mode.from_tensor(v) for v in args))
    assert isinstance(y, FakeTensor) and y.shape == args[0].shape


def test_gradcheck_selective_scan():
    args = selective_args(5, dtype=torch.float64)

    def function(*values):
        named = dict(zip(args, values, strict=True))
        return selective_scan(**named, delta_softplus=True, return_last_state=True, backend="chunked")

    torch.autograd.gradcheck(function, tuple(args.values()))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck_multi_scan(backend):
    args = multi_args(4, 2, dtype=torch.float64, rank=2)

    def function(*values):
        named = dict(zip(args, values, strict=True))
        orders = ["col", "serpentine_reverse"]
        return multi_scan(**named, orders=orders, grid=(2, 2), return_last_state=True, backend=backend)

    torch.autograd.gradcheck(function, tuple(args.values()))


def image_block(x, projection, A, D, delta_bias, *, backend=None):
    """A user's function: NCHW in and out, the grid read from the image."""
    height, width = x.shape[-2:]
    tokens = x.flatten(2).transpose(1, 2)
    delta, B, C = (tokens @ projection).unflatten(-1, (2, 11)).split([5, 3, 3], dim=-1)
    y = multi_scan(
        tokens, delta, A, B, C, D, orders="bidirectional", grid=(height, width), delta_bias=delta_bias, backend=backend
    )
    return y.transpose(1, 2).unflatten(2, (height, width))


def block_args(height, width, device="cpu"):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, height, width, generator=g)
    projection = torch.randn(5, 22, generator=g) * 0.3
    A, D, bias = -torch.rand(2, 5, 3, generator=g) - 0.1, torch.randn(2, 5, generator=g), torch.randn(2, 5, generator=g)
    return [value.to(device).requires_grad_() for value in (x, projection, A, D, bias)]


def assert_same_with_gradients(compiled, eager, args, tol=1e-5):
    actual, expected = compiled(*args), eager(*args)
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)
    weight = torch.linspace(-1, 1, actual.numel(), device=actual.device).view_as(actual)
    grads = torch.autograd.grad((actual * weight).sum(), args)
    for grad, other in zip(grads, torch.autograd.grad((expected * weight).sum(), args), strict=True):
        torch.testing.assert_close(grad, other, rtol=10 * tol, atol=10 * tol)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", [None, "chunked", "cpu"])
def test_compile_multi_scan_in_one_graph(backend, fresh_compiler):
    def block(*args):
        return image_block(*args, backend=backend)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled, block, block_args(3, 4))
    assert_same_with_gradients(compiled, block, block_args(5, 7))


def test_compile_by_inductor(fresh_compiler):
    compiled = torch.compile(image_block, fullgraph=True)
    assert_same_with_gradients(compiled, image_block, block_args(3, 4))


@pytest.mark.gpu
def test_compile_by_inductor_on_cuda(fresh_compiler):
    compiled = torch.compile(image_block, fullgraph=True)
    assert_same_with_gradients(compiled, image_block, block_args(9, 14, "cuda"), 1e-4)
    assert_same_with_gradients(compiled, image_block, block_args(13, 7, "cuda"), 1e-4)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_compile_selective_scan_with_dynamic_length(backend, fresh_compiler):
    names = list(selective_args())

    def function(*values):
        return selective_scan(**dict(zip(names, values, strict=True)), delta_softplus=True, backend=backend)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (12, 17, 70) if backend == "chunked" else (12, 17, 70, 131):  # each more chunk is another graph
        assert_same_with_gradients(compiled, function, list(selective_args(length).values()))
    if backend == "cpu":
        assert counter.frame_count == 1, "one graph serves every length"


def test_compile_with_a_users_permutation(fresh_compiler):
    perm = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    table = order_table([perm, "col"], GRID)
    args = multi_args(scans=2)
    names = list(args)

    def function(*values):
        return multi_scan(**dict(zip(names, values, strict=True)), orders=table, grid=GRID)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled, function, list(args.values()))
    torch.testing.assert_close(function(*args.values()), multi_scan(**args, orders=[perm, "col"], grid=GRID))


def test_compile_two_grids_in_one_graph(fresh_compiler):
    args = multi_args()
    names = list(args)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        scans = args["A"].shape[0]
        orders = ("row", "col", "row_reverse", "serpentine")[:scans]
        return multi_scan(**given, orders=orders, grid=GRID) + multi_scan(**given, orders=orders, grid=GRID[::-1])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled, function, list(args.values()))


class Block(nn.Module):
    def __init__(self, backend: Backend | None = None):
        super().__init__()
        self.backend = backend
        self.proj = nn.Linear(4, 4 + 3 + 3)
        self.A_log = nn.Parameter(torch.zeros(4, 3))
        self.D = nn.Parameter(torch.ones(4))

    def forward(self, tokens):
        delta, B, C = self.proj(tokens).transpose(1, 2).split([4, 3, 3], dim=1)
        u, A = tokens.transpose(1, 2), -self.A_log.exp()
        y = selective_scan(u, delta, A, B, C, self.D, delta_softplus=True, backend=self.backend)
        return y.transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_export_of_a_module(backend):
    torch.manual_seed(0)
    block, tokens = Block(backend).eval(), torch.randn(2, 20, 4)
    program = torch.export.export(block, (tokens,))
    torch.testing.assert_close(program.module()(tokens), block(tokens))


class ImageBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(value.detach() for value in block_args(1, 1)[1:])

    def forward(self, x):
        return image_block(x, *self.weights)


def test_export_of_a_scan_over_an_image():
    """Exported first, run after: nothing of the trace stays behind."""
    block, x = ImageBlock().eval(), torch.randn(1, 5, 11, 3)
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("backend", ["cpu"])
def test_export_with_a_dynamic_length(backend):
    torch.manual_seed(0)
    block = Block(backend).eval()
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(block, (torch.randn(2, 20, 4),), dynamic_shapes=({1: length},))
    for size in (20, 33, 150):
        tokens = torch.randn(2, size, 4)
        torch.testing.assert_close(program.module()(tokens), block(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_a_module(dtype):
    torch.manual_seed(0)
    block, tokens = Block(), torch.randn(2, 40, 4, requires_grad=True)
    plain = block(tokens)
    with torch.autocast("cpu", dtype=dtype):
        y = block(tokens)
        loss = y.float().square().mean()
    loss.backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in [*block.parameters(), tokens])
    assert ((y.float() - plain).norm() / plain.norm()).item() < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_recurrence_in_fp32(dtype):
    """Decay over 2000 steps of 1e-3: A, the state and fp32 delta survive autocast unrounded."""
    length = 2000
    one, delta = torch.ones(1, length, 1), torch.full((1, length, 1, 1), 1e-3)
    A, BC = torch.full((1, 1, 1), -1e-3), torch.ones(1, length, 1, 1)
    expected = multi_scan(one, delta, A, BC, BC, orders=["row"], grid=(40, 50), delta_softplus=False)
    with torch.autocast("cpu", dtype=dtype):
        y = multi_scan(one, delta, A, BC, BC, orders=["row"], grid=(40, 50), delta_softplus=False)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=0)


CPU_BACKENDS = ["reference", "chunked"]


def one_scan(**options):
    return selective_scan(**selective_args(requires_grad=False), **options)


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv("MAMBAVISION_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_asked_for_and_impossible_raises_with_the_reason(no_environment):
    with pytest.raises((RuntimeError, ValueError), match=r"triton.*CUDA"):
        one_scan(backend="triton")
    with pytest.raises((RuntimeError, ValueError), match=r"triton.*CUDA"):
        multi_scan(**multi_args(), orders="cross", grid=GRID, backend="triton")
    for backend in ("cpu", "triton"):
        with pytest.raises((RuntimeError, ValueError), match=backend):
            selective_scan(**selective_args(dtype=torch.float64), backend=backend)


@pytest.mark.parametrize("backend", ["cpu"])
def test_fp64_on_the_c_library_names_the_dtype(backend, no_environment):
    with pytest.raises((RuntimeError, ValueError), match="float64"):
        selective_scan(**selective_args(dtype=torch.float64), backend=backend)


def test_unknown_backend_is_refused_with_the_known_ones(no_environment, monkeypatch):
    with pytest.raises(ValueError, match="chunked"):
        one_scan(backend="cuda_fast")
    with pytest.raises(ValueError, match="chunked"), use_backend("cuda_fast"):
        one_scan()
    monkeypatch.setenv("MAMBAVISION_BACKEND", "cuda_fast")
    with pytest.raises(ValueError, match="MAMBAVISION_BACKEND"):
        one_scan()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_argument_before_context_before_environment(backend, no_environment, monkeypatch):
    """ "triton" cannot run on CPU tensors, so whoever asks for it and is heard raises."""
    expected = one_scan(backend=backend)
    monkeypatch.setenv("MAMBAVISION_BACKEND", "triton")
    with pytest.raises((RuntimeError, ValueError), match="triton"):
        one_scan()
    with use_backend(backend):
        assert torch.equal(one_scan(), expected)
        with use_backend("triton"):
            with pytest.raises((RuntimeError, ValueError), match="triton"):
                one_scan()
            assert torch.equal(one_scan(backend=backend), expected)
        assert torch.equal(one_scan(), expected)
    monkeypatch.setenv("MAMBAVISION_BACKEND", backend)
    assert torch.equal(one_scan(), expected)
    monkeypatch.setenv("MAMBAVISION_BACKEND", "")
    one_scan()


def test_context_ends_after_an_error(no_environment):
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    one_scan()


def test_backward_goes_through_what_forward_chose(no_environment):
    args = selective_args()
    with use_backend("chunked"):
        y = selective_scan(**args, delta_softplus=True)
    expected = torch.autograd.grad(selective_scan(**args, delta_softplus=True, backend="chunked").sum(), args["A"])
    with use_backend("triton"):
        actual = torch.autograd.grad(y.sum(), args["A"])
    torch.testing.assert_close(actual, expected)


def test_describe_backends_tells_each_ones_state(no_environment):
    lines = describe_backends().splitlines()
    for name in get_args(Backend):
        (line,) = [line for line in lines if line.split() and line.split()[0].rstrip(":") == name]
        assert "available" in line
        if "not available" in line:
            assert len(line.split("available", 1)[1]) > 10, f"no reason: {line}"
    assert torch.__version__ in "\n".join(lines)


def test_describe_backends_tells_which_one_was_asked_for(no_environment, monkeypatch):
    assert "effect" not in describe_backends()
    monkeypatch.setenv("MAMBAVISION_BACKEND", "chunked")
    assert describe_backends().endswith("  $MAMBAVISION_BACKEND=chunked: in effect")
    with use_backend("reference"):
        *_, chosen, variable = describe_backends().splitlines()
    assert chosen == "  in effect: reference, by use_backend" and "passed over" in variable
    monkeypatch.setenv("MAMBAVISION_BACKEND", "fastest")
    assert describe_backends().endswith("fastest: an unknown backend")


def python(code, root=ROOT, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("MAMBAVISION_BACKEND", "TRITON_INTERPRET")}
    clean |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_automatic_fallback_is_logged_once(tmp_path):
    """An install without the C library: scans run on chunked and say why at the first call only."""
    for package in ("kernels", "mambavision"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "*.dylib"))
    code = """
import logging, torch
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logger = logging.getLogger("mambavision")
logger.setLevel(logging.DEBUG)
logger.addHandler(Keep())
from mambavision.ops import selective_scan
one = torch.ones(1, 2, 3)
for _ in range(3):
    selective_scan(one, one, -torch.ones(2, 1), one[:, :1], one[:, :1])
print(*records, sep="|")
"""
    (message,) = python(code, tmp_path).strip().split("|")
    assert "'cpu' is passed over" in message
    assert "compiler" in message, "the reason"


def test_nothing_heavy_or_loud_at_import():
    code = """
import sys, mambavision, mambavision.ops
print(sorted({"triton", "torch._dynamo", "mmdet", "mmengine", "mmcv", "timm", "cv2"} & set(sys.modules)))
"""
    assert python(code) == "[]\n"


def test_a_first_call_loads_neither_dynamo_nor_triton():
    """Both take longer to import than a kernel to compile; CUDA does not start either."""
    code = """
import sys, torch
from mambavision.ops import dispatch, selective_scan
dispatch._untraced = lambda tensors: False  # the operator itself, not the short way of plain calls
one = torch.ones(1, 2, 3, requires_grad=True)
selective_scan(one, one, -torch.ones(2, 1), one[:, :1], one[:, :1]).sum().backward()
print(sorted({"triton", "torch._dynamo", "sympy"} & set(sys.modules)), torch.cuda.is_initialized())
"""
    assert python(code) == "[] False\n"


def test_environment_variable_reaches_a_new_process():
    code = """
import torch
from mambavision.ops import selective_scan
one = torch.ones(1, 2, 3)
try:
    selective_scan(one, one, -torch.ones(2, 1), one[:, :1], one[:, :1])
except RuntimeError as error:
    print("triton" in str(error))
"""
    assert python(code, MAMBAVISION_BACKEND="triton") == "True\n"


def test_scan_order_inside_compile(fresh_compiler):
    def function(x):
        return x[:, scan_order("serpentine", GRID)]

    x = torch.randn(2, 12)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
