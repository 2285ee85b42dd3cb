"""What a denoiser learns to predict, at which times and with which weights, and the diffusers scheduler that fits.

Every network takes times on the scale 0..1000: steps of the DDPM chain, or 1000 times the noise level of a flow.
Everything random of a training step comes from noise and from numbers uniform in [0, 1), so that a step is a function
of its batch: it can be replayed as a CUDA graph, resumed exactly, and be the same for every network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mambavision.ops.constants import kept_tensors

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Scheduler = Literal["ddpm", "ddim", "dpm-solver++", "euler", "heun"]
Schedule = Literal["linear", "cosine"]
Times = Literal["uniform", "logit_normal"]

NUM_STEPS = 1000


class Objective:
    """A loss of a network by the prediction that it makes of a noisy picture; one of the classes below.

    Attributes:
        schedulers: The schedulers that can sample from a network trained so.
    """

    schedulers: tuple[Scheduler, ...]

    def loss(
        self,
        network: Network,
        x_0: Tensor,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The weighted mean squared error of each picture or video, fp32 (B,).

        Args:
            network: A network of (x_t, t, labels).
            x_0: Clean pictures (B, C, H, W) or videos (B, C, T, H, W), in [-1, 1] or latents of unit variance.
            labels: Classes (B,), or None.
            noise: Standard normal, like x_0; drawn if None.
            t: Times (B,) in 0..1000; drawn if None.
            generator: Draws what is not given.
        """
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
        if t is None:
            t = self.times(torch.rand(len(x_0), generator=generator, device=x_0.device))
        prediction = network(self.noisy(x_0, noise, t), t, labels)
        error = (prediction.float() - self.target(x_0, noise, t)).square().flatten(1).mean(1)
        return self.weight(t) * error

    def times(self, u: Tensor) -> Tensor:
        """Times (B,) of numbers (B,) uniform in [0, 1)."""
        raise NotImplementedError

    def noisy(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t: x_0 with the noise of time t."""
        raise NotImplementedError

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network predicts of x_t."""
        raise NotImplementedError

    def weight(self, t: Tensor) -> Tensor:
        """Factor (B,) of the squared errors."""
        return torch.ones_like(t)

    def scheduler(self, kind: Scheduler, *, clip_sample: bool = False) -> SchedulerMixin:
        """The diffusers scheduler that samples from a network trained so.

        Args:
            kind: Which; see ``schedulers``. "euler" and "heun" take diffusers' own times: of n steps the last goes from
                s = 0.001, shifted twice, to 0, so that n - 1 do the work.
            clip_sample: Clip the prediction of x_0 to [-1, 1] in every step: for pixels, not for latents. DDPM and DDIM
                only, the others do not clip.

        Raises:
            ValueError: If it does not fit this objective.
        """
        if kind not in self.schedulers:
            fits = ", ".join(self.schedulers)
            raise ValueError(f"scheduler {kind!r} cannot sample a {type(self).__name__}; those that can: {fits}")
        return self._scheduler(kind, clip_sample)

    def _scheduler(self, kind: Scheduler, clip_sample: bool) -> SchedulerMixin:
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The class and its arguments as json values; :func:`objective_from` makes the same objective of them."""
        return {"type": type(self).__name__, **vars(self)}


class _Chain(Objective):
    """Denoising in 1000 steps: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise with t in 0..999, all as likely."""

    schedulers = ("ddpm", "ddim", "dpm-solver++")
    _prediction_type: Literal["epsilon", "v_prediction"]

    def __init__(self, schedule: Schedule = "linear", min_snr_gamma: float | None = None) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be {' or '.join(get_args(Schedule))}, got {schedule!r}")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma={min_snr_gamma} must be positive, or None")
        self.schedule, self.min_snr_gamma = schedule, min_snr_gamma

    def times(self, u: Tensor) -> Tensor:
        return (u * NUM_STEPS).floor().clamp(max=NUM_STEPS - 1)

    def noisy(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal = _like(self._signal(t), x_0)
        return signal.sqrt() * x_0 + (1 - signal).sqrt() * noise

    def _signal(self, t: Tensor) -> Tensor:
        """a_t, fp32 (B,)."""
        return _signals(self.schedule, t.device)[t.long()]

    def _scheduler(self, kind: Scheduler, clip_sample: bool) -> SchedulerMixin:
        from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

        shared = dict(
            num_train_timesteps=NUM_STEPS,
            beta_schedule="linear" if self.schedule == "linear" else "squaredcos_cap_v2",
            prediction_type=self._prediction_type,
            timestep_spacing="trailing",  # begins at the noisiest step
        )
        if kind == "dpm-solver++":  # the cosine schedule's last steps hold no signal to solve for
            clipped = -5.1 if self.schedule == "cosine" else -float("inf")
            return DPMSolverMultistepScheduler(**shared, lambda_min_clipped=clipped)
        return {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind](**shared, clip_sample=clip_sample)


class EpsilonPrediction(_Chain):
    """Prediction of the noise, in the 1000 steps of a chain: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    Ho et al., "Denoising diffusion probabilistic models", 2020 (linear schedule); Nichol and Dhariwal, "Improved
    denoising diffusion probabilistic models", 2021 (cosine).

    Args:
        schedule: Of a_t.
        min_snr_gamma: Cut the weight of steps with little noise: min(snr, gamma) / snr with snr = a_t / (1 - a_t) (Hang
            et al., "Efficient diffusion training via min-SNR weighting strategy", 2023, who take 5). None weighs all
            steps alike.

    Raises:
        ValueError: If the schedule is unknown, or ``min_snr_gamma`` not positive.
    """

    _prediction_type = "epsilon"

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def weight(self, t: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(t)
        signal = self._signal(t)
        snr = signal / (1 - signal)
        return snr.clamp(max=self.min_snr_gamma) / snr


class VPrediction(_Chain):
    """Prediction of v = sqrt(a_t) noise - sqrt(1 - a_t) x_0, in the steps of :class:`EpsilonPrediction`.

    Salimans and Ho, "Progressive distillation for fast sampling of diffusion models", 2022.

    Args:
        schedule: Of a_t.
        min_snr_gamma: As there; the weight is min(snr, gamma) / (snr + 1).

    Raises:
        ValueError: If the schedule is unknown, or ``min_snr_gamma`` not positive.
    """

    _prediction_type = "v_prediction"

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal = _like(self._signal(t), x_0)
        return signal.sqrt() * noise - (1 - signal).sqrt() * x_0

    def weight(self, t: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(t)
        signal = self._signal(t)
        snr = signal / (1 - signal)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1)


class RectifiedFlow(Objective):
    """Prediction of the velocity noise - x_0 on the straight line x_t = (1 - s) x_0 + s noise, with t = 1000 s.

    Liu et al., "Flow straight and fast", 2023; Ma et al., "SiT", 2024; logit-normal times: Esser et al., "Scaling
    rectified flow transformers for high-resolution image synthesis", 2024, section 3.1.

    Samples take their steps where the training was: a mean other than 0 shifts the scheduler's s, by the same factor
    exp(mean) of s / (1 - s) (there, section 5.3.2).

    Args:
        times: Uniform s, or s = sigmoid(mean + std * normal), which dwells where it is neither picture nor noise. Long
            clips show what is in them through more noise than pictures: they want a mean above 0.
        mean, std: Of logit-normal times.

    Raises:
        ValueError: If ``times`` is unknown, or ``std`` not positive.
    """

    schedulers = ("euler", "heun", "dpm-solver++")

    def __init__(self, times: Times = "uniform", mean: float = 0.0, std: float = 1.0) -> None:
        if times not in get_args(Times):
            raise ValueError(f"times must be {' or '.join(get_args(Times))}, got {times!r}")
        if not 0 < std < math.inf or not math.isfinite(mean):
            raise ValueError(f"std={std} must be positive, and mean={mean} finite")
        self.distribution, self.mean, self.std = times, mean, std

    def times(self, u: Tensor) -> Tensor:
        if self.distribution == "logit_normal":
            u = torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        return u * NUM_STEPS

    def noisy(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(x_0, noise, _like(t / NUM_STEPS, x_0))

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x_0

    def _scheduler(self, kind: Scheduler, clip_sample: bool) -> SchedulerMixin:
        from diffusers import (
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            FlowMatchHeunDiscreteScheduler,
        )

        shift = math.exp(self.mean) if self.distribution == "logit_normal" else 1.0
        if kind == "dpm-solver++":
            return DPMSolverMultistepScheduler(
                num_train_timesteps=NUM_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
            )
        flow = FlowMatchEulerDiscreteScheduler if kind == "euler" else FlowMatchHeunDiscreteScheduler
        return flow(num_train_timesteps=NUM_STEPS, shift=shift)

    def config(self) -> dict[str, Any]:
        return {"type": "RectifiedFlow", "times": self.distribution, "mean": self.mean, "std": self.std}


OBJECTIVES = (EpsilonPrediction, VPrediction, RectifiedFlow)


def objective_from(config: Mapping[str, Any]) -> Objective:
    """The objective of a :meth:`Objective.config`.

    Raises:
        ValueError: If there is none such, or an argument is wrong.
    """
    arguments = dict(config)
    kind = arguments.pop("type", None)
    by_name = {objective.__name__: objective for objective in OBJECTIVES}
    if kind not in by_name:
        raise ValueError(f"objective must be one of {', '.join(by_name)}, got {kind!r}")
    try:
        return by_name[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error


@cache
@kept_tensors()
def _signals(schedule: Schedule, device: torch.device) -> Tensor:
    """a_t of t = 0..999, fp32: the product of 1 - b of the steps up to t."""
    if schedule == "linear":
        betas = np.linspace(1e-4, 0.02, NUM_STEPS)
    else:
        signal = np.cos((np.linspace(0, 1, NUM_STEPS + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    return torch.from_numpy(np.cumprod(1 - betas)).float().to(device)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) with the axes of x."""
    return values.view(-1, *[1] * (x.ndim - 1))
