from functools import cache

import pytest
import torch

from mambavision.ops import order_table
from mambavision.ops.constants import kept_tensors


def within_inference(function):
    with torch.inference_mode():
        function()


def within_grad(function):
    torch.func.grad(lambda x: (function(), x.sum())[1])(torch.ones(2))


def within_vmapped_grad(function):
    torch.func.vmap(torch.func.grad(lambda x: (function(), x.sum())[1]))(torch.ones(2, 3))


def within_forward_mode(function):
    torch.func.jvp(lambda x: (function(), 2 * x)[1], (torch.ones(2),), (torch.ones(2),))


MODES = [within_inference, within_grad, within_vmapped_grad, within_forward_mode]


@pytest.mark.parametrize("mode", MODES)
def test_outlive_the_mode_they_were_made_in(mode):
    @cache
    @kept_tensors()
    def table():
        return torch.stack([torch.arange(3), torch.arange(3)]).float()

    mode(table)
    weight = torch.ones(2, 3, requires_grad=True)
    (weight * table()).sum().backward()
    assert torch.equal(weight.grad, table())
    assert table().untyped_storage().nbytes() == 24  # a transform's has none, which compiled graphs ask for


@pytest.mark.parametrize("number, mode", enumerate(MODES))
def test_order_table_first_asked_for_in_a_mode(number, mode):
    grid = (3, 100 + number)  # of no other test
    mode(lambda: order_table("cross", grid))
    assert order_table("cross", grid).index.untyped_storage().nbytes() == 4 * 4 * 3 * grid[1]
