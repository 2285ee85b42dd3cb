"""A problem, those who solve it, and the gate: what does not match the float64 solution is not timed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the norm


def _same(*tensors: Tensor) -> list[Tensor]:
    return list(tensors)


def _whole(y: Tensor) -> Tensor:
    return y


class Problem(NamedTuple):
    """Named inputs, and what to compute from them.

    ``exact`` maps the inputs, in float64, to the part of the result that is compared; ``part`` takes it from a result.
    """

    inputs: dict[str, Tensor]
    exact: Callable[..., Tensor]
    part: Callable[[Tensor], Tensor] = _whole

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.inputs.values())).dtype


class Contender(NamedTuple):
    """``run`` is what is timed; ``prepare`` lays the problem's inputs out for it, ``restore`` its results for us."""

    run: Callable[..., Tensor | tuple[Tensor, ...]]
    prepare: Callable[..., list[Tensor]] = _same
    restore: Callable[..., Tensor] = _whole


class Solution(NamedTuple):
    """The compared part of y, a gradient of it, and that of each input."""

    y: Tensor
    dy: Tensor
    gradients: tuple[Tensor, ...]


def results(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y


def solve(problem: Problem, dtype: torch.dtype = torch.float64) -> Solution:
    """Inputs as they are, rounded to their dtype; everything after that in float64."""
    leaves = [v.detach().to(dtype).requires_grad_() for v in problem.inputs.values()]
    y = problem.exact(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device, problem.dtype)
    return Solution(y.detach(), dy, torch.autograd.grad(y, leaves, dy.to(dtype)))


def errors(contender: Contender, problem: Problem, solution: Solution) -> dict[str, float]:
    """Distance of the result and of every gradient from the solution, each over the solution's norm."""
    leaves = [v.detach().requires_grad_() for v in problem.inputs.values()]
    y = problem.part(contender.restore(*results(contender.run(*contender.prepare(*leaves)))))
    gradients = torch.autograd.grad(y, leaves, solution.dy.to(y.dtype))
    pairs = zip(("y", *problem.inputs), (y, *gradients), (solution.y, *solution.gradients), strict=True)
    return {name: ((got.detach().double() - want).norm() / want.norm()).item() for name, got, want in pairs}


def refusal(contender: Contender, problem: Problem, solution: Solution) -> str | None:
    """Why a contender is not timed on a problem, or None: it cannot run, or its result or a gradient is wrong."""
    try:
        found = errors(contender, problem, solution)
    except Exception as error:  # compilers and extensions built for another torch fail in many ways
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    tolerance = TOLERANCE[problem.dtype]
    wrong = [f"{name} is off by {error:.1e}" for name, error in found.items() if not error <= tolerance]
    return f"{', '.join(wrong)} (allowed {tolerance:.0e})" if wrong else None
