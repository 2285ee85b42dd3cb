import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mambavision.ops import ScanOrder, multi_scan, order_table, scan_order, selective_scan

BACKENDS = ["reference", "chunked", None, "cpu"]
IMAGE_NAMES = [name for name in get_args(ScanOrder) if not name.startswith("time")]
PRESETS = {
    "unidirectional": ["row"],
    "bidirectional": ["row", "row_reverse"],
    "cross": ["row", "col", "row_reverse", "col_reverse"],
}


def make(length, scans, *, batch=2, dim=5, d_state=3, rank=None, dtype=torch.float32, seed=0, initial=True):
    """Leaf tensors of one call, by argument name."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = {
        "x": normal(batch, length, dim),
        "delta": 0.5 * normal(batch, length, scans, rank or dim),
        "A": -(0.2 + 2 * torch.rand(scans, dim, d_state, generator=g, dtype=torch.float64)),
        "B": normal(batch, length, scans, d_state),
        "C": normal(batch, length, scans, d_state),
        "D": normal(scans, dim),
        "delta_bias": 0.3 * normal(scans, dim),
    }
    if rank:
        args["dt_weight"] = normal(scans, dim, rank) / rank**0.5
    if initial:
        args["initial_state"] = normal(batch, scans, dim, d_state)
    fp32 = {"A", "D", "delta_bias", "initial_state"}
    half = dtype in (torch.float16, torch.bfloat16)
    return {k: v.to(torch.float32 if half and k in fp32 else dtype).requires_grad_() for k, v in args.items()}


def gradients(y, state, args):
    g = torch.Generator().manual_seed(7)
    r_y, r_state = torch.randn(y.shape, generator=g), torch.randn(state.shape, generator=g)
    loss = (y.double() * r_y).sum() + (state.double() * r_state).sum()
    return dict(zip(args, torch.autograd.grad(loss, list(args.values())), strict=True))


@pytest.fixture
def check(multi_oracle, rel):
    def compare(args, orders, grid, *, perms=None, tol=5e-6, merge=True, delta_softplus=True, backend=None):
        if perms is None:
            perms = [scan_order(order, grid) if isinstance(order, str) else order for order in orders]
        y, state = multi_scan(
            **args,
            orders=orders,
            grid=grid,
            delta_softplus=delta_softplus,
            return_last_state=True,
            merge=merge,
            backend=backend,
        )
        expected_y, expected_state = multi_oracle(**args, perms=perms, delta_softplus=delta_softplus)
        if merge:
            expected_y = expected_y.sum(2)
        errors = {"y": rel(y, expected_y), "last_state": rel(state, expected_state)}
        actual, expected = gradients(y, state, args), gradients(expected_y, expected_state, args)
        errors |= {f"grad_{name}": rel(actual[name], expected[name]) for name in args}
        bad = {name: error for name, error in errors.items() if not error <= tol}
        assert not bad, bad
        return y, state

    return compare


@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_each_image_order_against_a_permutation(name, check):
    check(make(24, 1), [name], (4, 6))


@pytest.mark.parametrize("name", ["row", "row_reverse", "col", "col_reverse", "time", "time_reverse"])
def test_each_video_order_against_a_permutation(name, check):
    check(make(24, 1), [name], (2, 3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, merge, backend, check):
    names = PRESETS[preset]
    grid = (3, 7)
    perms = [scan_order(name, grid) for name in names]
    y, state = check(make(21, len(names)), preset, grid, perms=perms, merge=merge, backend=backend)
    assert y.shape == ((2, 21, 5) if merge else (2, 21, len(names), 5))
    assert state.shape == (2, len(names), 5, 3)


def test_cross_on_a_video_grid(check):
    grid = (2, 3, 4)
    check(make(24, 4), "cross", grid, perms=[scan_order(name, grid) for name in PRESETS["cross"]])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", [True, False])
def test_names_and_permutations_mixed(merge, backend, check):
    rng = np.random.default_rng(3)
    orders = [
        "serpentine_col_reverse",
        rng.permutation(35),
        torch.from_numpy(rng.permutation(35)),
        rng.permutation(35).astype(np.int32),
        "hilbert",
    ]
    check(make(35, 5), orders, (5, 7), merge=merge, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_delta(backend, check):
    perms = [scan_order(name, (4, 5)) for name in PRESETS["cross"]]
    check(make(20, 4, rank=2), "cross", (4, 5), perms=perms, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_equals_full_rank_delta(backend, rel):
    args = make(20, 2, rank=3)
    low = multi_scan(**args, orders="bidirectional", grid=(4, 5), backend=backend)
    weight, delta = args.pop("dt_weight"), args.pop("delta")
    args["delta"] = torch.einsum("blkr,kdr->blkd", delta, weight)
    assert rel(low, multi_scan(**args, orders="bidirectional", grid=(4, 5), backend=backend)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", ["D", "delta_bias", "initial_state"])
def test_each_option_can_be_absent(absent, backend, check):
    args = make(15, 2)
    del args[absent]
    check(args, ["col", "row_reverse"], (3, 5), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_softplus(backend, check):
    args = make(15, 2)
    args["delta"] = (args["delta"].detach().abs() + 1).requires_grad_()
    check(args, ["col", "zigzag"], (3, 5), delta_softplus=False, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, tol, backend, check):
    names = PRESETS["cross"]
    perms = [scan_order(name, (4, 5)) for name in names]
    y, state = check(make(20, 4, dtype=dtype, rank=2), "cross", (4, 5), perms=perms, tol=tol, backend=backend)
    assert y.dtype == dtype
    assert state.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_fp64(backend, check):
    args = make(20, 2, dtype=torch.float64, rank=2)
    y, _ = check(args, ["window", "col_reverse"], (4, 5), tol=1e-12, backend=backend)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_one_projection_and_of_an_nchw_image(backend, check):
    """The usual call: x from NCHW, delta, B and C split from one linear; gradients reach the projection."""
    args = make(12, 2, rank=4, d_state=3)
    x = torch.randn(2, 5, 3, 4, requires_grad=True)
    projection = torch.randn(2, 12, 2, 4 + 3 + 3, requires_grad=True)
    delta, B, C = projection.split([4, 3, 3], dim=-1)
    args |= {"x": x.flatten(2).transpose(1, 2), "delta": delta, "B": B, "C": C}
    assert not any(args[name].is_contiguous() for name in ("x", "delta", "B", "C"))
    check(args, ["col", "row_reverse"], (3, 4), backend=backend)
    y = multi_scan(**args, orders=["col", "row_reverse"], grid=(3, 4), backend=backend)
    y.transpose(1, 2).unflatten(2, (3, 4)).mean().backward()
    assert x.grad.isfinite().all()
    assert projection.grad.isfinite().all()


def test_shared_views_along_the_scans(check):
    """One B, C and delta for all K scans, by expand: stride 0."""
    args = make(12, 1)
    for name, axis in {"delta": 2, "A": 0, "B": 2, "C": 2, "D": 0, "delta_bias": 0, "initial_state": 1}.items():
        shape = list(args[name].shape)
        shape[axis] = 3
        args[name] = args[name].expand(shape)
    check(args, ["row", "col", "serpentine"], (3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_scan_is_selective_scan(backend, rel):
    args = make(12, 1)
    y, state = multi_scan(**args, orders="unidirectional", grid=(3, 4), return_last_state=True, backend=backend)
    expected, expected_state = selective_scan(
        args["x"].transpose(1, 2),
        args["delta"][:, :, 0].transpose(1, 2),
        args["A"][0],
        args["B"][:, :, 0].transpose(1, 2),
        args["C"][:, :, 0].transpose(1, 2),
        args["D"][0],
        delta_bias=args["delta_bias"][0],
        delta_softplus=True,
        return_last_state=True,
        initial_state=args["initial_state"][:, 0],
        backend=backend,
    )
    assert rel(y.transpose(1, 2), expected) < 1e-6
    assert rel(state[:, 0], expected_state) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_order_is_flip_scan_flip(backend, rel):
    args = make(12, 1)
    y = multi_scan(**args, orders=["row_reverse"], grid=(3, 4), backend=backend)
    flipped = {k: v.flip(1) if k in ("x", "delta", "B", "C") else v for k, v in args.items()}
    assert rel(y, multi_scan(**flipped, orders=["row"], grid=(3, 4), backend=backend).flip(1)) < 1e-6


def test_swapping_two_directions_changes_the_result(rel):
    args = make(12, 2)
    one = multi_scan(**args, orders=["row", "col"], grid=(3, 4))
    other = multi_scan(**args, orders=["col", "row"], grid=(3, 4))
    assert rel(one, other) > 0.1


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (2, 6)], ids=str)
def test_the_same_tokens_on_another_grid_are_another_scan(grid, rel):
    args = make(12, 1)
    y = multi_scan(**args, orders=["col"], grid=grid)
    others = [g for g in [(3, 4), (4, 3), (2, 6)] if g != grid]
    assert all(rel(y, multi_scan(**args, orders=["col"], grid=other)) > 0.1 for other in others)


def test_a_table_made_once_serves_every_call(check):
    names = ["zigzag", "window_reverse"]
    table = order_table(names, (3, 4))
    for seed in (0, 1):
        check(make(12, 2, seed=seed), table, (3, 4), perms=[scan_order(name, (3, 4)) for name in names])
    with pytest.raises(ValueError, match="12.*20|20.*12"):
        multi_scan(**make(20, 2), orders=table, grid=(4, 5))
    with pytest.raises(ValueError, match=r"\b3\b"):
        multi_scan(**make(12, 3), orders=table, grid=(3, 4))
    with pytest.raises(ValueError, match="11.*12|12.*11"):
        order_table([np.arange(11)], (3, 4))


heights = itertools.count(101)


def grid_never_seen(width):
    """A grid whose order tables no other test has asked for."""
    return next(heights), width


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_training_after_inference_mode_on_the_same_grid(backend):
    """A validation pass comes first: what it remembers about the grid must serve training."""
    grid = grid_never_seen(2)
    args = make(grid[0] * grid[1], 4)
    with torch.inference_mode():
        multi_scan(**args, orders="cross", grid=grid, backend=backend)
    y = multi_scan(**args, orders="cross", grid=grid, backend=backend)
    y.sum().backward()
    assert all(value.grad.isfinite().all() for value in args.values())


def test_a_fake_run_does_not_spoil_later_ones(check):
    """FLOP counters, export and compile run on fake tensors first."""
    grid = grid_never_seen(1)
    args = make(grid[0] * grid[1], 2)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = {name: mode.from_tensor(value) for name, value in args.items()}
        y = multi_scan(**fake, orders="bidirectional", grid=grid)
    assert y.shape == args["x"].shape
    perms = [scan_order(name, grid) for name in PRESETS["bidirectional"]]
    check(args, "bidirectional", grid, perms=perms)


def call(args, **changes):
    tensors = {name: value.detach() for name, value in args.items()}
    return multi_scan(**{**tensors, "orders": ["row", "col"], "grid": (3, 4), **changes})


@pytest.mark.parametrize(
    "permutation",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12],
        [-1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        list(range(11)),
        list(range(13)),
    ],
    ids=["twice", "past the end", "negative", "short", "long"],
)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_wrong_permutation_is_refused(kind, permutation):
    with pytest.raises(ValueError, match=r"\d"):
        call(make(12, 2), orders=["row", kind(permutation)])


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray])
def test_permutation_of_floats_or_of_two_dimensions_is_refused(kind):
    with pytest.raises((TypeError, ValueError)):
        call(make(12, 2), orders=["row", kind(np.arange(12) + 0.4)])
    with pytest.raises(ValueError):
        call(make(12, 2), orders=["row", kind(np.arange(12).reshape(3, 4))])


def test_user_permutation_changed_after_a_call_is_read_again(check):
    args = make(12, 1)
    perm = torch.arange(12)
    check(args, [perm], (3, 4))
    perm.copy_(torch.arange(12).flip(0))
    check(args, [perm], (3, 4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grid": (3, 5)}, ("12", "15")),
        ({"grid": (2, 3, 4)}, ("12", "24")),
        ({"orders": "cross"}, ("4", "2")),
        ({"orders": ["row"]}, ("1", "2")),
        ({"orders": []}, ()),
        ({"orders": ["row", "spiral"]}, ("spiral",)),
        ({"orders": "sideways"}, ("sideways",)),
        ({"x": torch.zeros(2, 11, 5)}, ("11", "12")),
        ({"x": torch.zeros(12, 5)}, ("12", "5")),
        ({"delta": torch.zeros(2, 12, 2, 4)}, ("delta", "4", "5")),
        ({"delta": torch.zeros(2, 12, 3, 5)}, ("delta", "3", "2")),
        ({"delta": torch.zeros(2, 12, 2, 3), "dt_weight": torch.zeros(2, 5, 4)}, ("3", "4")),
        ({"delta": torch.zeros(2, 12, 2, 3), "dt_weight": torch.zeros(2, 4, 3)}, ("dt_weight", "4", "5")),
        ({"A": torch.zeros(2, 4, 3)}, ("A", "4", "5")),
        ({"A": torch.zeros(5, 3)}, ("A", "5", "3")),
        ({"B": torch.zeros(2, 12, 2, 4)}, ("B", "4", "3")),
        ({"C": torch.zeros(2, 12, 1, 3)}, ("C", "1", "2")),
        ({"D": torch.zeros(5)}, ("D", "5")),
        ({"delta_bias": torch.zeros(2, 4)}, ("delta_bias", "4", "5")),
        ({"initial_state": torch.zeros(2, 2, 5, 4)}, ("initial_state", "4", "3")),
    ],
)
def test_wrong_argument_is_refused_with_numbers(changes, words):
    with pytest.raises(ValueError) as error:
        call(make(12, 2), **changes)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_gradients(backend):
    args = make(12, 2, batch=0)
    y = multi_scan(**args, orders=["row", "col"], grid=(3, 4), backend=backend)
    grads = torch.autograd.grad(y.sum(), list(args.values()))
    assert all(grad.shape == v.shape and not grad.any() for grad, v in zip(grads, args.values(), strict=True))
