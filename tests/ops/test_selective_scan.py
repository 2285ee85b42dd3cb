from pathlib import Path

import numpy as np
import pytest
import torch

from mambavision.ops import selective_scan

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
BACKENDS = ["reference", "chunked", None]


def make(batch=2, dim=6, length=19, d_state=4, groups=None, *, dtype=torch.float64, seed=0, options=True):
    """Leaf tensors of one call, by argument name."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    bc = (batch, d_state, length) if groups is None else (batch, groups, d_state, length)
    args = {
        "u": normal(batch, dim, length),
        "delta": 0.5 * normal(batch, dim, length) if options else normal(batch, dim, length).abs() * 0.5,
        "A": -(0.2 + torch.rand(dim, d_state, generator=g, dtype=torch.float64) * 2),
        "B": normal(*bc),
        "C": normal(*bc),
    }
    if options:
        args |= {
            "D": normal(dim),
            "z": normal(batch, dim, length),
            "delta_bias": 0.3 * normal(dim),
            "initial_state": normal(batch, dim, d_state),
        }
    fp32 = {"A", "D", "delta_bias", "initial_state"}
    half = dtype in (torch.float16, torch.bfloat16)
    return {k: v.to(torch.float32 if half and k in fp32 else dtype).requires_grad_() for k, v in args.items()}


def cotangents(y, state, seed=7):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=g).double(), torch.randn(state.shape, generator=g).double()


def gradients(y, state, args):
    r_y, r_state = cotangents(y, state)
    loss = (y.double() * r_y).sum() + (state.double() * r_state).sum()
    return dict(zip(args, torch.autograd.grad(loss, list(args.values())), strict=True))


def compare(args, scan_oracle, rel, tol, *, delta_softplus=True, backend=None):
    y, state = selective_scan(**args, delta_softplus=delta_softplus, return_last_state=True, backend=backend)
    expected_y, expected_state = scan_oracle(**args, delta_softplus=delta_softplus)
    errors = {"y": rel(y, expected_y), "last_state": rel(state, expected_state)}
    actual, expected = gradients(y, state, args), gradients(expected_y, expected_state, args)
    errors |= {f"grad_{name}": rel(actual[name], expected[name]) for name in args}
    bad = {name: error for name, error in errors.items() if not error <= tol}
    assert not bad, bad
    return y, state


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.parametrize("fixture", ["ssm_scan_full", "ssm_scan_plain"])
def test_parity_with_mamba_ssm(fixture, backend, rel):
    if not PARITY.is_dir():
        pytest.skip(f"no parity fixtures at {PARITY}")
    with np.load(PARITY / f"{fixture}.npz") as arrays:
        saved = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    args = {name.removeprefix("in_"): v.requires_grad_() for name, v in saved.items() if name.startswith("in_")}
    softplus = fixture == "ssm_scan_full"
    positional = [args.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    y, state = selective_scan(*positional, softplus, True, backend=backend)
    assert y.dtype == state.dtype == torch.float32
    assert rel(y, saved["out"]) < 2e-6
    assert rel(state, saved["last_state"]) < 2e-6
    assert torch.equal(y, selective_scan(*positional, softplus, backend=backend))

    leaves = list(args.values())
    loss = (y * saved["r_out"]).sum()
    for prefix, value in (("grad", loss), ("grad2", loss + (state * saved["r_last"]).sum())):
        grads = torch.autograd.grad(value, leaves, retain_graph=True)
        errors = {name: rel(g, saved[f"{prefix}_{name}"]) for name, g in zip(args, grads, strict=True)}
        assert max(errors.values()) < 1e-5, (prefix, errors)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("groups", [None, 1, 2, 6])
def test_groups_and_every_gradient_in_fp64(groups, softplus, backend, scan_oracle, rel):
    args = make(groups=groups)
    if not softplus:
        args["delta"] = args["delta"].detach().abs().requires_grad_()
    compare(args, scan_oracle, rel, 1e-12, delta_softplus=softplus, backend=backend)


@pytest.mark.parametrize("backend", [None, "cpu"])
@pytest.mark.parametrize("groups", [None, 1, 2, 6])
def test_groups_and_every_gradient_in_fp32(groups, backend, scan_oracle, rel):
    compare(make(groups=groups, dtype=torch.float32), scan_oracle, rel, 5e-6, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state", "everything"])
def test_each_option_can_be_absent(absent, backend, scan_oracle, rel):
    args = make(options=absent != "everything", dtype=torch.float32)
    args.pop(absent, None)
    compare(args, scan_oracle, rel, 5e-6, delta_softplus=absent != "everything", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constant", [("B",), ("C",), ("B", "C")], ids="".join)
def test_constant_b_and_c(constant, backend, scan_oracle, rel):
    args = make(dtype=torch.float32)
    for name in constant:
        args[name] = args[name][0].detach()[:, :6].T.contiguous().requires_grad_()
    compare(args, scan_oracle, rel, 5e-6, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.parametrize("dim", [1, 3, 7, 17, 33])
def test_odd_widths(dim, backend, scan_oracle, rel):
    compare(make(dim=dim, length=11, d_state=3, dtype=torch.float32), scan_oracle, rel, 5e-6, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
def test_two_halves_joined_by_the_state_equal_the_whole(backend, rel):
    args = make(length=20, dtype=torch.float32)
    whole, state = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)

    def part(where, initial):
        pieces = {k: v[..., where] if k in ("u", "delta", "B", "C", "z") else v for k, v in args.items()}
        pieces["initial_state"] = initial
        return selective_scan(**pieces, delta_softplus=True, return_last_state=True, backend=backend)

    first, middle = part(slice(0, 7), args["initial_state"])
    second, last = part(slice(7, 20), middle)
    assert rel(torch.cat([first, second], dim=-1), whole) < 1e-6
    assert rel(last, state) < 1e-6
    whole_grads = gradients(whole, state, args)
    joined_grads = gradients(torch.cat([first, second], dim=-1), last, args)
    errors = {name: rel(joined_grads[name], whole_grads[name]) for name in args}
    assert max(errors.values()) < 5e-6, errors


def strided_views(args):
    """Same values, other memory: channels-last transposes, slices of a wider projection, a stride-0 batch."""
    views = {}
    for name, value in args.items():
        value = value.detach()
        if name in ("u", "delta"):
            leaf = value.transpose(1, 2).contiguous().requires_grad_()
            view = leaf.transpose(1, 2)
        elif name in ("B", "C", "z"):
            leaf = torch.full((*value.shape[:-1], 2 * value.shape[-1] + 3), float("nan"), dtype=value.dtype)
            leaf[..., 2 : 2 + 2 * value.shape[-1] : 2] = value
            leaf.requires_grad_()
            view = leaf[..., 2 : 2 + 2 * value.shape[-1] : 2]
        elif name == "A":
            leaf = value.T.contiguous().requires_grad_()
            view = leaf.T
        elif name == "initial_state":
            leaf = value[:1].clone().requires_grad_()
            view = leaf.expand_as(value)
        else:
            leaf = torch.stack([value, value + 100], dim=1).requires_grad_()
            view = leaf[:, 0]
        assert not view.is_contiguous(), name
        views[name] = view
    return views


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
def test_non_contiguous_inputs_and_cotangents(backend, groups, scan_oracle, rel):
    views = strided_views(make(groups=groups, dtype=torch.float32))
    compare(views, scan_oracle, rel, 5e-6, backend=backend)
    actual = torch.autograd.grad(selective_scan(**views, backend=backend).sum(), list(views.values()))
    expected = torch.autograd.grad(scan_oracle(**views)[0].sum(), list(views.values()))
    errors = {name: rel(a, e) for name, a, e in zip(views, actual, expected, strict=True)}
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
def test_only_one_output_or_one_input_needs_a_gradient(backend, scan_oracle, rel):
    args = make(dtype=torch.float32)
    r_state = cotangents(args["u"], args["initial_state"])[1]
    for name in args:
        alone = {k: v.detach().requires_grad_(k == name) for k, v in args.items()}
        y, state = selective_scan(**alone, delta_softplus=True, return_last_state=True, backend=backend)
        expected_y, expected_state = scan_oracle(**alone, delta_softplus=True)
        (grad,) = torch.autograd.grad(y.square().sum(), alone[name], retain_graph=True)
        (expected,) = torch.autograd.grad(expected_y.square().sum(), alone[name], retain_graph=True)
        assert rel(grad, expected) < 1e-5, name
        if name in ("u", "delta", "A", "B", "delta_bias", "initial_state"):
            (grad,) = torch.autograd.grad((state * r_state).sum(), alone[name])
            (expected,) = torch.autograd.grad((expected_state * r_state).sum(), alone[name])
            assert rel(grad, expected) < 1e-5, name
    with torch.inference_mode():
        plain = {k: v.detach() for k, v in args.items()}
        assert rel(selective_scan(**plain, delta_softplus=True, backend=backend), y) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    args = make(dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in args.items()}
    y, state = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)
    gradients(y, state, args)
    assert all(torch.equal(args[name], before[name]) for name in args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype, tol, backend, scan_oracle, rel):
    args = make(dtype=dtype)
    y, state = compare(args, scan_oracle, rel, tol, backend=backend)
    assert y.dtype == dtype
    assert state.dtype == torch.float32


def test_fp64_stays_fp64():
    y, state = selective_scan(**make(), delta_softplus=True, return_last_state=True)
    assert y.dtype == torch.float64
    assert state.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_inputs_beside_fp32_delta(backend, scan_oracle, rel):
    """What autocast leaves behind: u, B, C from a half-precision linear, delta kept in fp32."""
    args = make(dtype=torch.bfloat16)
    args["delta"] = make(dtype=torch.float32)["delta"]
    y, _ = compare(args, scan_oracle, rel, 1e-2, backend=backend)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_nan_comes_through(name, backend):
    """A GradScaler and a NaN hook see what happened: a bad number is never turned into a plausible one."""
    args = {k: v.detach() for k, v in make(dtype=torch.float32).items()}
    args[name].view(-1)[0] = torch.nan
    y = selective_scan(**args, delta_softplus=True, backend=backend)
    assert y[0, 0].isnan().any()
    assert y[1, 1:].isfinite().all() or name in ("A", "D", "delta_bias")


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_overflowed_gradient_comes_through(value, backend):
    args = make(dtype=torch.float32)
    y = selective_scan(**args, delta_softplus=True, backend=backend)
    cotangent = torch.ones_like(y)
    cotangent[0, 0, -1] = value
    grads = dict(zip(args, torch.autograd.grad(y, list(args.values()), cotangent), strict=True))
    assert not any(grads[name].isfinite().all() for name in args)


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
def test_double_backward_is_right_or_refused(backend, scan_oracle, rel):
    args = make(dtype=torch.float32, length=5)

    def penalty(y):
        (grad,) = torch.autograd.grad(y.square().sum(), args["u"], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), args["A"])[0]

    expected = penalty(scan_oracle(**args, delta_softplus=True)[0])
    y = selective_scan(**args, delta_softplus=True, backend=backend)
    try:
        actual = penalty(y)
    except RuntimeError:
        assert backend in (None, "cpu"), "the torch paths differentiate twice"
        return
    assert rel(actual, expected) < 1e-5


def test_state_is_not_kept_in_half():
    """Adding 1e-3 two thousand times to a state: bf16 would stop growing at 0.25, fp16 lose half."""
    length = 2000
    u = torch.full((1, 1, length), 1.0, dtype=torch.bfloat16)
    one = torch.ones(1, 1, length, dtype=torch.bfloat16)
    delta = torch.full_like(u, 2**-10)
    y = selective_scan(u, delta, torch.full((1, 1), -1e-6), one, one)
    assert abs(y[0, 0, -1].item() - length * 2**-10) < 0.02


@pytest.mark.parametrize(
    ("name", "shape", "numbers"),
    [
        ("u", (6, 19), ("6", "19")),
        ("delta", (2, 6, 18), ("18", "19")),
        ("delta", (2, 5, 19), ("5", "6")),
        ("A", (5, 4), ("5", "6")),
        ("A", (6, 4, 1), ("6", "4")),
        ("B", (2, 4, 18), ("18", "19")),
        ("B", (2, 5, 19), ("5", "4")),
        ("B", (3, 4, 19), ("3", "2")),
        ("B", (2, 4, 4, 19), ("4", "6")),
        ("C", (2, 3, 19), ("3", "4")),
        ("C", (2, 4, 20), ("20", "19")),
        ("D", (5,), ("5", "6")),
        ("D", (6, 1), ("6",)),
        ("z", (2, 6, 1), ("1", "19")),
        ("delta_bias", (7,), ("7", "6")),
        ("initial_state", (2, 6, 5), ("5", "4")),
        ("initial_state", (1, 6, 4), ("1", "2")),
    ],
)
def test_wrong_shape_is_refused_with_numbers(name, shape, numbers):
    args = {k: v.detach() for k, v in make(dtype=torch.float32).items()} | {name: torch.zeros(shape)}
    with pytest.raises(ValueError) as error:
        selective_scan(**args, delta_softplus=True)
    message = str(error.value)
    assert name in message, message
    assert all(number in message for number in numbers), message
    assert "\n" not in message


@pytest.mark.parametrize(("name", "dtype"), [("u", torch.int64), ("delta", torch.int32), ("A", torch.complex64)])
def test_integers_and_complex_are_refused(name, dtype):
    args = {k: v.detach() for k, v in make(dtype=torch.float32).items()}
    with pytest.raises((TypeError, ValueError)) as error:
        selective_scan(**(args | {name: args[name].to(dtype)}))
    assert name in str(error.value).replace(",", " ").split()
    assert "complex" in str(error.value) or str(dtype).removeprefix("torch.") in str(error.value)


def test_options_after_return_last_state_are_keyword_only():
    args = [v.detach() for v in make(dtype=torch.float32, options=False).values()]
    with pytest.raises(TypeError):
        selective_scan(*args, None, None, None, False, False, None)


def test_forward_mode_of_a_kernel_is_refused():
    u, delta, A, B = torch.randn(1, 2, 5), torch.rand(1, 2, 5), -torch.rand(2, 4), torch.randn(1, 4, 5)
    with pytest.raises(RuntimeError, match="scan backend 'cpu' has no forward mode: backend='chunked' has"):
        torch.func.jvp(lambda u: selective_scan(u, delta, A, B, B, backend="cpu"), (u,), (u,))
