"""Depth-wise convolution and normalisation with gate in Triton against torch in float64, forward and every gradient.

Run as a script it prints the results of TINY as JSON: TRITON_INTERPRET has to be set before triton is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mambavision.ops import depthwise_conv, norm_gate
from tests.kernels.test_ssd import relative

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMIT = {"fp32": 2e-6, "bf16": 6e-3, "fp16": 8e-4}  # rounding of the result; gradients round one product more


class Conv(NamedTuple):
    shape: tuple[int, ...]
    width: tuple[int, ...]
    padding: str = "same"
    activation: str | None = None
    bias: bool = True
    dtype: str = "fp32"
    layout: str = "dense"  # or "slice" of twice the channels, "channels_first", "expanded" gradient

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        channels = self.shape[-1]
        wide = torch.randn(*self.shape[:-1], 2 * channels, generator=g).to(DTYPES[self.dtype])
        found = {"x": wide[..., :channels], "weight": torch.randn(channels, 1, *self.width, generator=g)}
        return found | {"bias": torch.randn(channels, generator=g)} if self.bias else found

    def call(self, backend: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return depthwise_conv(x, weight, bias, padding=self.padding, activation=self.activation, backend=backend)


class Gate(NamedTuple):
    shape: tuple[int, ...]
    norm: bool = True
    bias: bool = True
    gate: bool = True
    activation: str | None = "silu"
    dtype: str = "fp32"
    layout: str = "dense"
    kind: str = "layer"

    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        channels = self.shape[-1]
        wide = torch.randn(*self.shape[:-1], 2 * channels, generator=g)
        x, z = (v.to(DTYPES[self.dtype]) for v in (3 * wide[..., :channels] + 1, wide[..., channels:]))
        found = {"x": x} | ({"z": z} if self.gate else {})
        found |= {"weight": torch.randn(channels, generator=g)} if self.norm else {}
        return found | ({"bias": torch.randn(channels, generator=g)} if self.norm and self.bias else {})

    def call(self, backend: str, **inputs: Tensor) -> Tensor:
        return norm_gate(**inputs, activation=self.activation, norm=self.kind, backend=backend)


Case = Conv | Gate
TINY = [
    Conv((2, 5, 9, 10), (3, 3), activation="silu"),
    Conv((1, 11, 7, 5), (3, 3), bias=False, layout="channels_first"),
    Conv((2, 6, 3, 40), (3, 3), activation="gelu", dtype="fp16", layout="slice"),
    Conv((1, 4, 4, 3), (1, 5), activation="gelu", bias=False),
    Conv((1, 1, 1, 1), (3, 3), activation="silu"),
    Conv((1, 7, 5, 2), (5, 3), "past"),
    Conv((1, 7, 5, 2), (2, 3), "future", "silu", layout="expanded"),
    Conv((2, 21, 10), (4,), "past", "silu", layout="slice"),
    Conv((2, 21, 10), (4,), "future", "silu"),
    Conv((2, 3, 130), (4,), "past", bias=False),
    Conv((1, 2, 3), (4,), "future", "gelu"),
    Conv((1, 33, 4), (7,)),
    Conv((2, 21, 10), (3,), "same", "silu", layout="slice"),
    Conv((1, 5, 3), (5,), "same", "gelu", layout="channels_first"),
    Conv((2, 1, 3), (3,), "same", "silu"),
    Conv((0, 4, 4, 3), (3, 3), activation="silu"),
    Gate((3, 5, 10)),
    Gate((2, 7, 40), bias=False, activation="gelu", layout="slice"),
    Gate((2, 9, 33), norm=False, layout="channels_first"),
    Gate((4, 12), gate=False),
    Gate((2, 3, 16), activation=None, dtype="fp16"),
    Gate((1, 1), norm=False),
    Gate((1, 3)),
    Gate((2, 1100), layout="expanded"),
    Gate((3, 600), kind="gated_rms"),
    Gate((0, 5)),
    Gate((3, 5, 10), kind="rms"),
    Gate((2, 7, 40), bias=False, kind="rms", layout="slice"),
    Gate((2, 7, 40), bias=False, kind="gated_rms", layout="slice"),
    Gate((3, 5, 10), kind="gated_rms", activation="gelu", dtype="fp16"),
    Gate((3, 5, 10), gate=False, kind="gated_rms"),
]
FULL = [
    *(
        Conv(shape, (3, 3), "same", activation, bias, dtype, layout)
        for shape in ((2, 28, 28, 96), (1, 1, 200, 33), (3, 20, 20, 257))
        for activation, bias, dtype, layout in (
            ("silu", False, "bf16", "dense"),
            ("gelu", True, "bf16", "slice"),
            (None, True, "fp32", "channels_first"),
            ("silu", True, "fp16", "dense"),
        )
    ),
    *(
        Conv((2, length, channels), (4,), padding, "silu", True, dtype, layout)
        for length, channels in ((3, 384), (197, 384), (1030, 100))
        for padding in ("past", "future")
        for dtype, layout in (("bf16", "slice"), ("fp32", "dense"))
    ),
    *(
        Conv((3, length, 1152), (3,), "same", "silu", True, dtype, layout)
        for length in (197, 1030)
        for dtype, layout in (("bf16", "slice"), ("fp32", "dense"))
    ),
    Conv((1, 40, 40, 64), (5, 5), activation="gelu", dtype="bf16"),
    *(
        Gate((500, channels), bias=False, dtype="bf16", layout="slice", kind=kind)
        for channels in (96, 2304)
        for kind in ("rms", "gated_rms")
    ),
    *(
        Gate((500, channels), norm, True, gate, activation, dtype, layout)
        for channels in (7, 96, 257, 1536, 5000)
        for norm, gate, activation, dtype, layout in (
            (True, True, "silu", "bf16", "slice"),
            (True, True, "gelu", "fp32", "dense"),
            (True, False, None, "bf16", "dense"),
            (False, True, "silu", "fp16", "slice"),
        )
    ),
]


def laid_out(v: Tensor, layout: str) -> Tensor:
    """The same values, as a slice of more channels or with channels that are no neighbours."""
    if layout == "slice":
        return torch.cat([torch.full_like(v, torch.nan), v], -1)[..., v.shape[-1] :]
    return v.movedim(-1, 1).contiguous().movedim(1, -1) if layout == "channels_first" else v


def spaced(v: Tensor, layout: str) -> Tensor:
    """A parameter, beside tokens that are a slice with NaN between its elements."""
    return torch.stack([v, torch.full_like(v, torch.nan)], -1)[..., 0] if layout == "slice" else v


def results(case: Case, backend: str, device: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    inputs = {k: v.to(device, dtype or v.dtype) for k, v in case.inputs().items()}
    laid = {k: laid_out(v, case.layout) if k in "xz" else spaced(v, case.layout) for k, v in inputs.items()}
    leaves = {k: v.detach().requires_grad_() for k, v in laid.items()}
    y = case.call(backend, **leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(leaves["x"].dtype if dtype is None else y)
    dy = dy.to(DTYPES[case.dtype]).to(y)
    dy = dy[..., :1].expand(dy.shape) if case.layout == "expanded" else laid_out(dy, case.layout)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"y": y} | {f"gradient of {k}": v for k, v in zip(leaves, grads, strict=True)}
    kinds = {"y": "x"} | {f"gradient of {k}": k for k in leaves}
    assert all(v.dtype == leaves[kinds[k]].dtype and v.shape == (y if k == "y" else leaves[kinds[k]]).shape
               for k, v in found.items())  # fmt: skip
    return {k: v.detach().double().cpu() for k, v in found.items()}


def check(case: Case, device: str = "cpu") -> None:
    expected, actual = results(case, "torch", "cpu", torch.float64), results(case, "triton", device)
    with torch.no_grad():  # the way without autograd is another one
        inputs = {k: laid_out(v, case.layout) if k in "xz" else v for k, v in case.inputs().items()}
        plain = case.call("triton", **{k: v.to(device) for k, v in inputs.items()})
    assert not plain.numel() or relative(plain.double().cpu(), actual["y"]) <= LIMIT[case.dtype]
    errors = {k: relative(actual[k], v) for k, v in expected.items() if v.numel()}
    wrong = {k: f"{e:.1e}" for k, e in errors.items() if not e <= (1 if k == "y" else 2) * LIMIT[case.dtype]}
    assert not wrong, wrong


def opcheck(case: Case) -> None:
    leaves = [v.detach().clone().requires_grad_() for v in case.inputs().values()]
    if isinstance(case, Conv):
        x, weight, bias = leaves
        arguments = (x, weight[:, 0], bias, [1, 1], False, case.activation)
        one, other = torch.ops.mambavision.depthwise_conv, torch.ops.mambavision.depthwise_conv_backward
    else:
        x, z, weight, bias = leaves
        arguments = (x, z, weight, bias, case.activation, 1e-5, "gated_rms")
        one, other = torch.ops.mambavision.norm_gate, torch.ops.mambavision.norm_gate_backward
    torch.library.opcheck(one, arguments)
    detached = [v.detach().clone() if isinstance(v, Tensor) else v for v in arguments]
    torch.library.opcheck(other, (torch.randn_like(detached[0]), *detached))


@pytest.fixture(scope="module")
def interpreted():
    """TINY through triton's interpreter in a process of its own: {case: what is wrong, or ""}."""
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*TINY, "opcheck conv", "opcheck gate"], ids=str)
def test_triton_under_the_interpreter(case, interpreted):
    assert interpreted[str(case)] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TINY, *FULL], ids=str)
def test_full_matrix_on_cuda(case):
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [FULL[0], FULL[12], FULL[-4]], ids=str)
def test_twice_gives_the_same_bits(case):
    one, two = results(case, "triton", "cuda"), results(case, "triton", "cuda")
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["conv", "gate"])
def test_offsets_beyond_32_bits(call):
    """x has 2.4e9 elements: addresses of the last image do not fit an int32."""
    leaf = torch.randn(36, 1024, 1024, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(64, 1, 3, 3, device="cuda") if call == "conv" else torch.ones(64, device="cuda")
    weight.requires_grad_()

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = depthwise_conv(x, weight) if call == "conv" else norm_gate(x, x.detach(), weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), x.detach())

    y, dx, dw = step(leaf)
    total = torch.zeros_like(dw, dtype=torch.float64)
    for i in range(len(leaf)):
        one, *gradients = step(leaf[i : i + 1].detach().requires_grad_())
        total += gradients[1]
        if i in (0, 17, len(leaf) - 1):
            assert torch.equal(y[i : i + 1], one) and torch.equal(dx[i : i + 1], gradients[0])
    assert relative(dw.detach().double(), total) < 1e-4


def main() -> None:
    from tests.kernels.test_ssd import refuse_stray_pointers

    torch.set_num_threads(1)
    refuse_stray_pointers()
    empty = torch.empty
    torch.empty = lambda *a, **kw: empty(*a, **kw).fill_(torch.nan)
    jobs = {str(case): lambda case=case: check(case) for case in TINY}
    gate = next(case for case in TINY if isinstance(case, Gate))
    jobs |= {"opcheck conv": lambda: opcheck(TINY[0]), "opcheck gate": lambda: opcheck(gate)}
    found = {}
    for name, job in jobs.items():
        try:
            job()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
