"""Every implementation of ssd against the fp64 reference, forward and every gradient.

Run as a script it prints the results of TINY as JSON: TRITON_INTERPRET has to be set before triton is imported.
"""

import json
import os
import subprocess
import sys
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambavision.kernels import ssd_cuda
from mambavision.ops import ssd
from tests.kernels.emulated import ASCENDING, DESCENDING, RANDOM

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD_LIMIT = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
GRADIENT_LIMIT = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}
FACTORS = ("x", "B", "C", "initial_state")  # of products, beside the gradients of the outputs


@dataclass(frozen=True)
class Case:
    length: int
    form: str = "causal"  # or "sum" or "free"
    heads: int = 3
    headdim: int = 5
    d_state: int = 4
    groups: int = 1
    dtype: str = "fp32"
    chunk: int | None = None
    options: bool = True
    strided: bool = False
    dt: float | None = None
    decay: float | None = None
    size: float = 1.0

    def __str__(self):
        words = [self.form, f"L{self.length}", f"H{self.heads}G{self.groups}P{self.headdim}N{self.d_state}", self.dtype]
        words += [f"{name}{v}" for name, v in (("Q", self.chunk), ("dt", self.dt), ("A", self.decay)) if v]
        words += ["strided"] * self.strided + ["bare"] * (not self.options) + [f"size{self.size}"] * (self.size != 1)
        return "-".join(words)


def make(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    batch, length, H, P, G, N = 2, case.length, case.heads, case.headdim, case.groups, case.d_state

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = {
        "x": case.size * normal(batch, length, H, P),
        "dt": normal(batch, length, H) - 1,
        "A": -(0.1 + 2 * torch.rand(H, generator=g, dtype=torch.float64)),
        "B": case.size * normal(batch, length, G, N),
        "C": normal(batch, length, G, N),
    }
    if case.options:
        directions = () if case.form == "causal" else (2,)
        args |= {"dt_bias": 0.3 * normal(H), "initial_state": normal(batch, *directions, H, P, N)}
        args["D"] = normal(batch, length, H) if case.form == "free" else normal(H)
    else:
        args["dt"] = args["dt"].abs()
    if case.dt is not None:
        args["dt"] = torch.full_like(args["dt"], case.dt)
    if case.decay is not None:
        args["A"] = torch.full_like(args["A"], case.decay)
    rounded = {"x", "dt", "B", "C"}
    return {k: v.to(DTYPES[case.dtype] if k in rounded else torch.float32) for k, v in args.items()}


def strided(value: Tensor) -> Tensor:
    """Same values with permuted strides and NaN between."""
    wide = torch.full((*value.shape[::-1], 2), torch.nan, dtype=value.dtype, device=value.device)
    view = wide[..., 0].permute(*range(value.ndim - 1, -1, -1))
    view.copy_(value)
    return view


def inputs(case: Case, *, fp64: bool = False, device: str = "cpu") -> tuple[dict[str, Tensor], dict]:
    """Tensors, and the other arguments."""
    args = {k: v.to(device, torch.float64 if fp64 else v.dtype) for k, v in make(case).items()}
    args = {k: strided(v) if case.strided else v for k, v in args.items()}
    options = {"bidirectional": case.form != "causal", "diagonal": "free" if case.form == "free" else "scanned"}
    return args, options | {"dt_softplus": case.options, "chunk_size": case.chunk, "return_last_state": case.options}


def forward(args: dict[str, Tensor], options: dict, backend: str) -> dict[str, Tensor]:
    out = ssd(**args, **options, backend=backend)
    return dict(zip(("y", "last_state"), out if options["return_last_state"] else (out,), strict=False))


def run(
    case: Case, backend: str, *, fp64: bool = False, device: str = "cpu", off: int | None = None
) -> dict[str, Tensor]:
    """Outputs and gradients. With a seed ``off``, each factor of a product is up to a unit in the last place away."""
    args, options = inputs(case, fp64=fp64, device=device)
    if off is not None:
        unit, seeded = torch.finfo(DTYPES[case.dtype]).eps, torch.Generator().manual_seed(off)

    def factor(v: Tensor) -> Tensor:
        return v if off is None else v * (1 + unit * (2 * torch.rand(v.shape, generator=seeded, dtype=v.dtype) - 1))

    args = {k: (factor(v) if k in FACTORS else v).requires_grad_() for k, v in args.items()}
    outputs = forward(args, options, backend)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=g).to(DTYPES[case.dtype]).to(device, v.dtype) for v in outputs.values()]
    weights = [factor(strided(v) if case.strided else v) for v in weights]
    grads = torch.autograd.grad(list(outputs.values()), list(args.values()), weights)
    results = outputs | {f"grad_{k}": v for k, v in zip(args, grads, strict=True)}
    return {k: v.detach().double().cpu() for k, v in results.items()}


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-6))


@lru_cache(maxsize=4)
def expected_of(case: Case) -> dict[str, Tensor]:
    return run(case, "chunked" if case.length > 300 else "reference", fp64=True)


@lru_cache(maxsize=4)
def moved_by_rounding(case: Case) -> dict[str, float]:
    """How far exact results move, in root mean square, where all factors are up to a unit in the last place away."""
    moved = [run(case, "chunked", fp64=True, off=seed) for seed in range(8)]
    return {k: sum(relative(one[k], v) ** 2 for one in moved) ** 0.5 / 8**0.5 for k, v in expected_of(case).items()}


def check(case: Case, backend: str, device: str = "cpu") -> None:
    """A gradient whose sum cancels, so that the limit of its norm is missed, may be as far off as rounding moves it."""
    expected, actual = expected_of(case), run(case, backend, device=device)
    wrong = {}
    for name, value in expected.items():
        limit = (GRADIENT_LIMIT if name.startswith("grad") else FORWARD_LIMIT)[case.dtype]
        error = relative(actual[name], value)
        if error > limit and name.startswith("grad"):
            limit = max(limit, moved_by_rounding(case)[name])
        if not error <= limit:
            wrong[name] = f"{error:.2e} > {limit:.2e}"
    assert not wrong, f"{backend} on {case}: {wrong}"


def check_forward(case: Case, device: str = "cpu") -> None:
    """``cuda`` is at most twice as far from fp64 as ``chunked`` in the same types, and the same twice.

    ``chunked`` computes in float32 and rounds y alone. Pairs of a strip are rounded to bfloat16 twice more (score and
    weight), others five times (score, decays from a border and to it, both products). A last state is a sum of rounded
    ones; few numbers, or sums over few states, make no mean.
    """
    args, options = inputs(case, device=device)
    actual, again = forward(args, options, "cuda"), forward(args, options, "cuda")
    peer = forward(args, options, "chunked")
    exact = forward(*inputs(case, fp64=True, device=device), "chunked")
    wrong = {}
    for name, value in exact.items():
        errors = [relative(v[name].double(), value) for v in (actual, peer)]
        few = value.numel() < 4000 or case.d_state < 4
        least = FORWARD_LIMIT["bf16"] if value.numel() < 100 else 4e-3 if few or name == "last_state" else 0.0
        if not errors[0] <= max(2 * errors[1], least):
            wrong[name] = errors
        assert torch.equal(actual[name], again[name]), f"{name} of {case} is not the same twice"
    assert not wrong, f"{case}: {wrong}"


COVERING = [
    Case(1),
    Case(1, "sum"),
    Case(2, "free", groups=3),
    Case(7, "sum", dtype="bf16", headdim=17),
    Case(49, "causal", 4, groups=2, d_state=16, strided=True),
    Case(63, "free", dtype="fp16"),
    Case(65, "sum", options=False, chunk=16),
    Case(196, "sum", 4, 8, 16, 2, "bf16"),
    Case(197, "free", 4, 8, 16, 2, strided=True, chunk=32),
    Case(257, "causal", dtype="bf16", chunk=128),
    Case(257, "sum", options=False, chunk=256),
]
EXTREME = [
    *(Case(65, form, dtype=dtype, dt=20.0, decay=-16.0) for form, dtype in product(("causal", "sum"), DTYPES)),
    Case(65, "sum", dt=100.0),
    Case(65, "free", dt=-100.0),
    Case(300, "sum", dt=0.5, decay=-1e-6, options=False),
    Case(300, "free", dt=0.1, decay=-16.0, options=False),
]
LARGE = [  # x and B; their products and sums stay within float16
    Case(65, "sum", dtype=dtype, size=size, options=False)
    for dtype, size in (("bf16", 1e3), ("fp32", 1e3), ("fp16", 16.0))
]
TINY = [
    Case(1, "sum"),
    Case(7, "causal", groups=3, strided=True),
    Case(21, "sum", 4, groups=2, chunk=16),
    Case(35, "causal", dtype="fp16", chunk=32, options=False),
    Case(40, "free", chunk=16, d_state=17),
    Case(70, "sum", 2, options=False),
    Case(33, "sum", 2, headdim=6, d_state=70, chunk=64),
    Case(9, "sum", dt=20.0, decay=-16.0),
    Case(33, "sum", dtype="fp16", size=16.0, options=False),
    Case(2, "sum", 2, 5, 1, 2, "fp16"),  # the gradient of A cancels
]
SIZES = [(4, 64, 64, 1), (6, 64, 16, 2), (3, 40, 33, 3), (4, 32, 64, 2), (2, 5, 4, 1)]
FULL = [
    Case(length, form, heads, headdim, d_state, groups, dtype, options=i % 4 != 3, strided=i % 5 == 2)
    for i, (length, form, dtype) in enumerate(
        product((1, 7, 64, 65, 100, 196, 197, 1024, 3136), ("causal", "sum", "free"), ("bf16", "fp16"))
    )
    for heads, headdim, d_state, groups in [SIZES[i % 5]]
]
_served = {(case.length, case.d_state) for case in FULL}
FULL += [  # DESIGN.md's lengths and states: each length and each number of states with every form and type
    Case(length, form, heads, headdim, d_state, heads, dtype, options=i % 4 != 3, strided=i % 5 == 2)
    for j, length in enumerate((1, 2, 7, 49, 63, 65, 196, 257, 1134))
    for i, d_state in enumerate((1, 2, 8, 16, 17, 64), j)
    if (length, d_state) not in _served
    for form, dtype in [(("causal", "sum", "free")[i % 3], ("bf16", "fp16")[i % 2])]
    for heads, headdim in [((1, 33), (2, 5), (1, 64))[j % 3]]
]


CUDA = [
    Case(1, dtype="bf16"),
    Case(1, "sum", dtype="bf16"),
    Case(7, "free", groups=3, dtype="bf16", strided=True),
    Case(33, "sum", 2, 64, 64, dtype="bf16", chunk=32),
    Case(49, "causal", 4, 17, 16, 2, "bf16"),
    Case(70, "sum", 2, 64, 64, dtype="bf16", options=False),
    Case(97, "free", 2, 32, 48, dtype="bf16", chunk=64, strided=True),
    Case(100, "causal", 2, 24, 100, 2, "bf16", chunk=32, options=False),
    Case(100, "causal", 2, 24, 40, 2, "bf16", chunk=32, options=False),
    Case(70, "sum", 1, 130, 16, dtype="bf16", chunk=32),
    Case(257, "sum", 1, 16, 16, dtype="bf16", chunk=256),
    Case(256, "free", 3, 16, 16, dtype="bf16", options=False),
    Case(65, "causal", dtype="bf16", dt=20.0, decay=-16.0),
    Case(65, "sum", dtype="bf16", dt=20.0, decay=-16.0),
    Case(65, "free", dtype="bf16", dt=-100.0),
    Case(128, "free", 1, 64, 64, dtype="bf16", options=False),
    Case(193, "causal", 1, 64, 16, dtype="bf16", chunk=128),
    Case(300, "sum", 1, 64, 64, dtype="bf16", options=False),
    Case(300, "causal", 1, 64, 64, dtype="bf16", options=False, chunk=128),
    Case(520, "causal", 3, 64, 64, dtype="bf16"),
    Case(120, "sum", 2, 64, 64, dtype="bf16", options=False, chunk=32),
    Case(250, "sum", 2, 64, 16, dtype="bf16", options=False, chunk=64),
    Case(128, "causal", 2, 24, 48, 2, dtype="bf16", options=False, chunk=32),
    Case(100, "sum", dtype="bf16", dt=0.5, decay=-1e-6, options=False, chunk=32),
    Case(65, "sum", dtype="bf16", size=1e3, options=False),
]


@pytest.mark.parametrize("case", COVERING + EXTREME + LARGE, ids=str)
def test_chunked_on_cpu(case):
    check(case, "chunked")


@pytest.mark.parametrize("case", COVERING[:6], ids=str)
def test_reference_in_its_own_precision(case):
    check(case, "reference")


@pytest.mark.parametrize("form", ["causal", "sum", "free"])
def test_chunk_size_changes_rounding_only(form):
    whole = run(Case(50, form), "chunked", fp64=True)
    for chunk in (1, 3, 16, 49, 50, 200):
        cut = run(Case(50, form, chunk=chunk), "chunked", fp64=True)
        other = run(Case(50, form, chunk=chunk), "reference", fp64=True)
        errors = {name: relative(cut[name], other[name]) for name in whole}
        assert max(errors.values()) < 1e-12, errors


@pytest.fixture(scope="module")
def interpreted():
    """TINY through triton's interpreter in a process of its own: {case: what is wrong, or ""}."""
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*TINY, "opcheck", "opcheck without options"], ids=str)
def test_triton_under_the_interpreter(case, interpreted):
    assert interpreted[str(case)] == ""


@pytest.mark.parametrize("case", CUDA, ids=str)
def test_cuda_in_the_emulator(case, emulator):
    check_forward(case)


@pytest.mark.parametrize("case", [CUDA[2], CUDA[5], CUDA[-3]], ids=str)
def test_cuda_with_every_gradient_in_the_emulator(case, emulator):
    check(case, "cuda")


@pytest.mark.parametrize("most", [99 << 10, 163 << 10, 227 << 10])
def test_blocks_fit(most):
    """Of every size that is served, for which there is always a cut, and the longest chunks there are on sm_90."""
    for length, states, directions, given, rows in product(
        (1, 33, 256, 600, 4096), range(16, 129, 16), (1, 2), (False, True), (16, 32)
    ):
        cut = ssd_cuda._cut(length, states, directions, 0, given, rows, most)
        assert max(ssd_cuda._shared(cut, states, rows)) <= most
        if most == 227 << 10:
            assert cut.chunk >= min(256, length) // 2
    with pytest.raises(ValueError, match="chunk_size=256"):
        ssd_cuda._cut(4096, 128, 2, 256, False, 32, 99 << 10)


def test_a_smaller_gpu_gets_shorter_chunks(emulator):
    case = Case(150, "sum", 1, 16, 64, dtype="bf16", options=False)
    emulator.shared, emulator.architecture = 64 << 10, 860
    ssd_cuda._layout.cache_clear()
    check_forward(case)
    ssd_cuda._layout.cache_clear()
    assert "ssd_chain" in [name for name, _, _ in emulator.launches]


@pytest.mark.parametrize("axis", [0, 2, 3])
def test_nothing_in_nothing_out(axis, emulator):
    args, options = inputs(Case(5, "sum", 2, 8, 8, dtype="bf16", options=False))
    args["D"] = torch.ones(2)
    for name in ("x", "dt", "A", "D") if axis == 2 else ("x", "dt", "B", "C") if axis == 0 else ("B", "C"):
        args[name] = args[name].narrow(axis if args[name].dim() > 1 else 0, 0, 0)
    y = forward(args, options, "cuda")["y"]
    assert torch.equal(y, args["x"])


@pytest.fixture
def asynchronous(monkeypatch):
    """Four warps' products together, as sm_90 has them."""
    monkeypatch.setattr(ssd_cuda, "_asynchronous", lambda device: True)
    ssd_cuda._layout.cache_clear()
    yield
    ssd_cuda._layout.cache_clear()


@pytest.mark.parametrize("case", [c for c in CUDA if c.headdim > 48], ids=str)
def test_cuda_of_sm_90_in_the_emulator(case, emulator, asynchronous):
    check_forward(case)


@pytest.mark.parametrize("case", [CUDA[3], CUDA[6], replace(CUDA[7], chunk=64)], ids=str)
def test_no_order_of_threads_changes_a_bit(case, emulator):
    results = []
    for emulator.order in (ASCENDING, DESCENDING, RANDOM, RANDOM + 1):
        emulator.processors = 1 + emulator.order % 2 * 8  # few blocks of many heads, many of few
        results.append(forward(*inputs(case), "cuda"))
    assert all(torch.equal(one[name], results[0][name]) for one in results for name in one)


def test_what_a_call_of_cuda_launches(emulator):
    """One kernel for one chunk without states; two up to 4 chunks, where the states that leave are not wanted."""
    launched = {}
    for length, last in ((64, False), (64, True), (65, False), (65, True), (300, False)):
        case = Case(length, "sum", 4, 8, 8, dtype="bf16", options=False, chunk=64)
        emulator.launches.clear()
        forward(inputs(case)[0], inputs(case)[1] | {"return_last_state": last}, "cuda")
        launched[length, last] = [name for name, _, _ in emulator.launches]
    one, two, three = ["ssd_outputs"], ["ssd_sums", "ssd_outputs"], ["ssd_sums", "ssd_chain", "ssd_outputs"]
    assert list(launched.values()) == [one, three, two, three, three]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in FULL + EXTREME + LARGE if c.dtype != "fp32"], ids=str)
def test_full_matrix_on_cuda(case):
    check(case, "triton", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CUDA + [c for c in FULL + EXTREME + LARGE if c.dtype == "bf16"], ids=str)
def test_full_matrix_of_cuda_on_cuda(case):
    check_forward(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_chunked_on_cuda(case):
    check(case, "chunked", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("form", ["causal", "sum", "free"])
def test_twice_gives_the_same_bits(form, backend):
    case = Case(3136, form, 6, 64, 64, dtype="bf16")
    one, two = run(case, backend, device="cuda"), run(case, backend, device="cuda")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_offsets_beyond_32_bits(backend):
    """x has 2.3e9 elements: the last sequence's addresses do not fit an int32."""
    batch, length, H, P, N = 34, 16384, 64, 64, 16
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)

    x, dt, B, C = normal(batch, length, H, P), normal(batch, length, H), normal(batch, length, 1, N), None
    C, A = normal(batch, length, 1, N), -torch.ones(H, device="cuda")
    options = {"bidirectional": True, "dt_softplus": True, "backend": backend}
    with torch.no_grad():
        whole = ssd(x, dt, A, B, C, **options)
        for i in (0, 17, batch - 1):
            one = slice(i, i + 1)
            alone = ssd(x[one], dt[one], A, B[one], C[one], **options)
            assert relative(whole[one].double(), alone.double()) < 1e-2


def opcheck(options: bool) -> None:
    case = Case(5, "sum", 2, 3, 2)
    args = list(make(case).values())
    x, dt, A, B, C, bias, state, D = (v.requires_grad_() for v in args)
    extra = (D.detach().expand(2, 5, 2).contiguous().requires_grad_(), bias, state) if options else (None, None, None)
    inputs = (x, dt, A, B, C, *extra, True, True, True, 16)
    torch.library.opcheck(torch.ops.mambavision.ssd, (*inputs, options, "triton"))
    detached = (v.detach() if isinstance(v, Tensor) else v for v in (x, state if options else None, *inputs, "triton"))
    torch.library.opcheck(torch.ops.mambavision.ssd_backward, tuple(detached))


def refuse_stray_pointers() -> None:
    """Make the interpreter raise where an unmasked pointer is outside the tensors given to the kernel."""
    from triton.runtime import interpreter

    builder, executor, spans = interpreter.InterpreterBuilder, interpreter.GridExecutor, []
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def recorded(self, *args):
        result = arguments(self, *args)
        spans.clear()
        for v in (v for v in result[0] if isinstance(v, Tensor) and v.numel()):
            last = sum((n - 1) * stride for n, stride in zip(v.shape, v.stride(), strict=True))
            spans.append((v.data_ptr(), v.data_ptr() + last * v.element_size()))
        return result

    def check_pointers(pointers, mask) -> None:
        used = pointers.data[mask.data.astype(bool)].astype("int64")
        stray = sum((used >= first) & (used <= last) for first, last in spans) == 0
        if stray.any():
            raise IndexError(f"{stray.sum()} of {used.size} pointers outside every tensor")

    def checked_load(self, pointers, mask, *args, **options):
        check_pointers(pointers, mask)
        return load(self, pointers, mask, *args, **options)

    def checked_store(self, pointers, value, mask, *args, **options):
        check_pointers(pointers, mask)
        return store(self, pointers, value, mask, *args, **options)

    executor._init_args_hst = recorded
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def cut_to_tf32() -> None:
    """Make the interpreter's tf32 products cut their factors to 11 bits, as tensor cores do."""
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def cut(v):
        return TensorHandle((v.data.copy().view("uint32") & 0xFFFFE000).view("float32"), v.dtype)

    def truncated(self, a, b, d, precision, most):
        return dot(self, *((cut(a), cut(b)) if precision == INPUT_PRECISION.TF32 else (a, b)), d, precision, most)

    InterpreterBuilder.create_dot = truncated


def main(backend: str) -> None:
    torch.set_num_threads(1)
    refuse_stray_pointers()
    cut_to_tf32()
    empty = torch.empty
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    jobs = {str(case): lambda case=case: check(case, backend) for case in TINY}
    jobs |= {"opcheck": lambda: opcheck(True), "opcheck without options": lambda: opcheck(False)}
    results = {}
    for name, job in jobs.items():
        try:
            job()
            results[name] = ""
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
