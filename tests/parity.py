"""Published models' numbers under weights made by rule: reading `shared/parity` and comparing with it."""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

PARITY = Path(__file__).resolve().parents[1].parent / "shared" / "parity"
BOOSTED = ("x_proj_weight", "x_proj.weight", "x_proj_b.weight")


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weight of the state-dict entry `name`, a float32 array that depends on its name and shape only."""
    shape = tuple(shape)
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    scale = 0.5 / math.sqrt(max(1, math.prod(shape[1:]))) if len(shape) >= 2 else 0.1
    v, leaf = np.asarray(noise, np.float32) * np.float32(scale), name.split(".")[-1]
    if leaf == "weight" and len(shape) == 1:
        v = 1 + v
    if leaf == "running_var":
        v = 1 + abs(v)
    if leaf in ("A_log", "A_logs", "A_b_log"):
        v = np.log(np.arange(1, shape[-1] + 1)).astype(np.float32) + np.float32(0.1) * v
    if leaf in ("D", "Ds", "D_b"):
        v = 1 + v
    return np.asarray(v, np.float32)


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 tensor of a seed, as the fixtures' inputs and output gradients are drawn."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32))


@dataclass(frozen=True)
class Fixture:
    """One fixture: `meta` is its json, `arrays` its saved (maybe strided) arrays."""

    name: str
    meta: dict
    arrays: dict[str, np.ndarray]

    def weights(self, shifts: Mapping[str, np.ndarray | float] | None = None) -> dict[str, Tensor]:
        """Official state dict by the rule, after its float64 sums agree with the fixture's.

        shifts: what a fixture's `weights_exception` adds to the entries whose names end so.
        """
        boosted = self.name.endswith("_ssm8")
        state = {}
        for name, shape, _, kind, total in self.meta["state_dict"]:
            if name.endswith("num_batches_tracked"):
                state[name] = torch.zeros(shape, dtype=torch.int64)
                continue
            if kind.endswith("_kept"):  # YOLO's fixed projection 0..15
                state[name] = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
            else:
                v = value(name, shape)
                for leaf, shift in (shifts or {}).items():
                    v = v + np.asarray(shift, np.float32) if name.endswith(leaf) else v
                state[name] = torch.from_numpy(v * np.float32(8) if boosted and name.endswith(BOOSTED) else v)
            assert state[name].double().sum().item() == pytest.approx(total, rel=1e-9, abs=1e-9), name
        return state

    def input(self) -> Tensor:
        """The fixture's input, from its seed."""
        return normal(self.meta["input_seed"], self.meta["input_shape"])

    def check(self, key: str, actual: Tensor, *, tol: float) -> None:
        """Assert that `actual` is the array `key` within `tol` times its spread.

        The spread is the within-channel standard deviation of the whole array where the fixture gives one (4-d arrays),
        else its standard deviation; an array of one value per channel falls back from a spread of 0 to its std.
        """
        row = self.meta["arrays"][key]
        assert list(actual.shape) == row["shape"], f"{key}: shape {list(actual.shape)}, expected {row['shape']}"
        flat = actual.detach().double().contiguous().reshape(-1)[:: row.get("flat_stride", 1)].numpy()
        spread = row.get("within_channel_std") or row["std"] or row["absmax"]
        error = np.abs(flat - self.arrays[key].reshape(-1).astype(np.float64)).max() / spread
        assert error <= tol, f"{self.name} {key}: error {error:.2e} of the spread {spread:.2e}, allowed {tol:.0e}"


def load(name: str) -> Fixture:
    """Read fixture `name`; skips the test where `shared/parity` is absent."""
    if not PARITY.is_dir():
        pytest.skip(f"parity fixtures not found at {PARITY}")
    with np.load(PARITY / f"{name}.npz") as arrays:
        return Fixture(name, json.loads((PARITY / f"{name}.json").read_text()), dict(arrays))


def check_module(fixture: Fixture, module: nn.Module, *, tol: float, grad_tol: float, x: Tensor | None = None) -> None:
    """Check output, input gradient and every parameter gradient of `module`, which holds the fixture's weights.

    `module`'s parameter names must be the official ones, a trailing pair of unit kernel axes aside.
    """
    x = (fixture.input() if x is None else x).requires_grad_()
    out = module.eval()(x)
    fixture.check("out", out, tol=tol)
    (out * normal(fixture.meta["out_grad_seed"], out.shape).to(out)).sum().backward()
    fixture.check("grad_input", x.grad, tol=grad_tol)
    params = dict(module.named_parameters())
    for key in (k for k in fixture.meta["arrays"] if k.startswith("grad.")):
        grad = params[key.removeprefix("grad.")].grad
        fixture.check(key, grad.reshape(fixture.meta["arrays"][key]["shape"]), tol=grad_tol)
    if "out_train" in fixture.meta["arrays"]:
        fixture.check("out_train", module.train()(x), tol=tol)
