"""Every implementation against the fp64 reference: DESIGN.md's matrix, a covering subset on CPU, the whole on CUDA.

Run as a script it prints the results of TINY as JSON: TRITON_INTERPRET has to be set before triton is imported.
"""

import json
import os
import subprocess
import sys
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambavision.ops import dispatch, multi_scan, selective_scan

ROOT = Path(__file__).resolve().parents[2]
GRIDS = {
    1: (1, 1),
    2: (2, 1),
    7: (1, 7),
    49: (7, 7),
    63: (7, 9),
    65: (13, 5),
    196: (14, 14),
    257: (1, 257),
    1134: (27, 42),
}
STATES = [1, 2, 8, 16, 17, 64]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD_LIMIT = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
GRADIENT_LIMIT = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
SLACK = {"fp32": 5e-7, "bf16": 1e-3, "fp16": 1e-4}
KEPT = 2**-9  # for bfloat16 inputs the CUDA backward starts from states in bfloat16, which rounds them by up to this


@dataclass(frozen=True)
class Case:
    length: int
    d_state: int
    dtype: str = "fp32"
    dim: int = 5
    op: str = "multi_scan"
    orders: tuple[str, ...] = ("row", "col_reverse")
    options: bool = True
    rank: int = 0
    groups: int = 1
    strided: bool = False
    merge: bool = True
    delta: float | None = None
    decay: float | None = None
    size: float | None = None  # of the largest element of x

    def __str__(self):
        words = [self.op, f"L{self.length}", f"N{self.d_state}", f"D{self.dim}", self.dtype]
        words += [word for word in ("strided",) if getattr(self, word)]
        words += [] if self.merge else ["unmerged"]
        numbers = {"rank": self.rank, "delta": self.delta, "A": self.decay, "size": self.size}
        words += [f"{name}{v}" for name, v in numbers.items() if v]
        return "-".join(words if self.options else [*words, "bare"])


def make(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    batch, length, dim, n = 2, case.length, case.dim, case.d_state
    if case.op == "selective_scan":
        args = {
            "u": normal(batch, dim, length),
            "delta": 0.5 * normal(batch, dim, length),
            "A": -(0.1 + 2 * torch.rand(dim, n, generator=g, dtype=torch.float64)),
            "B": normal(batch, case.groups, n, length),
            "C": normal(batch, case.groups, n, length),
        }
        scans, state = (), (batch, dim, n)
        gate = {"z": normal(batch, dim, length)}
    else:
        scans = (len(case.orders),)
        args = {
            "x": normal(batch, length, dim),
            "delta": 0.5 * normal(batch, length, *scans, case.rank or dim),
            "A": -(0.1 + 2 * torch.rand(*scans, dim, n, generator=g, dtype=torch.float64)),
            "B": normal(batch, length, *scans, n),
            "C": normal(batch, length, *scans, n),
        }
        state, gate = (batch, *scans, dim, n), {}
        if case.rank:
            args["dt_weight"] = normal(*scans, dim, case.rank) / case.rank**0.5
            if not case.options:  # no softplus: a negative delta would let the states grow without bound
                args["dt_weight"] = args["dt_weight"].abs()
    if case.options:
        args |= gate
        args |= {"D": normal(*scans, dim), "delta_bias": 0.3 * normal(*scans, dim), "initial_state": normal(*state)}
    else:
        args["delta"] = args["delta"].abs()
    if case.delta is not None:
        args["delta"] = torch.full_like(args["delta"], case.delta)
    if case.decay is not None:
        args["A"] = torch.full_like(args["A"], case.decay)
    if case.size is not None:
        x = next(iter(args.values()))
        x *= case.size / x.abs().max()
    fp32 = {"A", "D", "delta_bias", "initial_state"}
    return {k: v.to(torch.float32 if k in fp32 else DTYPES[case.dtype]) for k, v in args.items()}


def strided(value: Tensor) -> Tensor:
    """Same values with gaps and permuted strides, NaN between."""
    wide = torch.full((*value.shape[::-1], 2), float("nan"), dtype=value.dtype, device=value.device)
    view = wide[..., 0].permute(*range(value.ndim - 1, -1, -1))
    view.copy_(value)
    return view


@contextmanager
def poisoned():
    """Memory from torch.empty holds NaN: an output that is not written shows."""
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run(case: Case, backend: str, *, fp64: bool = False, device: str = "cpu") -> dict[str, Tensor]:
    leaves = {k: v.to(device, torch.float64 if fp64 else v.dtype).requires_grad_() for k, v in make(case).items()}
    args = {k: strided(v.detach()).requires_grad_() for k, v in leaves.items()} if case.strided else leaves
    options = {"delta_softplus": case.options, "return_last_state": True, "backend": backend}
    if case.op == "multi_scan":
        options |= {"orders": case.orders, "grid": GRIDS.get(case.length, (1, case.length)), "merge": case.merge}
    with poisoned():
        y, state = (multi_scan if case.op == "multi_scan" else selective_scan)(**args, **options)
        g = torch.Generator().manual_seed(1)
        r_y, r_state = torch.randn(y.shape, generator=g), torch.randn(state.shape, generator=g)
        r_y = r_y.to(DTYPES[case.dtype]).to(device, y.dtype)
        r_state = r_state.to(device, state.dtype)
        if case.strided:
            r_y, r_state = strided(r_y), strided(r_state)
        grads = torch.autograd.grad([y, state], list(args.values()), [r_y, r_state])
    results = {"y": y, "last_state": state} | {f"grad_{k}": v for k, v in zip(args, grads, strict=True)}
    return {k: v.detach().double().cpu() for k, v in results.items()}


@contextmanager
def gated_as(backend: str):
    """Any backend gets the gate as this one does: inside, or by torch, on an output and a gradient of x's type."""
    own = dispatch.GATING
    dispatch.GATING = own if backend in own else ()
    try:
        yield
    finally:
        dispatch.GATING = own


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-6))


@lru_cache(maxsize=4)
def expected_of(case: Case) -> dict[str, Tensor]:
    return run(case, "reference", fp64=True)


def check(case: Case, backend: str, device: str = "cpu") -> None:
    expected = expected_of(case)
    actual = run(case, backend, device=device)
    paths = [actual if backend == "chunked" else run(case, "chunked", device=device)]
    if case.decay is not None:
        # One repeated decay is rounded the same way at every step: step by step in fp32 errs more than a chunk at once.
        paths.append(run(case, "reference", device=device))
    kept = KEPT if backend == "cuda" and case.dtype == "bf16" else 0.0
    wrong = {}
    for name, value in expected.items():
        error = relative(actual[name], value)
        limit = (GRADIENT_LIMIT if name.startswith("grad") else FORWARD_LIMIT)[case.dtype]
        if backend != "chunked" and value.numel() >= 8:  # a few sums over all tokens may cancel more in one path
            slack = SLACK[case.dtype] + kept * (name in ("grad_A", "grad_delta_bias"))
            limit = min(limit, 2 * max(relative(path[name], value) for path in paths) + slack)
        if not error <= limit:  # a sum that cancels errs as much by the definition in the same precision
            with gated_as(backend):
                limit = 1.01 * relative(run(case, "reference", device=device)[name], value)
        if not error <= limit:
            wrong[name] = f"{error:.2e} > {limit:.2e}"
    assert not wrong, f"{backend} on {case}: {wrong}"


COVERING = [
    Case(1, 1, "fp32", 3),
    Case(2, 2, "fp32", 5, "selective_scan"),
    Case(7, 8, "bf16", 17, rank=2),
    Case(49, 16, "fp32", 7, strided=True),
    Case(63, 17, "fp16", 6, "selective_scan", groups=2),
    Case(65, 64, "fp32", 9, options=False),
    Case(196, 16, "bf16", 33, "selective_scan", strided=True),
    Case(257, 1, "fp32", 13, rank=3, strided=True),
    Case(1134, 16, "fp32", 3),
    Case(1134, 1, "bf16", 5, merge=False),
    Case(49, 64, "fp16", 1),
    Case(65, 2, "bf16", 11, options=False),
    Case(257, 8, "fp16", 5, orders=("serpentine",), strided=True),
    Case(196, 17, "fp32", 19, merge=False),
    Case(63, 1, "fp32", 31, "selective_scan", options=False, groups=31),
]
EXTREME = [
    Case(65, 4, dtype, 5, op, delta=20.0, decay=-16.0)
    for dtype, op in product(DTYPES, ("multi_scan", "selective_scan"))
] + [
    Case(65, 4, "fp32", 5, delta=100.0),
    Case(65, 4, "fp32", 5, delta=-100.0),
    Case(300, 2, "fp32", 5, delta=0.5, decay=-1e-6),
    Case(64, 2, "fp32", 5, delta=0.1, decay=-16.0),
    *(Case(65, 4, dtype, 5, op, size=1e3) for dtype, op in product(("bf16", "fp16"), ("multi_scan", "selective_scan"))),
]
TINY = [
    Case(1, 1, "fp32", 3),
    Case(2, 2, "fp32", 5, "selective_scan"),
    Case(7, 4, "fp32", 3, rank=2, strided=True),
    Case(9, 3, "fp16", 5, orders=("row_reverse",), options=False),
    Case(17, 2, "bf16", 3, "selective_scan", groups=3),
    Case(33, 1, "fp32", 2, "selective_scan", options=False, strided=True),
    Case(35, 2, "fp32", 3, orders=("serpentine_col",), merge=False),
    Case(9, 2, "fp32", 3, delta=20.0, decay=-16.0),
    Case(17, 2, "fp16", 3, size=1e3),
]
FULL = [
    Case(
        length,
        d_state,
        dtype,
        (5, 33, 64, 1)[i % 4],
        ("multi_scan", "selective_scan")[i % 2 if i % 5 else 0],
        orders=(("row", "col_reverse"), ("serpentine",), ("row", "col", "row_reverse", "col_reverse"))[i % 3],
        options=i % 7 != 3,
        rank=3 if i % 11 == 4 else 0,
        strided=i % 3 == 1,
        merge=i % 13 != 5,
    )
    for i, (length, d_state, dtype) in enumerate(product(GRIDS, STATES, DTYPES))
]


@lru_cache
def reason_not_to_run(backend: str) -> str:
    one = torch.ones(1, 1, 1)
    try:
        selective_scan(one, one, -one[0], one, one, backend=backend)
    except RuntimeError as error:
        return str(error)
    return ""


def skip_if_not_built(backend: str) -> None:
    """An install without a C compiler has no library; any other failure is a failure."""
    if backend == "cpu" and "not built" in reason_not_to_run(backend):
        pytest.skip(reason_not_to_run(backend))


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@pytest.mark.parametrize("case", COVERING + EXTREME, ids=str)
def test_covering_subset_on_cpu(backend, case):
    skip_if_not_built(backend)
    check(case, backend)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_decay_is_finite(dtype, backend):
    skip_if_not_built(backend)
    results = run(Case(40, 16, dtype, 3, delta=20.0, decay=-16.0), backend)
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_nan_and_infinity_are_not_hidden(name, dtype):
    """One bad token spoils the rest of its channel, or of all channels from B and C, and nothing before it."""
    skip_if_not_built("cpu")
    case = Case(40, 16, dtype, 17, "selective_scan", options=True)
    for bad in (float("nan"), float("inf")):
        args = {k: v.clone() for k, v in make(case).items() if k != "z"}
        args[name][0, ..., 3, 20] = bad
        y, state = selective_scan(**args, delta_softplus=True, return_last_state=True, backend="cpu")
        channel = slice(None) if name in "BC" else 3
        assert not y[0, channel, 20].isfinite().any()
        assert y[0, :, :20].isfinite().all() and y[1].isfinite().all()
        if name != "C":
            assert not state[0, channel].isfinite().all()
        if name in ("u", "delta"):
            others = torch.arange(17) != 3
            assert y[0, others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, dim, d_state", [(150, 35, 16), (64, 16, 33), (129, 48, 1)])
def test_any_layout_gives_the_same_bits(length, dim, d_state, dtype):
    """Transposed and vector loads, packed B and C, and the element-by-element path see the same numbers."""
    skip_if_not_built("cpu")
    args = make(Case(length, d_state, dtype, dim, "selective_scan"))

    def scanned(change=lambda v: v, backend="cpu"):
        changed = {k: change(v) if v.dim() > 2 else v for k, v in args.items() if k != "z"}
        return selective_scan(**changed, delta_softplus=True, backend=backend)

    expected = scanned()
    assert relative(expected.double(), scanned(torch.Tensor.double, "reference")) < FORWARD_LIMIT[dtype]
    assert torch.equal(scanned(lambda v: v.mT.contiguous().mT), expected)
    assert torch.equal(scanned(strided), expected)


def test_decays_at_the_edge_of_the_exponents_range():
    """exp(delta A) from 1 through the smallest normal number to 0, in tiles that need the clamp and in others."""
    skip_if_not_built("cpu")
    exponents = torch.cat([torch.linspace(-1e-6, -1, 50), torch.linspace(-80, -95, 46), -torch.logspace(2, 30, 64)])
    delta = -exponents[None, None]
    A, one = -torch.ones(1, 1), torch.ones(1, 1, exponents.numel())
    y = selective_scan(0 * delta, delta, A, one, one, initial_state=torch.ones(1, 1, 1), backend="cpu")[0, 0]
    exact = exponents.double().cumsum(0).exp()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-37)


def test_one_thread_and_two_agree():
    skip_if_not_built("cpu")
    case = Case(63, 4, "fp32", 37, orders=("row", "col", "row_reverse", "col_reverse"))
    one = run(case, "cpu")
    torch.set_num_threads(2)
    try:
        two = run(case, "cpu")
    finally:
        torch.set_num_threads(1)
    errors = {name: relative(two[name], one[name]) for name in one}
    assert max(errors.values()) < 1e-6, errors


@pytest.fixture(scope="module")
def interpreted():
    """TINY through triton's interpreter in a process of its own: {case: what is wrong, or ""}."""
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", TINY, ids=str)
def test_triton_under_the_interpreter(case, interpreted):
    assert interpreted[str(case)] == ""


@pytest.mark.parametrize("kernel", ["forward", "starts", "backward"])
def test_triton_compiles_for_a_gpu(kernel):
    """The interpreter takes what the compiler refuses; no GPU is needed to compile."""
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mambavision.kernels import triton as kernels

    function = kernels._backward if kernel == "backward" else kernels._forward
    flags = dict.fromkeys(("HAS_D", "HAS_BIAS", "HAS_INITIAL", "HAS_LAST", "HAS_ORDER", "SOFTPLUS"), True)
    flags |= {"OUTPUT": kernel != "starts", "N": 2, "NP": 2, "T": 16, "W": kernels.LANES}
    constants = {name: value for name, value in flags.items() if name in function.arg_names}
    types = dict.fromkeys(("x", "delta", "B", "C", "y", "dy", "dx", "ddelta"), "*bf16") | {"order": "*i32"}
    types |= dict.fromkeys(kernels._OPAQUE, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in function.arg_names}
    compiled = compile(
        ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}
    )
    assert compiled.asm["cubin"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", FULL + EXTREME, ids=str)
def test_full_matrix_on_cuda(case, backend):
    check(case, backend, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_chunked_on_cuda(case):
    check(case, "chunked", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", [replace(COVERING[8], dim=96), replace(COVERING[6], dim=200)], ids=str)
def test_twice_gives_the_same_bits(case, backend):
    one, two = run(case, backend, device="cuda"), run(case, backend, device="cuda")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_32_bits(backend):
    """delta has 2.2e9 elements: the last image's addresses do not fit an int32."""
    batch, length, dim, scans = 33, 16384, 1024, 4
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    x, delta = normal(batch, length, dim), normal(batch, length, scans, dim)
    B, C = normal(batch, length, scans, 1), normal(batch, length, scans, 1)
    A = -torch.ones(scans, dim, 1, device="cuda")
    with torch.no_grad():
        whole = multi_scan(x, delta, A, B, C, orders="cross", grid=(128, 128), backend=backend)
        for i in (0, 17, batch - 1):
            one = slice(i, i + 1)
            alone = multi_scan(x[one], delta[one], A, B[one], C[one], orders="cross", grid=(128, 128), backend=backend)
            torch.testing.assert_close(whole[one], alone, rtol=2e-2, atol=2e-2)  # one image may be cut into segments


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"])
def test_batch_beyond_65535(backend):
    """More images than a grid's y and z axes hold blocks."""
    batch, length, dim = 70_000, 3, 5
    g = torch.Generator("cuda").manual_seed(0)
    u, delta = (torch.randn(batch, dim, length, generator=g, device="cuda") for _ in range(2))
    B, C = (torch.randn(batch, 2, length, generator=g, device="cuda") for _ in range(2))
    A = -torch.rand(dim, 2, generator=g, device="cuda")
    fast, exact = (selective_scan(u, delta.abs(), A, B, C, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(fast, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(4096, 16, "bf16", 33), Case(3000, 16, "fp32", 96, "selective_scan")], ids=str)
def test_segments_of_a_long_sequence_on_cuda(case):
    """One image's few channels: the sequence is cut into segments that run side by side."""
    check(case, "cuda", "cuda")


@pytest.mark.gpu
def test_cuda_graph_replays_forward_and_backward():
    case = Case(1134, 16, "bf16", 33)
    args = {k: v.to("cuda") for k, v in make(case).items()}
    leaves = {k: v.clone().requires_grad_() for k, v in args.items()}
    r = torch.randn(2, 1134, 33, device="cuda", dtype=torch.bfloat16)

    def step():
        y = multi_scan(**leaves, orders=case.orders, grid=GRIDS[1134], backend="cuda")
        return y, *torch.autograd.grad(y, list(leaves.values()), r)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled outside the graph
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["x"].mul_(0.5)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def main(backend: str) -> None:
    torch.set_num_threads(1)
    results = {}
    for case in TINY:
        try:
            check(case, backend)
            results[str(case)] = ""
        except Exception as error:
            results[str(case)] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
