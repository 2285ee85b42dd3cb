"""The backward pass of ssd in CUDA C++ against the fp64 reference: on a GPU, and through the emulator on a CPU."""

import sys
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from mambavision.kernels import ssd_chunked, ssd_cuda_backward, ssd_reference
from mambavision.kernels.ssd_cuda_backward import Plan, _shared, plan, ssd_backward
from mambavision.ops import ssd
from tests.kernels import test_ssd
from tests.kernels.emulated import DESCENDING, RANDOM
from tests.kernels.test_ssd import EXTREME, FULL, GRADIENT_LIMIT, LARGE, Case, make, relative, strided
from tests.kernels.test_ssd import check as check_operator

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
SMALL = [
    (Case(1, "sum", dtype="bf16", d_state=16, headdim=16), None),
    (Case(2, "free", groups=3, dtype="bf16"), None),
    (Case(49, "causal", 4, groups=2, d_state=16, dtype="bf16", strided=True), None),
    (Case(65, "sum", 2, dtype="bf16", headdim=16, d_state=16, options=False), Plan(64, 1, 2)),
    (Case(70, "free", dtype="bf16"), Plan(64, 2, 2)),
    (Case(197, "sum", 2, 64, 16, dtype="bf16"), Plan(64, 2, 3)),
    (Case(140, "causal", 2, 40, 33, dtype="bf16"), Plan(128, 1, 2)),
    (Case(300, "free", 2, 16, 64, dtype="bf16", strided=True), Plan(128, 2, 3)),
    (Case(65, "sum", dtype="bf16", dt=20.0, decay=-16.0), Plan(64, 3, 2)),
    (Case(65, "sum", dtype="bf16", size=1e3, options=False), Plan(64, 3, 2)),
    (Case(197, "sum", 4, 16, 16, dtype="bf16"), Plan(64, 4, 2, 1)),
]


WIDE = [
    (Case(140, "sum", 2, 64, 64, dtype="bf16"), Plan(128, 2, 2)),
    (Case(200, "free", 2, 64, 64, 2, dtype="bf16", strided=True), Plan(64, 1, 3, 1)),
    (Case(300, "causal", 2, 64, 64, dtype="bf16"), Plan(128, 2, 3)),
    (Case(70, "sum", 2, 60, 57, dtype="bf16", options=False), Plan(64, 1, 2)),
]


def inputs(case: Case) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None]:
    """Arguments by name, and the gradients of y and of the last states."""
    args = make(case)
    batch, length, H, P = args["x"].shape
    state = args.get("initial_state")
    if state is not None:
        args["D"] = args["D"].expand(batch, length, H)
        args["initial_state"] = state if state.dim() == 5 else state[:, None]
    g = torch.Generator().manual_seed(1)
    grad_y = torch.randn(args["x"].shape, generator=g).to(args["x"].dtype)
    grad_state = None if state is None else torch.randn(args["initial_state"].shape, generator=g)
    return {name: args.get(name) for name in NAMES}, grad_y, grad_state


def run(case: Case, chosen: Plan | None, device: str = "cpu") -> list[Tensor | None]:
    args, grad_y, grad_state = inputs(case)
    tensors = [None if v is None else v.to(device) for v in (grad_y, grad_state, *args.values())]
    if case.strided:
        tensors = [v if v is None else strided(v) for v in tensors]
    options = (case.options, case.form != "causal", case.form != "free", None)
    return list(ssd_backward(*tensors, *options, chosen=chosen))


def expected(case: Case, device: str = "cpu") -> list[Tensor | None]:
    args, grad_y, grad_state = inputs(case)
    args = {name: v if v is None else v.to(device).double().requires_grad_() for name, v in args.items()}
    forward = ssd_chunked.ssd if case.length > 100 else ssd_reference.ssd
    y, last = forward(*args.values(), case.options, case.form != "causal", case.form != "free", None)
    outputs, weights = (y, last)[: 1 + case.options], (grad_y, grad_state)[: 1 + case.options]
    given = [v for v in args.values() if v is not None]
    grads = iter(torch.autograd.grad(outputs, given, [v.to(device).double() for v in weights]))
    return [v if v is None else next(grads) for v in args.values()]


def check(case: Case, chosen: Plan | None, device: str = "cpu") -> None:
    errors = {}
    for name, actual, right in zip(NAMES, run(case, chosen, device), expected(case, device), strict=True):
        assert (actual is None) == (right is None), name
        if right is not None and not (error := relative(actual.double(), right)) <= GRADIENT_LIMIT[case.dtype]:
            errors[name] = f"{error:.2e}"
    assert not errors, errors


@pytest.mark.parametrize(("case", "chosen"), SMALL + WIDE[:1], ids=str)
def test_through_the_emulator(case, chosen, emulator):
    check(case, chosen)


@pytest.fixture
def asynchronous(monkeypatch):
    """Four warps' products together, as sm_90 has them."""
    monkeypatch.setattr(ssd_cuda_backward, "_asynchronous", lambda device: True)
    ssd_cuda_backward._build.cache_clear()
    ssd_cuda_backward._layout.cache_clear()
    yield
    ssd_cuda_backward._build.cache_clear()
    ssd_cuda_backward._layout.cache_clear()


@pytest.mark.parametrize(("case", "chosen"), WIDE, ids=str)
def test_sm_90_through_the_emulator(case, chosen, emulator, asynchronous):
    check(case, chosen)


@pytest.mark.parametrize(
    "case",
    [
        Case(70, "sum", 2, 16, 16, dtype="bf16"),
        Case(33, "causal", 2, 5, 4, 2, "bf16", strided=True),
        Case(20, "free", 2, 64, 64, dtype="bf16"),
        Case(9, "sum", dtype="bf16", options=False),
    ],
    ids=str,
)
def test_the_operator_with_gradients(case, emulator):
    check_operator(case, "cuda")


def test_sums_over_paths_outlast_cancellation(emulator):
    """dA adds products of B and C of either sign, here to a tenth of what they come to in the mean square."""
    case = test_ssd.CUDA[6]
    actual, right = test_ssd.run(case, "cuda")["grad_A"], test_ssd.expected_of(case)["grad_A"]
    assert relative(actual, right) < 5e-3


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_tokens_of_another_size_than_the_rest(size, emulator, monkeypatch):
    """Their products with the others keep their mantissa: the gradient of x of one token is as good as any."""
    one = Case(70, "sum", 2, 16, 16, dtype="bf16", options=False)
    others = make

    def made(case: Case) -> dict[str, Tensor]:
        args = others(case)
        args["B"][:, 33] *= size
        return args

    monkeypatch.setattr(sys.modules[__name__], "make", made)
    for actual, right in zip(run(one, None)[:2], expected(one)[:2], strict=True):
        for token in (slice(33, 34), slice(0, 33), slice(34, 70)):
            assert relative(actual[:, token].double(), right[:, token]) < GRADIENT_LIMIT["bf16"]


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        run(Case(3, dtype="fp16", options=False), None)


def test_the_order_of_threads_changes_no_bit(emulator):
    case, chosen = Case(140, "sum", 3, 16, 16, dtype="bf16"), Plan(64, 2, 2)
    results = []
    for emulator.order in (0, DESCENDING, RANDOM):
        results.append(run(case, chosen))
    assert all(torch.equal(a, b) for one, two in pairwise(results) for a, b in zip(one, two, strict=True))


def test_nothing_unwritten_comes_back(emulator, monkeypatch):
    empty = torch.empty

    def poisoned(*args, **options):
        v = empty(*args, **options)
        return v.fill_(255 if v.dtype == torch.uint8 else torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    check(Case(130, "sum", 2, 24, 16, dtype="bf16", options=False), Plan(64, 1, 2))


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_written_where_they_are_wanted(emulator, parts):
    args, grad_y, _ = inputs(Case(70, "sum", 4, 16, 8, 2, dtype="bf16", options=False))
    (batch, length, H, P), (_, _, G, N) = args["x"].shape, args["B"].shape
    rest = (False, True, True, None)
    expected = ssd_backward(grad_y, None, *args.values(), *rest, chosen=Plan(64, H // G // parts, 2))
    wide = torch.full((batch, length, H * P + 2 * G * N + 8), 7.0, dtype=torch.bfloat16)
    dt = torch.full((batch, length, H + 3), 7.0, dtype=args["dt"].dtype)
    dx, dB, dC, beside = wide.split((H * P, G * N, G * N, 8), -1)
    out = (dx.unflatten(-1, (H, P)), dt[..., 3:], *(v.unflatten(-1, (G, N)) for v in (dB, dC)))
    grads = ssd_backward(grad_y, None, *args.values(), *rest, out=out, chosen=Plan(64, H // G // parts, 2))
    assert all(grads[i] is v for i, v in zip((0, 1, 3, 4), out, strict=True))
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert (beside == 7).all() and (dt[..., :3] == 7).all()


def test_an_empty_batch(emulator):
    args, grad_y, _ = inputs(Case(5, "sum", dtype="bf16", options=False))
    empty = [v if v is None or name == "A" else v[:0] for name, v in args.items()]
    grads = ssd_backward(grad_y[:0], None, *empty, False, True, True, None)
    assert [g if g is None else tuple(g.shape) for g in grads] == [v if v is None else tuple(v.shape) for v in empty]
    assert not grads[2].any()


def test_a_plan_fits_its_block_and_covers_all_heads():
    sizes = product((1, 3, 64), (1, 64, 65, 256, 16384), (1, 5, 36), (1,), (16, 64), (16, 64), (2, 4), (1, 132))
    for (*shape, processors), room in product(sizes, (99 << 10, 163 << 10, 227 << 10)):
        chosen, (_, length, H, _, P, N, kinds) = plan(*shape, processors, room), shape
        assert max(_shared(chosen, P, N, kinds, chosen.stages)) <= room and 1 <= chosen.part <= H
        assert chosen.tile == (128 if room > 200 << 10 and length > 64 else chosen.tile)
    assert plan(1, 65, 1, 1, 64, 64, 4, 1, 48 << 10) is None


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in FULL + EXTREME + LARGE if c.dtype == "bf16"], ids=str)
def test_on_a_gpu(case):
    check(case, None, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in FULL if c.dtype == "bf16"][::4], ids=str)
def test_the_operator_with_gradients_on_a_gpu(case):
    check_operator(case, "cuda", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [64, 128])
def test_twice_gives_the_same_bits(tile):
    case, chosen = Case(3136, "sum", 6, 64, 64, dtype="bf16"), Plan(tile, 2, 3)
    one, two = run(case, chosen, "cuda"), run(case, chosen, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_compiled_while_the_forward_is(emulator):
    """A forward whose gradients are wanted begins to compile exactly what its backward launches."""
    case = Case(70, "sum", 2, 16, 16, dtype="bf16", options=False)
    ssd_cuda_backward._build.cache_clear()
    ssd_cuda_backward._layout.cache_clear()
    x, *rest = (v.requires_grad_() for v in make(case).values())
    y = ssd(x, *rest, bidirectional=True, backend="cuda")
    assert ssd_cuda_backward._build.cache_info().misses == 1
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert ssd_cuda_backward._build.cache_info().misses == 1
    assert [name for name, _, _ in emulator.launches][-1] == "ssd_sums"
