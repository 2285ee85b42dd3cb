"""The model that mmengine trains: its loss, class dropout, and steps by themselves and in CUDA graphs."""

import copy

import pytest
import torch
from mmengine.registry import MODELS

from mambavision.diffusion import register  # noqa: F401
from mambavision.diffusion.batches import NoisyBatches
from mambavision.engine.optim import BFloat16OptimWrapper
from tests.diffusion.drawn import Drawn

NETWORK = dict(type="dim_debug", input_size=(8, 8), in_channels=1, num_classes=3)


@pytest.fixture
def build():
    def make(network=None, **options):
        torch.manual_seed(0)
        options = {"objective": dict(type="RectifiedFlow"), **options}
        model = MODELS.build(dict(type="Diffusion", network={**NETWORK, **(network or {})}, **options))
        for parameter in model.parameters():  # adaLN-zero hides the class
            torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


def batch(iteration=0, **options):
    return NoisyBatches(Drawn(**options), 8, device="cpu").batch(iteration)


def test_loss_is_the_objectives(build):
    model, data = build(class_dropout=0.0), batch()
    t = model.objective.times(data["draws"][:, 0])
    losses = model.objective.loss(model.network, data["inputs"], data["labels"], data["noise"], t)
    torch.testing.assert_close(model(**data, mode="loss"), {"loss": losses.mean()})
    samples = model.eval().val_step(data)
    torch.testing.assert_close(torch.stack([sample["loss"] for sample in samples]), losses)
    assert torch.equal(torch.stack([sample["t"] for sample in samples]), t)


def test_classes_are_left_out_as_often_as_said_and_never_in_validation(build):
    model, data = build(class_dropout=0.5), batch()
    seen = []
    forward = model.network.forward
    model.network.forward = lambda x, t, labels: seen.append(labels) or forward(x, t, labels)
    data["draws"][:, 1] = torch.linspace(0, 0.99, 8)
    model(**data, mode="loss")
    assert torch.equal(seen[0][:4], torch.full((4,), 3)) and torch.equal(seen[0][4:], data["labels"][4:])
    model.val_step(data)
    assert torch.equal(seen[1], data["labels"])


def test_network_without_classes_gets_none(build):
    model, data = build(dict(num_classes=0)), batch()
    model(**data, mode="loss")["loss"].backward()
    assert "labels" in data


@pytest.mark.parametrize("network", [{}, {"type": "dit_debug"}, {"mixer": "mamba", "gradient_checkpointing": True}])
def test_steps_learn_one_batch(build, network):
    model, data = build(network), batch()
    wrapper = BFloat16OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0))
    losses = [float(model.train_step(data, wrapper)["loss"].detach()) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_out_of_range_is_refused(build):
    with pytest.raises(ValueError, match=r"class_dropout=1.5 must be in \[0, 1\]"):
        build(class_dropout=1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "network", [{}, {"mixer": "mamba"}, {"type": "dit_debug"}, {"type": "dit_debug", "gradient_checkpointing": True}]
)
def test_replayed_steps_are_the_eager_ones(build, network, compile):
    model = build(network, compile=compile, objective=dict(type="VPrediction", min_snr_gamma=5.0)).cuda().train()
    other = build(network, objective=dict(type="VPrediction", min_snr_gamma=5.0)).cuda().train()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    loader = NoisyBatches(Drawn(flip=True), 8, device="cuda")
    losses = []
    for each, record in ((model, True), (other, False)):
        wrapper = BFloat16OptimWrapper(torch.optim.AdamW(each.parameters(), lr=1e-3, weight_decay=0.0, fused=True))
        each.graphs.record_training = record
        losses.append([float(each.train_step(loader.batch(i), wrapper)["loss"]) for i in range(8)])
    assert model.graphs._recorded and not other.graphs._recorded
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
