"""Training steps through StepGraphs; what needs no GPU, and that replayed steps are the eager ones."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from torch import nn

from mambavision.engine.cuda_graphs import CudaGraphHook, StepGraphs, _laid_out_like
from mambavision.engine.optim import AsyncOptimWrapper, BFloat16OptimWrapper


class Denoiser(BaseModel):
    """A convolution and a batch norm, whose statistics a recording must not touch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
        self.graphs = StepGraphs(self)

    def forward(self, inputs, gt, mode="tensor"):
        restored = self.net(inputs).float()
        return {"loss": (restored - gt).square().mean(), "worst": (restored - gt).abs().amax()}

    def train_step(self, data, optim_wrapper):
        log_vars = self.graphs(data, optim_wrapper)
        return super().train_step(data, optim_wrapper) if log_vars is None else log_vars


def batch(seed, side, device):
    generator = torch.Generator().manual_seed(seed)
    inputs, gt = torch.randn(2, 2, 1, side, side, generator=generator).to(device)
    return {"inputs": inputs, "gt": gt}


def train(model, wrapper_type, sides, *, record, device):
    wrapper = wrapper_type(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), clip_grad=dict(max_norm=0.5))
    model.graphs.record_training = record
    return [
        {name: float(value.detach()) for name, value in model.train_step(batch(i, side, device), wrapper).items()}
        for i, side in enumerate(sides)
    ]


def test_on_a_cpu_steps_run_as_they_are():
    torch.manual_seed(0)
    model = Denoiser()
    other = copy.deepcopy(model)
    assert other.graphs.model is other
    losses = train(model, AsyncOptimWrapper, [8] * 5, record=True, device="cpu")
    assert losses == train(other, AsyncOptimWrapper, [8] * 5, record=False, device="cpu")
    assert model.graphs._recorded is None


def test_gradients_are_laid_out_like_their_parameters():
    parameter = torch.zeros(2, 3, 4, 4)
    gradient = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    laid_out = _laid_out_like(gradient, parameter)
    assert laid_out.stride() == parameter.stride() and torch.equal(laid_out, gradient)
    assert _laid_out_like(laid_out, parameter) is laid_out and _laid_out_like(None, parameter) is None


@pytest.mark.parametrize(
    ("wrapper", "records"), [(SimpleNamespace(), True), (SimpleNamespace(loss_scaler=object()), False)]
)
def test_steps_whose_loss_is_scaled_are_not_recorded(wrapper, records):
    model = Denoiser()
    CudaGraphHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    assert model.graphs.record_training is records


@pytest.mark.gpu
@pytest.mark.parametrize("wrapper_type", [AsyncOptimWrapper, BFloat16OptimWrapper])
def test_replayed_steps_are_the_eager_ones(wrapper_type):
    torch.manual_seed(0)
    model = Denoiser().cuda()
    other = copy.deepcopy(model)
    sides = [16] * 6 + [24] * 5 + [16] * 4  # a progressive schedule, and back
    replayed = train(model, wrapper_type, sides, record=True, device="cuda")
    eager = train(other, wrapper_type, sides, record=False, device="cuda")
    assert model.graphs._recorded is not None and other.graphs._recorded is None
    for ours, theirs in zip(replayed, eager, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3 if wrapper_type is BFloat16OptimWrapper else 1e-5)
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_named():
    class Waiting(Denoiser):
        def forward(self, inputs, gt, mode="tensor"):
            return {"loss": super().forward(inputs, gt)["loss"] * float(inputs.amax())}

    model = Waiting().cuda()
    with pytest.raises(RuntimeError, match="Waiting cannot be recorded as a CUDA graph; leave CudaGraphHook out"):
        train(model, AsyncOptimWrapper, [8] * 3, record=True, device="cuda")
    assert torch.rand(4, device="cuda").sum() > 0  # the process goes on: random numbers can be drawn
