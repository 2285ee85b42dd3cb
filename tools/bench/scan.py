"""Selective scans: multi_scan in its own layout, and selective_scan in mamba_ssm's."""

import math
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from bench.problem import Contender, Problem
from mambavision.ops import Backend, Preset, multi_scan, order_table, selective_scan

MOST_STATES = 2**28  # `chunked` holds all states of a call: on a GPU it is timed up to so many
COMPARED_STATES = 2**26  # and those of the part of a row that the gate compares, in float64


def _backends(device: str, channels: int, length: int, N: int) -> list[Backend]:
    """Those that are timed: on a GPU not what takes seconds a call, more memory than there is or CPU tensors."""
    left_out = set()
    if device == "cuda":
        left_out = {"reference", "cpu"}
        if channels * length * N > MOST_STATES:
            left_out.add("chunked")
        if channels < 4096 and length > 16384:  # a program walks 32 channels from the first step to the last
            left_out.add("triton")
    return [name for name in get_args(Backend) if name not in left_out]


def _inputs(shapes: dict[str, tuple[int, ...]], device: str, dtype: torch.dtype, slow: bool) -> dict[str, Tensor]:
    """Random inputs with the spread of a trained network, or of Mamba's initialisation, whose decays are slow."""
    g = torch.Generator(device).manual_seed(0)

    def normal(name: str) -> Tensor:
        return torch.randn(shapes[name], generator=g, device=device)

    first, delta = next(iter(shapes)), 0.5 * normal("delta") - 1
    A = -torch.rand(shapes["A"], generator=g, device=device) * 4 - 0.1
    bias = 0.1 * normal("bias")
    if slow:  # A = -1 ... -N; delta between 0.001 and 0.1
        A = -torch.arange(1.0, shapes["A"][-1] + 1, device=device).expand(shapes["A"])
        bias = torch.exp(math.log(0.001) + math.log(100) * torch.rand(shapes["bias"], generator=g, device=device))
        delta, bias = 0.1 * (delta + 1), bias + torch.log(-torch.expm1(-bias))
    typed = {first: normal(first), "delta": delta, "B": normal("B"), "C": normal("C")}
    values = {name: v.to(dtype) for name, v in typed.items()} | {"A": A.contiguous(), "D": normal("D"), "bias": bias}
    return {name: values[name] for name in shapes}


def _mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D, None, bias, True)


class MultiScan(NamedTuple):
    """multi_scan with softplus, D and bias, merged: batch, channels, grid, states."""

    B: int
    D: int
    grid: tuple[int, int]
    N: int
    orders: Preset = "cross"
    slow: bool = False

    op = "multi_scan"

    @property
    def L(self) -> int:
        return math.prod(self.grid)

    @property
    def K(self) -> int:
        return {"unidirectional": 1, "bidirectional": 2, "cross": 4}[self.orders]

    def __str__(self) -> str:
        return f"B{self.B} D{self.D} K{self.K} L{self.L} N{self.N}" + " slow" * self.slow

    def small(self) -> "MultiScan":
        """A small, odd one of the same kind."""
        return self._replace(B=2, D=40, grid=(13, 17))

    def problems(self, device: str, dtype: torch.dtype, *, sliced: bool) -> list[tuple[Problem, dict[str, Contender]]]:
        """The scan and its contenders; ``sliced``: the gate compares some channels of the last image only."""
        B, L, K, D, N = self.B, self.L, self.K, self.D, self.N
        shapes = {"x": (B, L, D), "delta": (B, L, K, D), "A": (K, D, N), "B": (B, L, K, N), "C": (B, L, K, N)}
        inputs = _inputs(shapes | {"D": (K, D), "bias": (K, D)}, device, dtype, self.slow)
        table = order_table(self.orders, self.grid, device)

        def ours(x, delta, A, B, C, D, bias, backend: Backend | None) -> Tensor:
            return multi_scan(
                x, delta, A, B, C, D, orders=table, grid=self.grid, delta_bias=bias, backend=backend
            )  # fmt: skip

        problem = Problem(inputs, partial(ours, backend="reference"))
        if sliced:
            count = max(1, min(D, COMPARED_STATES // (K * L * N)))
            some = torch.linspace(0, D - 1, count, device=device).long()

            def exact(x, delta, A, B, C, D, bias) -> Tensor:
                last = (v[-1:] for v in (x[..., some], delta[..., some], B, C))
                x, delta, B, C = last
                return ours(x, delta, A[:, some], B, C, D[:, some], bias[:, some], "chunked")

            problem = Problem(inputs, exact, lambda y: y[-1:, :, some])
        names = _backends(device, B * K * D, L, N)
        contenders = {name: Contender(partial(ours, backend=name)) for name in names}
        if device == "cuda":
            contenders = {"default": Contender(partial(ours, backend=None))} | contenders
            contenders["mamba_ssm"] = self.materialised(table.index.long())
        return [(problem, contenders)]

    def materialised(self, order: Tensor) -> Contender:
        """mamba_ssm's scan on the K directions as groups, permuted beforehand; merging them is not timed either."""
        inverse = order.argsort(1)

        def scans(v: Tensor) -> Tensor:
            stacked = torch.stack([v[:, order[k], k].transpose(1, 2) for k in range(self.K)], 1)
            return stacked.contiguous()  # (B, K, D or N, L)

        def prepare(x, delta, A, B, C, D, bias) -> list[Tensor]:
            x = x[:, :, None].expand(delta.shape)
            return [
                scans(x).flatten(1, 2), scans(delta).flatten(1, 2), A.flatten(0, 1), scans(B), scans(C), D.flatten(),
                bias.flatten(),
            ]  # fmt: skip

        def restore(y: Tensor) -> Tensor:
            y = y.float().unflatten(1, (self.K, self.D))
            return sum(y[:, k, :, inverse[k]] for k in range(self.K)).transpose(1, 2)

        return Contender(_mamba_ssm, prepare, restore)

    def work(self, itemsize: int) -> dict[str, tuple[float, float]]:
        """Bytes moved and exponentials taken at the least: x read once, one merged output, N + 1 a step and channel.

        One is softplus's, whose logarithm can be a polynomial.
        """
        tokens, channels, states = self.B * self.L, self.D, self.K * self.N
        exponentials = tokens * self.K * channels * (self.N + 1)
        read = channels + self.K * channels + 2 * states
        return {
            "forward": (itemsize * tokens * (read + channels), exponentials),
            "backward": (itemsize * tokens * (2 * read + channels), exponentials),
        }


class SelectiveScan(NamedTuple):
    """selective_scan with softplus, D and bias in mamba_ssm's layout: batch, channels, tokens, states, groups."""

    B: int
    D: int
    L: int
    N: int
    G: int = 1

    op = "selective_scan"

    def __str__(self) -> str:
        return f"{tuple(self)}"

    def small(self) -> "SelectiveScan":
        """A small, odd one of the same kind."""
        return self._replace(B=2, D=40 * self.G, L=203)

    def problems(self, device: str, dtype: torch.dtype, *, sliced: bool) -> list[tuple[Problem, dict[str, Contender]]]:
        """The scan and its contenders; ``sliced``: the gate compares the last sequence, one channel of a few."""
        B, D, L, N, G = self
        shapes = {"u": (B, D, L), "delta": (B, D, L), "A": (D, N), "B": (B, G, N, L), "C": (B, G, N, L)}
        inputs = _inputs(shapes | {"D": (D,), "bias": (D,)}, device, dtype, False)

        def ours(u, delta, A, B, C, D, bias, backend: Backend | None) -> Tensor:
            return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend)

        problem = Problem(inputs, partial(ours, backend="reference"))
        if sliced:
            step = max(1, min(D // G, math.ceil(D * L * N / COMPARED_STATES)))
            while D // G % step:
                step += 1

            def exact(u, delta, A, B, C, D, bias) -> Tensor:
                u, delta, A, D, bias = u[-1:, ::step], delta[-1:, ::step], A[::step], D[::step], bias[::step]
                return ours(u, delta, A, B[-1:], C[-1:], D, bias, "chunked")

            problem = Problem(inputs, exact, lambda y: y[-1:, ::step])
        names = _backends(device, B * D, L, N)
        contenders = {name: Contender(partial(ours, backend=name)) for name in names}
        if device == "cuda":
            contenders = {"default": Contender(partial(ours, backend=None))} | contenders
            contenders["mamba_ssm"] = Contender(_mamba_ssm)
        return [(problem, contenders)]

    def work(self, itemsize: int) -> dict[str, tuple[float, float]]:
        """Bytes moved and exponentials taken at the least: N + 1 a step and channel."""
        tokens = self.B * self.L
        read, exponentials = 2 * self.D + 2 * self.G * self.N, tokens * self.D * (self.N + 1)
        return {
            "forward": (itemsize * tokens * (read + self.D), exponentials),
            "backward": (itemsize * tokens * (2 * read + self.D), exponentials),
        }
