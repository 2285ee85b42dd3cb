"""Optimiser wrappers and averaged weights; that FusedExpMomentumEMA is mmdet's: tests/detection/test_optim.py."""

import math

import pytest
import torch
from torch import nn

from mambavision.engine.optim import AsyncOptimWrapper, BFloat16OptimWrapper, FusedExpMomentumEMA


def test_bfloat16_wrapper_autocasts_on_the_cpu():
    model = nn.Linear(4, 4)
    wrapper = BFloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_the_norm_of_clipped_gradients_is_kept_as_a_tensor():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapper = AsyncOptimWrapper(optimizer=sgd, clip_grad=dict(max_norm=1.0))
    wrapper.update_params(model(torch.tensor([[3.0, 4.0]])).sum())
    assert isinstance(wrapper.grad_norm, torch.Tensor) and wrapper.grad_norm == 5
    torch.testing.assert_close(model.weight.data, torch.tensor([[-0.6, -0.8]]))


def test_average_follows_the_published_formula():
    # decay d(t) = 0.9999 (1 - exp(-t / 2000)) at update t, from the second update on
    model = nn.Linear(1, 1, bias=False)
    average = FusedExpMomentumEMA(model, momentum=1e-4, gamma=2000)
    value = None
    for update in range(1, 6):
        model.weight.data.fill_(float(update))
        average.update_parameters(model)
        decay = 0.9999 * (1 - math.exp(-update / 2000))
        value = float(update) if value is None else decay * value + (1 - decay) * update
    assert average.module.weight.item() == pytest.approx(value, rel=1e-6)


def test_an_average_takes_in_every_so_manieth_update():
    model = nn.Linear(1, 1, bias=False)
    average, seen = FusedExpMomentumEMA(model, momentum=0.5, gamma=1, interval=3), []
    for update in range(1, 8):
        model.weight.data.fill_(float(update))
        average.update_parameters(model)
        seen.append(average.module.weight.item())
    assert seen[:3] == [1.0] * 3 and len(set(seen[3:6])) == 1 and len(set(seen)) == 3
