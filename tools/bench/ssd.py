"""Bidirectional state-space duality, and the attention that it stands in for."""

import math
from functools import partial
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import Contender, Problem
from mambavision.ops import SSDBackend, ssd

HEADS, HEADDIM = 16, 72  # DiT-XL's attention


def _two_calls(x, dt, A, B, C, D, x_back, dt_back, B_back, C_back) -> tuple[Tensor, Tensor]:
    """mamba_ssm once forth, once back; D counts once."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    forth = mamba_chunk_scan_combined(x, dt, A, B, C, 256, D=D, dt_softplus=True)
    return forth, mamba_chunk_scan_combined(x_back, dt_back, A, B_back, C_back, 256, dt_softplus=True)


def _with_flips(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> list[Tensor]:
    return [x, dt, A, B, C, D, *(v.flip(1) for v in (x, dt, B, C))]


def _sum_of_both(forth: Tensor, back: Tensor) -> Tensor:
    return forth + back.flip(1)


def mamba_ssm() -> dict[str, Contender]:
    """The two calls alone, and with the copies and the sum that a mixer needs around them."""

    def whole(*inputs: Tensor) -> Tensor:
        return _sum_of_both(*_two_calls(*_with_flips(*inputs)))

    return {"mamba_ssm": Contender(_two_calls, _with_flips, _sum_of_both), "mamba_ssm with flips": Contender(whole)}


def _attention(batch: int, length: int, device: str, dtype: torch.dtype) -> tuple[Problem, dict[str, Contender]]:
    g = torch.Generator(device).manual_seed(0)
    shape = (batch, HEADS, length, HEADDIM)
    inputs = {name: torch.randn(shape, generator=g, device=device).to(dtype) for name in ("q", "k", "v")}

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q[-1:, -1:], k[-1:, -1:], v[-1:, -1:]  # one head: its L x L weights fit
        return (q @ k.mT / math.sqrt(HEADDIM)).softmax(-1) @ v

    return Problem(inputs, exact, lambda y: y[-1:, -1:]), {"SDPA": Contender(F.scaled_dot_product_attention)}


class BidirectionalSSD(NamedTuple):
    """ssd with both directions, softplus and D: batch, tokens, heads, headdim, states, groups."""

    B: int
    L: int
    H: int = 36
    P: int = 64
    N: int = 64
    G: int = 1

    op = "ssd"

    def __str__(self) -> str:
        return f"{self.B} x {self.L}"

    def small(self) -> "BidirectionalSSD":
        """A small, odd one of the same kind."""
        return self._replace(B=2, L=203)

    def problems(self, device: str, dtype: torch.dtype, *, sliced: bool) -> list[tuple[Problem, dict[str, Contender]]]:
        """The operator and its contenders, and attention; ``sliced``: the gate compares the last sequence only."""
        B, L, H, P, N, G = self
        g = torch.Generator(device).manual_seed(0)
        shapes = {"x": (B, L, H, P), "dt": (B, L, H), "B": (B, L, G, N), "C": (B, L, G, N)}
        typed = {name: torch.randn(shape, generator=g, device=device) for name, shape in shapes.items()}
        typed["dt"] = 0.5 * typed["dt"] - 3  # steps about 0.05, as trained ones
        typed = {name: v.to(dtype) for name, v in typed.items()}
        A = -1 - 15 * torch.rand(H, generator=g, device=device)
        inputs = {"x": typed["x"], "dt": typed["dt"], "A": A, "B": typed["B"], "C": typed["C"]}
        inputs["D"] = torch.randn(H, generator=g, device=device)

        def ours(x, dt, A, B, C, D, backend: SSDBackend | None) -> Tensor:
            return ssd(x, dt, A, B, C, D, dt_softplus=True, bidirectional=True, backend=backend)

        problem = Problem(inputs, partial(ours, backend="reference"))
        if sliced:

            def exact(x, dt, A, B, C, D) -> Tensor:
                return ours(x[-1:], dt[-1:], A, B[-1:], C[-1:], D, "chunked")

            problem = Problem(inputs, exact, lambda y: y[-1:])
        names = [name for name in get_args(SSDBackend) if device == "cpu" or name != "reference"]
        contenders = {name: Contender(partial(ours, backend=name)) for name in names}
        if device == "cuda":
            contenders = {"default": Contender(partial(ours, backend=None))} | contenders
            contenders |= mamba_ssm()
        return [(problem, contenders), _attention(B, L, device, dtype)]

    def work(self, itemsize: int) -> dict[str, tuple[float, float]]:
        """Bytes moved and exponentials taken at the least: two a step and head."""
        tokens, exponentials = self.B * self.L, 2 * self.B * self.L * self.H
        read = self.H * self.P + self.H + 2 * self.G * self.N
        return {
            "forward": (itemsize * tokens * (read + self.H * self.P), exponentials),
            "backward": (itemsize * tokens * (2 * read + self.H * self.P), exponentials),
        }
