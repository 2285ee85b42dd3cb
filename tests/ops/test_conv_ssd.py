"""Mamba-2 between its projections: the equation, one operator against three, refusals.

Run as a script it prints what is wrong with the operator under triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mambavision.ops import conv_ssd, ssd

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("projected", "conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight")


def inputs(batch=2, length=21, H=4, P=8, G=2, N=8, k=3, spare=0, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(0)
    wide = H * P + 2 * G * N
    shapes = ((batch, length, H * P + wide + H + spare), (wide, 1, k), (wide,), (H,), (H,), (H,), (H * P,))
    made = [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]
    made[3] = -made[3].exp()
    return [v.requires_grad_() for v in made]


def gradients(y, leaves):
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return torch.autograd.grad(y, leaves, grad)


def relative(actual, expected):
    return ((actual.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("padding", ["past", "same"])
def test_it_is_mamba2s_equation(padding, bidirectional):
    projected, weight, bias, A, D, dt_bias, norm = inputs(spare=3)
    z, xBC, dt, _ = projected.split((32, 64, 4, 3), -1)
    pad = (2, 0) if padding == "past" else (1, 1)
    xBC = F.silu(F.conv1d(F.pad(xBC.mT, pad), weight, bias, groups=64).mT)
    x, B, C = (v.unflatten(-1, (n, -1)) for v, n in zip(xBC.split((32, 16, 16), -1), (4, 2, 2), strict=True))
    dt = F.softplus(dt + dt_bias)
    y = ssd(x, dt, A, B, C, D)
    if bidirectional:
        y = y + ssd(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)).flip(1)
    expected = F.rms_norm(y.flatten(2) * F.silu(z), (32,), norm, 1e-5)
    options = {"ngroups": 2, "padding": padding, "bidirectional": bidirectional}
    torch.testing.assert_close(conv_ssd(projected, weight, bias, A, D, dt_bias, norm, **options), expected)


def wrong_gradients(backend, device, dtype, limit, shape, bidirectional, padding):
    """What the one operator and its gradients have wrong, against the three in float64."""
    options = (shape["G"], padding, bidirectional, 1e-5)
    names = ("ngroups", "padding", "bidirectional", "eps")
    leaves = inputs(**shape, dtype=dtype, device=device)
    exact = [v.detach().double().cpu().requires_grad_() for v in leaves]
    expected = conv_ssd(*exact, **dict(zip(names, options, strict=True)))
    actual = torch.ops.mambavision.conv_ssd(*leaves, *options, backend)[0]
    pairs = [("y", actual, expected)]
    pairs += zip(NAMES, gradients(actual, leaves), gradients(expected, exact), strict=True)
    errors = {name: relative(got, want) for name, got, want in pairs}
    return {name: f"{error:.1e}" for name, error in errors.items() if not error <= limit}


TINY = dict(batch=1, length=19, H=2, P=16, G=1, N=16, k=3, spare=2)


def test_one_operator_is_three_under_the_interpreter():
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "{} {}\n"), done.stdout + done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("length, P, G, N", [(197, 64, 1, 64), (1024, 64, 1, 64), (197, 16, 2, 24), (70, 12, 1, 16)])
def test_one_operator_is_three_on_cuda(backend, length, P, G, N):
    shape = dict(batch=2, length=length, H=6, P=P, G=G, N=N, k=3, spare=2)
    wrong = wrong_gradients(backend, "cuda", torch.bfloat16, 2e-2, shape, True, "same")
    assert not wrong


@pytest.mark.gpu
def test_training_on_a_gpu_takes_the_one_operator():
    leaves = inputs(H=2, P=64, G=1, N=64, dtype=torch.bfloat16, device="cuda")
    assert "conv_ssd" in conv_ssd(*leaves, bidirectional=True, padding="same").grad_fn.name()


def test_what_does_not_fit_is_refused():
    leaves = inputs()
    with pytest.raises(ValueError, match="projected must be"):
        conv_ssd(leaves[0][..., :-1], *leaves[1:], ngroups=2)
    with pytest.raises(ValueError, match="3 groups"):
        conv_ssd(*leaves, ngroups=3)


def test_compile_in_one_graph():
    leaves = inputs(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(conv_ssd, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves, ngroups=2), conv_ssd(*leaves, ngroups=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    wrong = wrong_gradients("triton", "cpu", torch.float32, 1e-5, TINY, True, "same")
    operator = torch.ops.mambavision.conv_ssd
    arguments = (*inputs(**TINY, dtype=torch.float32), 1, "same", True, 1e-5, "triton")
    checks = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    print(wrong, {name: result for name, result in checks.items() if result != "SUCCESS"})
