import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

import mambavision.restoration.register  # noqa: F401
from mambavision.engine.optim import BFloat16OptimWrapper


@pytest.fixture
def build():
    """Builds a restorer of the debug network, whose head is not nearly zero as at the start of a training."""

    def built(loss="CharbonnierLoss", **network):
        torch.manual_seed(0)
        config = dict(type="Restorer", network=dict(type="serpent_debug", **network), loss=dict(type=loss))
        with DefaultScope.overwrite_default_scope("mmengine"):
            restorer = MODELS.build(config)
        torch.nn.init.normal_(restorer.network.head.weight, std=0.05)
        return restorer

    return built


def batch(channels=3, scale=1, side=12, count=4):
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.rand(count, channels, side, side, generator=generator),
        "gt": torch.rand(count, channels, side * scale, side * scale, generator=generator),
        "sigma": torch.rand(count, generator=generator),
    }


def test_loss_is_of_the_restored_batch(build):
    restorer, data = build(scale=2), batch(scale=2)
    restored = restorer.network(data["inputs"])
    assert torch.equal(restorer(data["inputs"], sigma=data["sigma"]), restored)  # no noise input, sigma is left out
    expected = ((restored - data["gt"]).square() + 1e-6).sqrt().mean()
    torch.testing.assert_close(restorer(**data, mode="loss"), {"loss": expected})


def test_noise_level_is_known_of_every_other_picture_in_training(build):
    restorer, data = build("L1Loss", sigma_input=True), batch()
    known, blind = restorer.network(data["inputs"], data["sigma"]), restorer.network(data["inputs"])
    assert not torch.allclose(known[1], blind[1])
    mixed = torch.stack([known[0], blind[1], known[2], blind[3]])
    torch.testing.assert_close(restorer(**data, mode="loss")["loss"], (mixed - data["gt"]).abs().mean())
    predicted = restorer.test_step({**data, "path": ["a"] * 4, "set": ["b"] * 4})
    torch.testing.assert_close(torch.stack(predicted), known)


def test_steps_learn_one_batch(build):
    restorer, data = build(), batch(side=8)
    wrapper = BFloat16OptimWrapper(torch.optim.AdamW(restorer.parameters(), lr=0.01, weight_decay=0.0))
    losses = [float(restorer.train_step(data, wrapper)["loss"].detach()) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("network", [{}, {"sigma_input": True}])
def test_replayed_steps_are_the_eager_ones(build, network):
    restorer = build(**network).cuda().train()
    other = copy.deepcopy(restorer)
    losses = []
    for model, record in ((restorer, True), (other, False)):
        wrapper = BFloat16OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True))
        model.graphs.record_training = record
        batches = [{k: v.cuda() for k, v in batch(side=side).items()} for side in [16] * 6 + [24] * 5]
        losses.append([float(model.train_step(data, wrapper)["loss"]) for data in batches])
    assert restorer.graphs._recorded and not other.graphs._recorded
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
