"""Objectives: their losses, their times, and that diffusers' schedulers sample what they define."""

import json

import pytest
import torch
from diffusers import DDPMScheduler

from mambavision.diffusion.objectives import (
    EpsilonPrediction,
    RectifiedFlow,
    VPrediction,
    objective_from,
)

ALL = [
    EpsilonPrediction(),
    EpsilonPrediction("cosine"),
    VPrediction(),
    VPrediction("cosine", min_snr_gamma=5.0),
    RectifiedFlow(),
    RectifiedFlow("logit_normal", mean=0.5, std=0.8),
]
SIGMA, MEAN = 0.5, 0.3  # of pictures that are normal: the best prediction is known


def ids(objective):
    return "-".join(map(str, objective.config().values()))


def ideal(objective):
    """The network of least loss for x_0 ~ N(MEAN, SIGMA^2)."""

    def network(x_t, t, labels=None):
        t = t.view(-1, *[1] * (x_t.ndim - 1)).expand_as(x_t)
        one, zero = torch.ones_like(x_t), torch.zeros_like(x_t)
        keep, add = (objective.noisy(a, b, t[:, 0, 0, 0]) for a, b in ((one, zero), (zero, one)))
        innovation = (x_t - keep * MEAN) / (keep**2 * SIGMA**2 + add**2)
        x_0, noise = MEAN + keep * SIGMA**2 * innovation, add * innovation
        return objective.target(x_0, noise, t[:, 0, 0, 0])

    return network


@pytest.mark.parametrize("objective", ALL, ids=ids)
def test_loss_is_the_weighted_error_of_each_picture(objective):
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = objective.times(torch.rand(5, generator=generator))
    seen = {}

    def network(x_t, time, labels):
        seen.update(x_t=x_t, t=time, labels=labels)
        return torch.zeros_like(x_t, dtype=torch.bfloat16)

    labels = torch.arange(5)
    loss = objective.loss(network, x_0, labels, noise, t)
    assert loss.shape == (5,) and loss.dtype == torch.float32 and seen["labels"] is labels and seen["t"] is t
    expected = objective.weight(t) * objective.target(x_0, noise, t).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(seen["x_t"], objective.noisy(x_0, noise, t))


@pytest.mark.parametrize("objective", ALL, ids=ids)
def test_loss_draws_from_its_generator_and_takes_videos(objective):
    x_0 = torch.randn(3, 2, 4, 5, 5)
    losses = [
        objective.loss(lambda x, t, y: x, x_0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(("schedule", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedule_is_the_schedulers(schedule, theirs):
    objective, t = EpsilonPrediction(schedule), torch.arange(1000.0)
    expected = DDPMScheduler(beta_schedule=theirs).alphas_cumprod
    torch.testing.assert_close(objective._signal(t), expected, rtol=2e-3, atol=1e-6)  # theirs is a product in fp32


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_min_snr_weighs_errors_of_x_0_by_at_most_gamma(kind):
    objective = (EpsilonPrediction if kind == "epsilon" else VPrediction)("cosine", min_snr_gamma=5.0)
    t = torch.tensor([0.0, 100.0, 500.0, 900.0])
    signal = objective._signal(t)
    snr = signal / (1 - signal)
    of_x_0 = objective.weight(t) * (snr if kind == "epsilon" else snr + 1)  # the weight of a squared error of x_0
    torch.testing.assert_close(of_x_0, snr.clamp(max=5))
    assert snr[0] > 5 > snr[2]


def test_times():
    u = torch.linspace(0, 1, 2001)[:-1]
    chain = EpsilonPrediction().times(u)
    assert chain.unique().tolist() == list(range(1000))
    torch.testing.assert_close(RectifiedFlow().times(u), 1000 * u)
    dwelling = RectifiedFlow("logit_normal", mean=0.5, std=0.8).times(u) / 1000
    assert dwelling.isfinite().all() and 0 < dwelling.min() and dwelling.max() < 1
    torch.testing.assert_close(dwelling.median(), torch.tensor(0.5).sigmoid(), atol=2e-3, rtol=0)
    inner = torch.logit(dwelling[1:].double())
    assert inner.std() == pytest.approx(0.8, rel=0.02)


@pytest.mark.parametrize("objective", ALL, ids=ids)
@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dpm-solver++", "euler", "heun"])
def test_schedulers_sample_what_was_trained(objective, kind):
    if kind not in objective.schedulers:
        with pytest.raises(ValueError, match=f"{kind}.*cannot sample a {type(objective).__name__}; those that can"):
            objective.scheduler(kind)
        return
    scheduler, network = objective.scheduler(kind), ideal(objective)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    scheduler.set_timesteps(200)
    for t in scheduler.timesteps:
        prediction = network(x, torch.full((64,), float(t)))
        options = dict(generator=generator) if kind == "ddpm" else {}
        x = scheduler.step(prediction, t, x, **options).prev_sample
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(SIGMA, rel=0.06)


@pytest.mark.parametrize("kind", RectifiedFlow.schedulers)
def test_samplers_step_where_a_flow_was_trained(kind):
    plain, shifted = (RectifiedFlow("logit_normal", mean=mean).scheduler(kind) for mean in (0.0, 1.2))
    for scheduler in (plain, shifted):
        scheduler.set_timesteps(9)
    middle = len(plain.timesteps) // 2
    before, after = (torch.logit(s.timesteps[middle].double() / 1000) for s in (plain, shifted))
    assert float(after - before) == pytest.approx(1.2, abs=0.02)
    uniform = RectifiedFlow("uniform", mean=1.2).scheduler(kind)
    uniform.set_timesteps(9)
    assert torch.equal(uniform.timesteps, plain.timesteps)


@pytest.mark.parametrize("objective", ALL, ids=ids)
def test_config_makes_the_same_objective(objective):
    again = objective_from(json.loads(json.dumps(objective.config())))
    assert type(again) is type(objective) and vars(again) == vars(objective)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "Magic"}, "objective must be one of EpsilonPrediction, VPrediction, RectifiedFlow, got 'Magic'"),
        ({"type": "VPrediction", "schedule": "steep"}, "schedule must be linear or cosine, got 'steep'"),
        ({"type": "VPrediction", "min_snr_gamma": 0}, "min_snr_gamma=0 must be positive"),
        ({"type": "RectifiedFlow", "times": "late"}, "times must be uniform or logit_normal, got 'late'"),
        ({"type": "RectifiedFlow", "std": 0.0}, "std=0.0 must be positive"),
        ({"type": "RectifiedFlow", "colour": 1}, "RectifiedFlow: .*colour"),
    ],
)
def test_wrong_objectives_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        objective_from(config)
