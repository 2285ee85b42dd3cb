"""Paths of the CUDA scan that size and layout of a call choose: scans merged on chip, a team for each scan, gates."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mambavision.kernels import cuda, cuda_layout, nvrtc, reference
from mambavision.ops import dispatch, multi_scan, projected_scan
from tests.kernels.test_backends import Case, relative
from tests.kernels.test_emulated import ORDERS, by_token, direct, names

CROSS = ("row", "col", "row_reverse", "col_reverse")
MERGED = {"scan_merged", "scan_merged_back"}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _fresh_layouts():
    """Tests here change what plans depend on."""
    for cached in (cuda.scans_of, dispatch._planned):
        cached.cache_clear()
    yield
    for cached in (cuda.scans_of, dispatch._planned):
        cached.cache_clear()


@pytest.fixture
def small_machine(machine, monkeypatch):
    """A machine that a few blocks fill."""
    monkeypatch.setattr(nvrtc, "processors", lambda device: 1)
    return machine


MERGING = [
    Case(70, 1, "fp32", 16),
    Case(133, 1, "bf16", 32, orders=CROSS),
    Case(400, 1, "fp16", 16, orders=CROSS),  # two spans
    Case(1, 1, "fp32", 48),
    Case(65, 1, "bf16", 16, options=False, orders=CROSS),
    Case(33, 1, "fp16", 16, orders=("row",)),
]


@pytest.mark.parametrize("case", MERGING, ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
def test_scans_merged_on_chip(ordered, case, small_machine, monkeypatch):
    """``ordered``: B and C are put in the order of their scans first, as for long sequences."""
    monkeypatch.setattr(cuda_layout, "_ORDERED", 1 if ordered else case.length + 1)
    built = []
    kernel = cuda_layout._kernel
    monkeypatch.setattr(
        cuda_layout, "_kernel", lambda name, *args, **kwargs: built.append(name) or kernel(name, *args, **kwargs)
    )
    direct(case, small_machine, starts=True)
    assert set(built) == MERGED | {"scan_sum"} | ({"scan_merged_states"} if ordered else set())


@pytest.mark.parametrize("ordered", [False, True], ids=["", "ordered"])
@pytest.mark.parametrize("case", [MERGING[0], MERGING[2]], ids=str)
def test_merged_scans_give_the_same_bits_in_any_order_of_threads(case, ordered, emulator, monkeypatch):
    monkeypatch.setattr(cuda_layout, "_ORDERED", 1 if ordered else case.length + 1)
    seen = []
    for emulator.order in ORDERS:
        seen.append(direct(case, starts=True))
    assert names(emulator) >= MERGED
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(
    "case",
    [replace(MERGING[0], **v) for v in ({"dim": 24}, {"d_state": 2}, {"strided": True}, {"merge": False})],
    ids=str,
)
def test_what_cannot_be_merged_on_chip_is_merged_in_memory(case, emulator):
    direct(case, starts=True)
    assert not names(emulator) & MERGED


def test_sums_that_do_not_fit_are_merged_in_memory(emulator):
    emulator.shared = 99 << 10
    direct(Case(1600, 1, "fp32", 16), starts=True)
    assert not names(emulator) & MERGED
    direct(Case(40, 1, "fp32", 16), starts=True)
    assert names(emulator) >= MERGED


def test_a_backward_without_kept_states_is_merged_in_memory(emulator):
    direct(MERGING[0])
    assert names(emulator) & MERGED == {"scan_merged"}


@pytest.mark.parametrize(
    "case",
    [Case(49, 16, "bf16", 9, orders=CROSS), Case(35, 5, "fp32", 6), Case(20, 1, "fp16", 70, orders=CROSS[:3])],
    ids=str,
)
def test_a_team_for_each_scan(case, machine, monkeypatch):
    monkeypatch.setattr(nvrtc, "processors", lambda device: 132)
    blocks = []
    launch = nvrtc.launch
    monkeypatch.setattr(nvrtc, "launch", lambda *args: blocks.append(args[1:3]) or launch(*args))
    direct(case, machine)
    batch, lanes = 2, 32 // max(1, 1 << (case.d_state - 1).bit_length() >> 1)
    assert blocks[0] == (batch * -(-case.dim // lanes), 32 * len(case.orders))


def test_teams_give_the_same_bits_in_any_order_of_threads(emulator):
    emulator.processors, seen = 132, []
    for emulator.order in ORDERS:
        seen.append(direct(Case(35, 16, "fp32", 6)))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def gated(length: int, dim: int, N: int, dtype: torch.dtype, machine: str, change) -> list[Tensor]:
    """`scan` and `scan_backward` with a gate, once they agree with the reference; ``change`` lays out z and dy."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=g).to(machine, dtype)

    batch, K = 2, 2
    x, delta, z = normal(batch, length, 1, dim), 0.5 * normal(batch, length, K, dim), normal(batch, length, K, dim)
    A = -(0.1 + normal(K, dim, N, dtype=torch.float32).abs())
    B, C = normal(batch, length, K, N), normal(batch, length, K, N)
    D, bias = normal(K, dim, dtype=torch.float32), normal(K, dim, dtype=torch.float32)
    order = torch.stack([torch.randperm(length, generator=g) for _ in range(K)]).to(machine)
    inputs, z = (x, delta, A, B, C, D, bias, None), change(z)
    y, last = cuda.scan(*inputs, order, True, False, z=z)
    dy = change(normal(*y.shape))
    gradients = cuda.scan_backward(dy, None, *inputs, order, True, False, z=z)
    leaves = [v.double().requires_grad_() for v in (*inputs[:-1], z)]
    want = reference.scan(*leaves[:-1], None, order, True, False, z=leaves[-1])
    exact = torch.autograd.grad(want[0], leaves, dy.double())
    results = [y, last, *gradients[:7], gradients[8]]
    for i, (got, value) in enumerate(zip(results, (*want, *exact), strict=True)):
        assert relative(got.double().cpu(), value.detach().cpu()) < LIMIT[dtype], i
    return results


@pytest.mark.parametrize("change", [by_token, lambda v: v], ids=["by_token", "by_channel"])
@pytest.mark.parametrize(
    "length, dim, N, dtype, processors",
    [
        (70, 5, 16, torch.float32, 1),
        (530, 3, 4, torch.bfloat16, 132),
        (33, 40, 1, torch.float16, 1),
        (40, 130, 2, torch.float32, 1),
    ],
)
def test_a_gate_multiplies_outputs_and_has_a_gradient(length, dim, N, dtype, processors, change, machine, monkeypatch):
    monkeypatch.setattr(nvrtc, "processors", lambda device: processors)
    results = gated(length, dim, N, dtype, machine, change)
    assert all(torch.equal(a, b) for a, b in zip(results, gated(length, dim, N, dtype, machine, change), strict=True))


def test_gates_give_the_same_bits_in_any_order_of_threads(emulator):
    seen = []
    for emulator.order in ORDERS:
        seen.append(gated(40, 9, 16, torch.float32, "cpu", by_token))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("case", [MERGING[0], Case(40, 16, "fp32", 5)], ids=str)
def test_a_last_state_that_nobody_wants_is_not_made(case, small_machine):
    g = torch.Generator().manual_seed(0)
    K = len(case.orders)
    shapes = [(2, case.length, 1, case.dim), (2, case.length, K, case.dim), (K, case.dim, case.d_state)]
    shapes += [(2, case.length, K, case.d_state)] * 2
    inputs = [-torch.rand(s, generator=g).to(small_machine) for s in shapes]
    y, last = cuda.scan(*inputs, None, None, None, None, True, True)
    again, nothing = cuda.scan(*inputs, None, None, None, None, True, True, want_state=False)
    assert torch.equal(y, again) and nothing is None and last.isfinite().all()


@pytest.mark.parametrize("case", [Case(40, 128, "fp32", 3), Case(40, 2, "fp32", 140), Case(33, 64, "bf16", 9)], ids=str)
def test_backwards_of_few_warps_give_the_same_bits_in_any_order_of_threads(case, emulator):
    """As many as fit into 64 KB; one warp sums dB and dC without a second buffer."""
    emulator.shared, seen = 64 << 10, []
    for emulator.order in ORDERS:
        seen.append(direct(case))
    assert next(threads for name, _, threads in emulator.launches if name == "scan_backward") <= 96
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(
    "length, N, channels, kept",
    [(70, 1, 16, True), (70, 1, 20, False), (33, 16, 33, False), (530, 2, 9, False)],
    ids=["merged", "one state", "states", "segments"],
)
def test_gradients_in_memory_that_there_is(length, N, channels, kept, small_machine):
    """The gradient of delta over delta itself, others in memory given: the same bits."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=g).to(small_machine, dtype)

    K, f32 = 2, torch.float32
    x, delta = normal(2, length, 1, channels), normal(2, length, K, channels)
    A, states = -normal(K, channels, N, dtype=f32).abs(), [normal(2, length, K, N) for _ in range(2)]
    order = torch.stack([torch.randperm(length, generator=g) for _ in range(K)]).int().to(small_machine)
    rest = (A, *states, normal(K, channels, dtype=f32), None, None, order, True, True)
    starts = {}
    if kept:
        shape, dtype = cuda.kept_states(x, delta, A)
        starts["starts"] = torch.empty(shape, dtype=dtype, device=small_machine)
    y, _ = cuda.scan(x, delta, *rest, **starts)
    dy = normal(*y.shape)
    want = cuda.scan_backward(dy, None, x, delta, *rest, **starts)
    memory, own = torch.full_like(x, torch.nan), delta.clone()
    given = {"dx": memory, "overwrite_delta": True}
    if N % 4 == 0:
        both = torch.full((2, length, K, 2 * N + 8), 7.0, dtype=x.dtype, device=small_machine)
        given |= {"dB": both[..., 4 : 4 + N], "dC": both[..., 4 + N : 4 + 2 * N]}
    got = cuda.scan_backward(dy, None, x, own, *rest, **starts, **given)
    assert got[0].data_ptr() == memory.data_ptr() and got[1].data_ptr() == own.data_ptr()
    if N % 4 == 0:
        assert got[3].data_ptr() == both[..., 4:].data_ptr() and (both[..., [0, 3, -4, -1]] == 7).all()
    assert all(torch.equal(a, b) for a, b in zip(got[:6], want[:6], strict=True))
    assert got[6:] == want[6:] == (None, None), "of no bias and no initial state"


@pytest.mark.parametrize("N", [1, 4])
def test_one_layout_at_addresses_of_every_kind(N, small_machine):
    """Of x, delta and dy, which a merging kernel copies 16 bytes at a time, and of parameters: the same numbers."""
    g = torch.Generator().manual_seed(0)
    batch, length, K, channels = 2, 70, 2, 16
    shapes = {"x": (batch, length, channels), "delta": (batch, length, K, channels), "A": (K, channels, N)}
    shapes |= {"B": (batch, length, K, N), "C": (batch, length, K, N), "D": (K, channels)}
    tensors = {name: torch.randn(shape, generator=g).to(small_machine) for name, shape in shapes.items()}
    tensors["A"] = -tensors["A"].abs()
    dy = torch.randn(batch, length, channels, generator=g).to(small_machine)

    def moved(v):
        return torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape)

    results = []
    for which in ((), ("x",), ("delta",), ("A", "D"), (), ("dy",)):
        values = {name: moved(v) if name in which else v for name, v in tensors.items()}
        leaves = [v.detach().requires_grad_() for v in values.values()]
        y = multi_scan(*leaves, orders=("row", "col"), grid=(7, 10), backend="cuda")
        results.append([y, *torch.autograd.grad(y, leaves, moved(dy) if "dy" in which else dy)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[4], strict=True))


@pytest.mark.parametrize("processors, threads", [(4, 256), (3, 128)])
def test_a_backward_of_one_wave_has_large_blocks(processors, threads, machine, monkeypatch):
    monkeypatch.setattr(nvrtc, "processors", lambda device: processors)
    launched = []
    launch = nvrtc.launch
    monkeypatch.setattr(nvrtc, "launch", lambda *args: launched.append(args[1:3]) or launch(*args))
    case = Case(37, 16, "bf16", 64)
    direct(case, machine)
    assert launched[-2] == (2 * len(case.orders) * 64 * 4 // threads, threads)


@pytest.mark.parametrize("rank, N, images", [(8, 16, 4), (8, 16, 3), (6, 1, 4), (4, 4, 2)])
def test_projected_scans_as_on_a_gpu(rank, N, images, machine, monkeypatch):
    """One product for all K low-rank ones, padded; a batch in parts; gradients written where they are wanted."""
    module = sys.modules["mambavision.ops.projected_scan"]
    monkeypatch.setattr(module, "_joined", lambda dt_weight: True)
    monkeypatch.setattr(module, "_width", lambda x, rows: rows + -rows % 8)
    monkeypatch.setattr(module, "_images", lambda x, A: images)
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(machine)

    K, D, grid = 4, 32, (5, 7)
    x, dy = normal(4, 35, D).bfloat16(), normal(4, 35, D).bfloat16()
    parameters = (0.2 * normal(K, rank + 2 * N, D), 0.3 * normal(K, D, rank), -normal(K, D, N).abs(), normal(K, D))
    bias, results = normal(K, D), []
    for backend, dtype in (("cuda", None), ("chunked", torch.float64)):
        leaves = [v.to(dtype or v.dtype).requires_grad_() for v in (x, *parameters, bias)]
        *inputs, delta_bias = leaves
        y = projected_scan(*inputs, orders="cross", grid=grid, delta_bias=delta_bias, backend=backend)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for got, want in zip(*results, strict=True):
        assert relative(got.detach().double().cpu(), want.detach().cpu()) < 2e-2
