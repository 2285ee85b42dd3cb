"""What of CudaGraphs shows without a GPU; recorded networks are tested in tests/detection/test_detector.py."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mambavision.detection  # noqa: F401  makes mmengine's registries complete
from mambavision.engine import cuda_graphs
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


class Picture:
    """What the bookkeeping reads of a CUDA tensor."""

    is_cuda, requires_grad, dtype, device = True, False, torch.float32, "cuda:0"

    def __init__(self, *shape):
        self.shape = shape


@pytest.fixture
def network(monkeypatch):
    """A network whose recordings are only noted, in ``network.recordings``, and whose calls in ``network.calls``."""
    network = Doubling()
    network.recordings, network.calls = [], []
    network.double = lambda *inputs: network.calls.append(inputs[0].shape)

    def record(owner, method, inputs, pool):
        network.recordings.append(inputs[0].shape)
        return lambda inputs: "replayed"

    monkeypatch.setattr(cuda_graphs, "_InferenceGraph", record)
    monkeypatch.setattr(cuda_graphs, "_TrainingGraphs", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return network


@torch.no_grad()
def test_a_shape_is_recorded_when_it_comes_a_third_time(network):
    network.eval()
    results = [network.graphs(Picture(1)) for _ in range(5)]
    assert results == [None, None, "replayed", "replayed", "replayed"] and network.recordings == [(1,)]
    for shape in (2, 3, 4, 5):
        for _ in range(4):
            network.graphs(Picture(shape))
    assert network.recordings == [(1,), (2,), (3,)]  # limit=3, and none is given up for another
    assert network.graphs(Picture(1)) == "replayed"


@torch.no_grad()
def test_shapes_of_all_inputs_count(network):
    network.eval()
    network.graphs.limit = 1
    results = [network.graphs(Picture(1), Picture(n)) for n in (1, 2, 1, 2, 1, 2)]
    assert results == [None] * 4 + ["replayed", None] and network.recordings == [(1,)]


@torch.no_grad()
@pytest.mark.parametrize("change", ["assign", "double", "submodule mode"])
def test_other_weights_are_not_replayed(network, change):
    network.norm = nn.BatchNorm1d(1)
    network.eval()
    for _ in range(3):
        network.graphs(Picture(1))
    if change == "assign":
        network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    elif change == "double":
        network.double_weights = network.weight.data
        network.weight.data = network.weight.data.double()
    else:
        network.norm.train()
    assert network.graphs(Picture(1)) is None


@torch.no_grad()
def test_a_shape_recorded_after_the_change_does_not_vouch_for_older_ones(network):
    network.eval()
    for _ in range(3):
        network.graphs(Picture(1))
    network.weight.data = network.weight.data.clone()
    assert [network.graphs(Picture(2)) for _ in range(3)] == [None, None, "replayed"]
    assert network.graphs(Picture(1)) is None and network.recordings == [(1,), (2,)]


def test_training_records_its_first_shape_only(network):
    network.graphs.record_training = True
    for shape in (4, 4, 4, 3, 3, 3, 3, 4):
        network.graphs(Picture(shape))
    assert network.recordings == [(4,)] and network.calls == [(4,)] * 2 + [(3,)] * 4
    network.weight.requires_grad_(False)
    assert network.graphs(Picture(4)) is None
