"""What of CudaGraphs shows without a GPU; recorded networks are tested in tests/detection/test_detector.py."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mambavision.detection  # noqa: F401  makes mmengine's registries complete
from mambavision.engine.cuda_graphs import CudaGraphHook, CudaGraphs


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.graphs = CudaGraphs(self, "double", limit=3)

    def double(self, x):
        return [x * self.weight]


def test_on_a_cpu_the_method_runs():
    network = Doubling()
    for _ in range(5):
        (y,) = network.graphs(torch.ones(2))
        y.sum().backward()
    assert network.weight.grad == 10


def test_a_copy_calls_its_own_network():
    network = Doubling()
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.weight.fill_(3)
    assert other.graphs(torch.ones(1))[0] == 3 and network.graphs(torch.ones(1))[0] == 2
    assert other.graphs.limit == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_hook_records_training_without_accumulation_only(accumulate):
    runner = SimpleNamespace(model=Doubling(), optim_wrapper=SimpleNamespace(_accumulative_counts=accumulate))
    hook = CudaGraphHook()
    hook.before_train(runner)
    assert runner.model.graphs.record_training == (accumulate == 1)
    hook.after_train(runner)
    assert not runner.model.graphs.record_training and runner.model.graphs.owner is runner.model


def test_the_hook_leaves_other_models_alone():
    CudaGraphHook().before_train(SimpleNamespace(model=nn.Linear(1, 1), optim_wrapper=None))
    CudaGraphHook().after_train(SimpleNamespace(model=nn.Linear(1, 1)))
