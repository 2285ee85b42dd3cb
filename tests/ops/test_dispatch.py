"""Calls that a backend cannot serve, or that must not reach one as they are."""

import pytest
import torch
import torch.utils.checkpoint

from mambavision.ops import dispatch, multi_scan, use_backend
from mambavision.ops.orders import OrderTable


def _small(N=4, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x, delta = torch.randn(1, 6, 8, generator=g), torch.rand(1, 6, 2, 8, generator=g)
    A, B, C = (
        -torch.rand(2, 8, N, generator=g),
        torch.randn(1, 6, 2, N, generator=g),
        torch.randn(1, 6, 2, N, generator=g),
    )
    return [v.to(device) for v in (x, delta, A, B, C)]


@pytest.mark.parametrize("position, name", [(1, "delta"), (2, "A"), (4, "C")])
def test_tensors_on_two_devices_are_refused(position, name):
    tensors = _small()
    tensors[position] = tensors[position].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, x or u on cpu"):
        multi_scan(*tensors, orders="bidirectional", grid=(2, 3))


def test_an_order_table_of_another_integer_type_is_read_right():
    tensors = _small()
    table = OrderTable(torch.stack((torch.arange(6), torch.arange(5, -1, -1))))
    expected = multi_scan(*tensors, orders="bidirectional", grid=(2, 3), backend="reference")
    torch.testing.assert_close(multi_scan(*tensors, orders=table, grid=(2, 3)), expected)


def test_more_states_than_a_backend_holds():
    tensors = _small(N=1500)
    with pytest.raises(RuntimeError, match="up to 1024 states"):
        multi_scan(*tensors, orders="bidirectional", grid=(2, 3), backend="cpu")
    expected = multi_scan(*tensors, orders="bidirectional", grid=(2, 3), backend="reference")
    torch.testing.assert_close(
        multi_scan(*tensors, orders="bidirectional", grid=(2, 3)), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("gradients", [True, False])
def test_meta_tensors_give_shapes(gradients):
    with torch.set_grad_enabled(gradients):
        y = multi_scan(*_small(device="meta"), orders="bidirectional", grid=(2, 3))
    assert y.device.type == "meta" and y.shape == (1, 6, 8)


def _stepped(state=False):
    """Outputs and gradients of all tensors; ``state``: of the last states alone."""
    leaves = [v.requires_grad_() for v in (*_small(), torch.ones(2, 8), torch.ones(2, 8))]
    *inputs, D, bias = leaves
    y, last = multi_scan(
        *inputs, D, delta_bias=bias, orders="bidirectional", grid=(2, 3), return_last_state=True, backend="cpu"
    )
    out = last if state else y
    return y, last, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("state", [False, True], ids=["y", "state"])
def test_the_operator_and_a_plain_call_give_the_same_bits(state, monkeypatch):
    plain = _stepped(state)
    assert "_Scan" in plain[0].grad_fn.name()
    monkeypatch.setattr(dispatch, "_untraced", lambda tensors: False)
    operator = _stepped(state)
    assert "_Scan" not in operator[0].grad_fn.name()
    assert all(torch.equal(a, b) for a, b in zip(plain, operator, strict=True))


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "operator"])
def test_a_gradient_of_a_gradient_is_refused(plain, monkeypatch):
    monkeypatch.setattr(dispatch, "_untraced", lambda tensors: plain)
    x, *rest = _small()
    y = multi_scan(x.requires_grad_(), *rest, orders="bidirectional", grid=(2, 3), backend="cpu")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward()


def test_saved_tensors_may_be_packed():
    x, *rest = _small()

    def scan(x):
        return multi_scan(x, *rest, orders="bidirectional", grid=(2, 3), backend="cpu")

    (want,) = torch.autograd.grad(scan(x.requires_grad_()).square().sum(), x)
    again = torch.utils.checkpoint.checkpoint(scan, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], want)


def test_a_call_that_is_wrong_is_refused_after_one_that_was_right():
    """What a layout's first call has checked is remembered for that layout alone."""
    x, delta, A, B, C = _small()

    def scan(**changed):
        values = {"x": x, "delta": delta, "A": A, "B": B, "C": C} | changed
        return multi_scan(**values, orders="bidirectional", grid=(2, 3))

    want = scan()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"B must be \(1, 6, 2, 4\), got \(1, 6, 2, 3\)"):
            scan(B=B[..., :3])
        with pytest.raises(ValueError, match="C must be float32"):
            scan(C=C.double())
        with pytest.raises(ValueError, match="A must be"):
            scan(A=A[:, :7])
        with pytest.raises(ValueError, match="grid"):
            multi_scan(x, delta, A, B, C, orders="bidirectional", grid=(3, 3))
    assert torch.equal(scan(), want)


def test_use_backend_is_heard_at_every_call():
    tensors = _small()

    def scan():
        return multi_scan(*tensors, orders="bidirectional", grid=(2, 3))

    scan()
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        scan()
    with use_backend("reference"):
        expected = scan()
    assert torch.equal(multi_scan(*tensors, orders="bidirectional", grid=(2, 3), backend="reference"), expected)


def test_torch_func_is_served_by_torch(monkeypatch):
    """On a GPU too: every operator asks what is in effect before it takes a kernel."""
    seen = []

    def note(x):
        for asked in (None, "triton"):
            monkeypatch.setattr(dispatch, "_chosen", [] if asked is None else [asked])
            seen.append(dispatch.in_effect())
        return x.sum()

    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    note(torch.ones(1))
    torch.func.grad(note)(torch.ones(1))
    torch.func.jvp(note, (torch.ones(1),), (torch.ones(1),))
    assert seen == [None, "triton", "chunked", "triton", "chunked", "triton"]
