"""The CUDA kernels on the CPU: sources and host code through the emulator, against the fp64 reference."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mambavision.kernels import cuda, cuda_layout, nvrtc, reference
from tests.kernels import sanitized, test_ssd
from tests.kernels.emulated import ASCENDING, DESCENDING, RANDOM, guarded
from tests.kernels.test_backends import COVERING, EXTREME, Case, check, make, relative

ORDERS = (ASCENDING, DESCENDING, RANDOM, RANDOM + 1)
PRIMITIVES = (cuda_layout.FORWARD[0], Path(__file__).with_name("emulator") / "primitives.cu")


def primitive(entry: str, a: Tensor, b: Tensor, c: Tensor, rows: int = 0, threads: int = 32) -> None:
    four = entry.startswith("four_warps")
    defines = (f"ENTRY={entry}", f"THREADS={threads}", f"TENSOR_ASYNC={int(four)}")
    kernel = nvrtc.kernel(PRIMITIVES, "primitive", defines, a.get_device(), 16384 if four else 4096)
    argument = struct.pack("PPPi", a.data_ptr(), b.data_ptr(), c.data_ptr(), rows)
    nvrtc.launch(kernel, 1, threads, argument, a.get_device())


@pytest.mark.parametrize("rows", [16, 5])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_matrices_by_fragments(dtype, transposed, rows, machine):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, s, generator=g).to(machine, dtype) for s in ((16, 16), (16, 8)))
    c = torch.full((16, 8), float("nan"), device=machine)
    stored = (a.mT.contiguous(), b.mT.contiguous()) if transposed else (a, b)
    primitive(f"product<{1 if dtype == torch.bfloat16 else 2},{int(transposed)}>", *stored, c, rows)
    kept = torch.arange(16, device=machine) < rows
    a = a * (kept if transposed else kept[:, None])
    assert torch.equal(c, a.float() @ b.float())


def test_a_product_with_ten_bits_of_mantissa(machine):
    g = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (16, 8), generator=g) * 2 - 1
    a, b = torch.randint(1024, 2048, (16, 8), generator=g) * sign, torch.randint(-9, 9, (8, 8), generator=g)
    c = torch.full((16, 8), float("nan"), device=machine)
    primitive("product_tf32", (a + 0.9 * sign).to(machine), b.float().to(machine), c)
    assert torch.equal(c.cpu(), a.float() @ b.float())


def four_warps(options: str, device: str, columns: int = 64, transposed: bool = False) -> bool:
    """Whether a product of four warps comes out right."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, s, generator=g).to(device, torch.bfloat16) for s in ((64, 16), (16, columns)))
    c = torch.full((64, columns), float("nan"), device=device)
    stored = b.mT.contiguous() if transposed else b
    primitive(f"four_warps<{columns},{int(transposed)},{options}>", a, stored, c, threads=128)
    return torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("columns, transposed", [(64, False), (64, True), (32, True)])
def test_a_product_of_four_warps(columns, transposed, machine):
    if machine == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only sm_90 has it")
    assert four_warps("1,1,1", machine, columns, transposed)


def test_a_product_of_four_warps_that_is_not_waited_for(emulator):
    assert not four_warps("1,0,1", "cpu")


@pytest.mark.parametrize("options, what", [("0,1,1", "not published"), ("1,1,0", "take part in 0 and 1")])
def test_a_product_of_four_warps_gone_wrong(options, what, emulator):
    with pytest.raises(RuntimeError, match=what):
        four_warps(options, "cpu")
        pytest.fail("passed")


def test_what_a_warp_passes_on_to_another(machine):
    given, got = torch.arange(32.0, device=machine), torch.zeros(32, device=machine)
    primitive("passed_on", given, given, got, threads=64)
    assert torch.equal(got, given.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_sixteen_bits(dtype, machine):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    between = torch.cat([every, every * (1 + 2**-9), every * (1 + 2**-12), torch.tensor([65519.9, 65520, 1e30, 3e38])])
    between = torch.cat([between, -between, torch.tensor([float("inf")] * 2)])
    between = between[: between.numel() // 2 * 2].to(machine)
    got = torch.zeros(2 * between.numel(), device=machine)
    primitive(f"rounded<{1 if dtype == torch.bfloat16 else 2}>", between, between, got, between.numel())
    want = between.to(dtype)
    assert torch.equal(got[: between.numel()], want.float())
    singles = got[between.numel() :].view(torch.int16)[: between.numel()]
    assert torch.equal(singles, want.view(torch.int16))


def test_approximate_functions(machine):
    v = torch.linspace(-125, 125, 4001, device=machine)
    v = v[v != 0]
    got = torch.zeros(v.numel(), 2, device=machine)
    primitive("approximations", v, v, got, v.numel())
    torch.testing.assert_close(got.double(), torch.stack([v.double().exp2(), 1 / v.double()], 1), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    "entry, what",
    [
        ("diverging_barriers", "barrier of line"),
        ("lonely_shuffle", "wait for ever|not there any more"),
        ("lonely_barrier", "wait for ever"),
        ("taken_over_from_no_one", "wait for ever"),
        ("passed_on_twice", "no one has taken over"),
        ("beyond_shared", "outside its 4096 bytes"),
        ("crooked_row", "not a multiple of 16"),
        ("beyond_tensor", "thread 40: touches"),
    ],
)
def test_what_a_gpu_would_hang_or_go_wrong_on_is_refused(entry, what, emulator):
    v = guarded(torch.zeros(1024), at_end=True)
    with pytest.raises(RuntimeError, match=what):
        primitive(entry, v, v, v, rows=1024, threads=64)
        pytest.fail(f"{entry} passed")


@pytest.mark.parametrize("entry, threads", [("race", 64), ("no_wait", 32)])
def test_what_relies_on_luck_gives_other_bits_in_another_order(entry, threads, emulator):
    seen = []
    for emulator.order in (ASCENDING, DESCENDING):
        c = torch.zeros(threads)
        primitive(entry, torch.arange(256.0), c, c, threads=threads)
        seen.append(c)
    assert not torch.equal(*seen)


def names(emulator) -> set[str]:
    return {name for name, _, _ in emulator.launches}


ALL = {*cuda_layout.ENTRIES, "ssd_sums", "ssd_chain", "ssd_outputs", "ssd_decays", "ssd_walk", "ssd_gradients"}
SEGMENTED = {"scan_reach", "scan_carry", "scan_reach_back", "scan_carry_back"}


@pytest.mark.parametrize("case, processors", [(c, (1, 132)[i % 2]) for i, c in enumerate(COVERING)], ids=str)
def test_the_scan_against_the_reference(case, processors, emulator):
    emulator.processors = processors
    check(case, "cuda")
    assert (names(emulator) >= SEGMENTED) == (case.length >= 512)


@pytest.mark.parametrize("case", EXTREME[::2], ids=str)
def test_extreme_steps_and_decays(case, emulator):
    check(case, "cuda")


def by_token(v: Tensor) -> Tensor:
    """Same values, tokens as neighbours in memory."""
    return v.movedim(1, -1).contiguous().movedim(-1, 1)


def direct(
    case: Case, device: str = "cpu", starts: bool = False, change=lambda name, v: v, place=lambda v: v
) -> list[Tensor]:
    """`scan` and `scan_backward` of the case, called as the operator calls them, once they agree with the reference."""
    args = {k: change(k, v).to(device) for k, v in make(case).items()}
    if case.strided:
        args |= {k: by_token(args[k]) for k in ("x", "delta", "B", "C")}
    args = {k: place(v) for k, v in args.items()}
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(case.length, generator=g) for _ in case.orders])
    order = place(order.int().to(device))
    x = args["x"][:, :, None]
    inputs = (x, *(args.get(k) for k in ("delta", "A", "B", "C", "D", "delta_bias", "initial_state")), order)
    kept = None
    if starts:
        shape, dtype = cuda.kept_states(x, args["delta"], args["A"])
        kept = place(torch.empty(shape, dtype=dtype, device=device))
    y, last = cuda.scan(*inputs, case.options, case.merge, starts=kept)
    dy, dlast = (torch.randn(v.shape, generator=g).to(v) for v in (y, last))
    dy, dlast = place(by_token(dy) if case.strided else dy), place(dlast)
    gradients = cuda.scan_backward(dy, dlast, *inputs, case.options, case.merge, starts=kept)
    leaves = [v.double().requires_grad_() if v is not None else None for v in inputs[:-1]]
    want = reference.scan(*leaves, order, case.options, case.merge)
    given = [v for v in leaves if v is not None]
    exact = torch.autograd.grad(want, given, [dy.double(), dlast.double()])
    results = [y, last, *(v for v, leaf in zip(gradients, leaves, strict=True) if leaf is not None)]
    limit = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}[case.dtype]
    for i, (got, value) in enumerate(zip(results, (*want, *exact), strict=True)):
        assert relative(got.detach().double().cpu(), value.detach().cpu()) < limit, i
    return results


RACING = [Case(530, 16, "bf16", 3), Case(70, 16, "fp32", 40), Case(40, 1, "fp16", 33), Case(530, 2, "fp16", 33)]
RACING = [
    (replace(case, strided=strided), (132, 1)[i % 2]) for i, case in enumerate(RACING) for strided in (False, True)
]


@pytest.mark.parametrize("case, processors", RACING, ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(case, processors, emulator):
    emulator.processors, seen = processors, []
    for emulator.order in ORDERS:
        seen.append(direct(case, starts=case.d_state < 16))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


OUTSIDE = [*(case for case, _ in RACING), Case(33, 17, "fp32", 7, merge=False), Case(1, 64, "bf16", 1)]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("case, processors", [(c, (132, 1)[i % 2]) for i, c in enumerate(OUTSIDE)], ids=str)
def test_nothing_outside_of_tensors_is_touched(case, processors, at_end, emulator, monkeypatch):
    allocate = Tensor.new_empty

    def place(v):
        return guarded(v, at_end)

    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: place(allocate(*args, **kwargs)))
    emulator.processors = processors
    direct(case, starts=case.d_state < 16, place=place)


@pytest.mark.parametrize(
    "case, options",
    [
        (Case(70, 16, "fp32", 9), {"keep_decay": True}),
        (Case(70, 16, "fp32", 9), {"tile": 8, "segment": 24}),
        (Case(33, 8, "bf16", 5, merge=False), {"segment": 16}),
    ],
    ids=str,
)
def test_plans_that_no_small_shape_is_given(case, options, emulator, monkeypatch):
    plan = cuda_layout.plan

    def other(*args, backward, **kwargs):
        chosen = plan(*args, backward=backward, **kwargs)
        return chosen._replace(**{k: v for k, v in options.items() if backward or k != "keep_decay"})

    monkeypatch.setattr(cuda_layout, "plan", other)
    direct(case)
    assert (names(emulator) >= SEGMENTED) == ("segment" in options)


@pytest.mark.parametrize("d_state", [1, 16])
def test_architectures_without_such_products(d_state, emulator, monkeypatch):
    """sm_75 sums dB and dC by shuffles."""
    for cached in (cuda_layout._kernel, cuda.scans_of):
        cached.cache_clear()
    emulator.architecture = 750
    try:
        direct(Case(40, d_state, "fp16", 9))
    finally:
        for cached in (cuda_layout._kernel, cuda.scans_of):
            cached.cache_clear()


@pytest.mark.parametrize("case", [Case(65, 16, "fp32", 5), Case(65, 16, "bf16", 5), Case(65, 2, "fp16", 5)], ids=str)
def test_states_kept_for_the_backward(case, emulator):
    """None are computed again; in float32 they are the same numbers."""
    kept = direct(case, starts=True)
    assert "scan_starts" not in names(emulator)
    again = direct(case)
    assert "scan_starts" in names(emulator)
    if case.dtype != "bf16":
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("size", [1e-6, 1e-30, 0.0])
def test_steps_near_zero(size, machine):
    direct(Case(65, 4, "fp32", 5, options=False), machine, change=lambda k, v: size * v if k == "delta" else v)


@pytest.mark.parametrize("name", ["x", "delta", "B", "C"])
def test_nan_and_infinity_are_not_hidden(name, machine):
    """One bad token spoils its channel from there on, or all channels from B and C, and nothing before it."""
    for bad in (float("nan"), float("inf")):
        args = make(Case(40, 16, "fp32", 17))
        args[name][0, 20, ..., 3] = bad
        x, *others = (args[k].to(machine) for k in ("x", "delta", "A", "B", "C"))
        inputs = (x[:, :, None], *others, None, None, None, None)
        y, last = cuda.scan(*inputs, True, False)
        channel = slice(None) if name in "BC" else 3
        assert not y[0, 20, :, channel].isfinite().any()
        assert y[0, :20].isfinite().all() and y[1].isfinite().all() and last[1].isfinite().all()
        if name != "C":
            assert not last[0, :, channel].isfinite().all()


def test_every_kernel_through_the_operators(emulator, monkeypatch):
    """What compute-sanitizer is shown on a GPU holds all of them."""
    emulator.processors = 4  # so that an image is enough
    merged = [(1, grid, 2, 64, N, dtype) for _, grid, _, _, N, dtype in sanitized.SCANS[4:6]]
    monkeypatch.setattr(sanitized, "device", "cpu")
    monkeypatch.setattr(sanitized, "SCANS", [*sanitized.SCANS[2:4], *merged])
    monkeypatch.setattr(sanitized, "SSDS", sanitized.SSDS[2:3])
    sanitized.call_all()
    assert names(emulator) >= ALL


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("shape", sanitized.SSDS[:3:2], ids=str)
def test_state_space_duality_touches_nothing_outside_of_tensors(shape, at_end, emulator, monkeypatch):
    def placed(allocate):
        return lambda *args, **kwargs: guarded(allocate(*args, **kwargs), at_end)

    monkeypatch.setattr(sanitized, "device", "cpu")
    monkeypatch.setattr(sanitized, "normal", placed(sanitized.normal))
    monkeypatch.setattr(Tensor, "new_empty", placed(Tensor.new_empty))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, placed(getattr(torch, name)))
    sanitized.dualities(*shape)


@pytest.mark.parametrize("case", [test_ssd.CUDA[i] for i in (1, 2, 4, 5, 8)], ids=str)
def test_state_space_duality_as_an_operator(case, machine):
    """Forward and every gradient, through autograd."""
    test_ssd.check(case, "cuda", machine)
