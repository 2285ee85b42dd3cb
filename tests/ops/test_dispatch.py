"""Calls that a backend cannot serve, or that must not reach one as they are."""

import pytest
import torch

from mambavision.ops import multi_scan
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
