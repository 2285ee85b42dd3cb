"""projected_scan: its equation, what it keeps, its refusals, registration with torch."""

import importlib

import pytest
import torch
from torch import Tensor

from mambavision.ops import multi_scan, projected_scan

module = importlib.import_module("mambavision.ops.projected_scan")

GRID = (3, 4)
LENGTH, CHANNELS, STATES, RANK = 12, 5, 3, 2


def arguments(K=4, *, batch=2, dtype=torch.float32, options=True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = {
        "x": normal(batch, LENGTH, CHANNELS),
        "x_proj": normal(K, RANK + 2 * STATES, CHANNELS),
        "dt_weight": normal(K, CHANNELS, RANK),
        "A": -torch.rand(K, CHANNELS, STATES, generator=g, dtype=torch.float64) - 0.1,
    }
    if options:
        args |= {"D": normal(K, CHANNELS), "delta_bias": normal(K, CHANNELS)}
    return {k: v.to(dtype).requires_grad_() for k, v in args.items()}


def written_out(x, x_proj, dt_weight, A, D=None, delta_bias=None, *, orders="cross"):
    dt, B, C = torch.einsum("bld,kcd->blkc", x, x_proj).split([RANK, STATES, STATES], -1)
    delta = torch.einsum("blkr,kdr->blkd", dt, dt_weight)
    return multi_scan(x, delta, A, B, C, D, orders=orders, grid=GRID, delta_bias=delta_bias, backend="reference")


def with_gradients(function, args: dict[str, Tensor]) -> list[Tensor]:
    y = function(**args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, list(args.values()), dy)]


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("options", [True, False])
def test_it_is_projection_then_scan(backend, options):
    def function(**args):
        return projected_scan(**args, orders="cross", grid=GRID, backend=backend)

    exact = with_gradients(written_out, arguments(options=options, dtype=torch.float64))
    found = with_gradients(function, arguments(options=options))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # another way
        torch.testing.assert_close(function(**arguments(options=options)), found[0])


@pytest.mark.parametrize("orders", [("hilbert",), ("row", torch.arange(LENGTH).flip(0))])
def test_any_orders(orders):
    args = arguments(len(orders))
    expected = with_gradients(lambda **a: written_out(**a, orders=orders), args)
    found = with_gradients(lambda **a: projected_scan(**a, orders=orders, grid=GRID), args)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    args = arguments(2, batch=1, dtype=torch.float64)

    def function(*values):
        return projected_scan(**dict(zip(args, values, strict=True)), orders="bidirectional", grid=GRID)

    torch.autograd.gradcheck(function, tuple(args.values()))


@pytest.mark.parametrize("frozen", ["x", "x_proj", "A", "D"])
def test_what_needs_no_gradient_gets_none(frozen):
    args = arguments()
    expected = dict(zip(args, with_gradients(written_out, args)[1:], strict=True))
    args[frozen] = args[frozen].detach()
    projected_scan(**args, orders="cross", grid=GRID).backward(
        torch.randn(2, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(1))
    )
    assert args[frozen].grad is None
    for name, v in args.items():
        if name != frozen:
            torch.testing.assert_close(v.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_delta_is_not_kept():
    args, kept = arguments(), {}

    def keep(v: Tensor) -> Tensor:
        kept[v.data_ptr()] = v.numel()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        projected_scan(**args, orders="cross", grid=GRID, backend="cpu")
    projected = 2 * LENGTH * 4 * (RANK + 2 * STATES)
    order = 4 * LENGTH
    assert sum(kept.values()) == sum(v.numel() for v in args.values()) + projected + order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_float32_parameters(dtype):
    args = arguments()
    expected = with_gradients(written_out, args)
    args["x"] = args["x"].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = projected_scan(**args, orders="cross", grid=GRID)
    assert y.dtype == dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [y, *torch.autograd.grad(y, list(args.values()), dy)]
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).norm() < 0.05 * other.norm()


def test_float32_tokens_under_autocast_are_the_same_with_and_without_gradients():
    args = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = projected_scan(**args, orders="cross", grid=GRID, backend="cpu")
        with torch.no_grad():
            plain = projected_scan(**args, orders="cross", grid=GRID, backend="cpu")
        inside = torch.autograd.grad(y.sum(), list(args.values()), retain_graph=True)
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    outside = torch.autograd.grad(y.sum(), list(args.values()))
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


WRONG = {
    "x must be": {"x": torch.zeros(2, 3, 4, 5)},
    "A must be": {"A": torch.zeros(4, 6, 3)},
    "x_proj must be .4, 8, 5.": {"x_proj": torch.zeros(4, 7, 5)},
    "dt_weight must be .4, 5, 2.": {"dt_weight": torch.zeros(4, 6, 2)},
    "D must be": {"D": torch.zeros(5)},
    "delta_bias must be": {"delta_bias": torch.zeros(4, 6)},
    "grid .3, 5. has 15 tokens": {"grid": (3, 5)},
    "orders must be": {"orders": "bidirectional"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        projected_scan(**({"orders": "cross", "grid": GRID} | arguments() | WRONG[message]))


@pytest.mark.parametrize("name", ["x_proj", "dt_weight", "A", "D", "delta_bias"])
def test_a_parameter_left_on_another_device_is_named(name):
    args = arguments()
    args[name] = args[name].detach().to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
        projected_scan(**args, orders="cross", grid=GRID, backend="cpu")


@pytest.fixture(params=[(False, 1), (False, 8), (True, 1), (True, 8)], ids=str)
def products(request, monkeypatch):
    """Low-rank products one by one or joined, rows of projections any or a multiple of 8, as on a CPU or a GPU."""
    joined, multiple = request.param
    monkeypatch.setattr(module, "_joined", lambda dt_weight: joined)
    monkeypatch.setattr(module, "_width", lambda x, rows: rows + -rows % multiple)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_products_and_parts_of_the_batch_do_not_matter(products, images, monkeypatch):
    monkeypatch.setattr(module, "_images", lambda x, A: images)
    args = arguments(batch=3)
    odd = args | {"x_proj": args["x_proj"][:, 1:].detach().requires_grad_()}  # R = 1, 7 rows: one of zeros
    odd["dt_weight"] = args["dt_weight"][..., 1:].detach().requires_grad_()
    for each in (args, odd):
        rank = each["dt_weight"].shape[-1]

        def expected(x, x_proj, dt_weight, rank=rank, **rest):
            fill = torch.zeros(4, CHANNELS, RANK - rank)
            rows = torch.cat([torch.zeros(4, RANK - rank, CHANNELS), x_proj], 1)
            return written_out(x, rows, torch.cat([fill, dt_weight], -1), **rest)

        found = with_gradients(lambda **a: projected_scan(**a, orders="cross", grid=GRID, backend="cpu"), each)
        torch.testing.assert_close(found, with_gradients(expected, each), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            plain = projected_scan(**each, orders="cross", grid=GRID, backend="cpu")
        torch.testing.assert_close(plain, found[0])


@pytest.mark.parametrize("options", [True, False])
def test_opcheck(options, products):
    args = arguments(options=options)
    y = projected_scan(**args, orders="cross", grid=GRID, backend="cpu")
    assert "ProjectedScan" in y.grad_fn.name()
    order = torch.stack([torch.randperm(LENGTH) for _ in range(4)]).int()
    inputs = (*args.values(), *(() if options else (None, None)), order, "cpu")
    torch.library.opcheck(torch.ops.mambavision.projected_scan, inputs)
    detached = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
    _, projected, starts = torch.ops.mambavision.projected_scan(*detached)
    backward = (torch.randn(2, LENGTH, CHANNELS), *detached[:7], projected, starts, "cpu")
    torch.library.opcheck(torch.ops.mambavision.projected_scan_backward, backward)


def test_compile_in_one_graph():
    args = arguments()
    torch.compiler.reset()

    def function(**args):
        return projected_scan(**args, orders="cross", grid=GRID)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, args), with_gradients(function, args))


def test_no_images():
    args = arguments(batch=0)
    found = with_gradients(lambda **a: projected_scan(**a, orders="cross", grid=GRID, backend="cpu"), args)
    assert found[0].shape == (0, LENGTH, CHANNELS)
    assert all(not v.any() for v in found[1:])


def large(batch, grid, channels, states, rank, *, device, dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    args = {
        "x": normal(batch, grid[0] * grid[1], channels).to(dtype),
        "x_proj": normal(4, rank + 2 * states, channels) * channels**-0.5,
        "dt_weight": normal(4, channels, rank) * rank**-0.5,
        "A": -torch.rand(4, channels, states, generator=g) - 0.1,
        "D": normal(4, channels),
        "delta_bias": normal(4, channels) - 2,
    }
    return {k: v.to(device).requires_grad_() for k, v in args.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("size", [(2, 40, 16, 4), (3, 64, 1, 6), (2, 33, 4, 3)], ids=str)
def test_on_cuda(size, backend, dtype, monkeypatch):
    batch, channels, states, rank = size
    grid = (9, 13)
    args = large(batch, grid, channels, states, rank, device="cuda", dtype=dtype)

    def function(backend, **args):
        return projected_scan(**args, orders="cross", grid=grid, backend=backend)

    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    expected = with_gradients(lambda **a: function("chunked", **a), exact)
    whole = with_gradients(lambda **a: function(backend, **a), args)
    again = with_gradients(lambda **a: function(backend, **a), args)
    monkeypatch.setattr(module, "_images", lambda x, A: 2)
    parts = with_gradients(lambda **a: function(backend, **a), args)
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert all(torch.equal(one, two) for one, two in zip(whole, again, strict=True))
    for found in (whole, parts):
        for name, one, other in zip(("y", *args), found, expected, strict=True):
            error = ((one.double() - other).norm() / other.norm()).item()
            assert error <= limit, f"{name} is off by {error:.1e}"
    with torch.no_grad():
        assert torch.equal(function(backend, **args), whole[0])


@pytest.mark.gpu
@pytest.mark.parametrize("states", [1, 16])
def test_opcheck_on_cuda(states):
    args = large(2, GRID, 8, states, 3, device="cuda", dtype=torch.bfloat16)
    order = torch.stack([torch.randperm(LENGTH) for _ in range(4)]).int().cuda()
    inputs = (*args.values(), order, "cuda")
    torch.library.opcheck(torch.ops.mambavision.projected_scan, inputs)
    detached = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
    y, projected, starts = torch.ops.mambavision.projected_scan(*detached)
    assert starts.numel()
    backward = (torch.randn_like(y), *detached[:7], projected, starts, "cuda")
    torch.library.opcheck(torch.ops.mambavision.projected_scan_backward, backward)
