"""The public norm_gate: its equation, its refusals, the choice of implementation, registration with torch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mambavision.ops import norm_gate, use_backend


def arguments(*names, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    made = {k: torch.randn(*s, generator=g, dtype=dtype) for k, s in (("x", (2, 5, 6)), ("z", (2, 5, 6)))}
    made |= {k: torch.randn(6, generator=g, dtype=dtype) for k in ("weight", "bias")}
    return {k: made[k].requires_grad_() for k in names}


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_it_is_layer_norm_times_the_activated_gate(activation):
    args = arguments("x", "z", "weight", "bias")
    z = {None: args["z"], "silu": F.silu(args["z"]), "gelu": F.gelu(args["z"])}[activation]
    expected = F.layer_norm(args["x"], (6,), args["weight"], args["bias"], 1e-3) * z
    torch.testing.assert_close(norm_gate(**args, activation=activation, eps=1e-3), expected)
    torch.testing.assert_close(norm_gate(args["x"], args["z"], activation=activation), args["x"] * z)
    normed = F.layer_norm(args["x"], (6,), args["weight"])
    torch.testing.assert_close(norm_gate(args["x"], weight=args["weight"]), normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["layer", "rms", "gated_rms"])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_inference_mode_changes_neither_the_result_nor_the_arguments(norm, activation, dtype):
    args = {k: v.detach().to(dtype) for k, v in arguments("x", "z", "weight").items()}
    before = {k: v.clone() for k, v in args.items()}
    expected = norm_gate(**args, norm=norm, activation=activation)
    with torch.inference_mode():
        y = norm_gate(**args, norm=norm, activation=activation)
    assert torch.equal(y, expected) and all(torch.equal(args[k], before[k]) for k in args)


def test_gradcheck():
    args = arguments("x", "z", "weight", "bias", dtype=torch.float64)
    torch.autograd.gradcheck(norm_gate, tuple(args.values()))


def test_parameters_in_float32_with_tokens_in_bfloat16():
    args = arguments("x", "z", "weight", "bias")
    expected = norm_gate(**args)
    y = norm_gate(args["x"].bfloat16(), args["z"].bfloat16(), args["weight"], args["bias"])
    assert y.dtype == norm_gate(args["x"].bfloat16(), args["z"]).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


WRONG = {
    "z must be": {"z": torch.zeros(2, 5, 7)},
    "weight must be .6,.": {"weight": torch.zeros(5)},
    "bias must be .6,.": {"bias": torch.zeros(6, 1)},
    "give weight too": {"bias": torch.zeros(6)},
    "activation must be": {"activation": "relu"},
    "unknown backend 'cpu'": {"backend": "cpu"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        norm_gate(**(arguments("x", "z") | WRONG[message]))


def test_a_gpu_runs_triton_unless_plain_torch_is_asked_for(monkeypatch):
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    monkeypatch.delenv("MAMBAVISION_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CUDA"):
        norm_gate(torch.zeros(2, 3), backend="triton")
    with FakeTensorMode():
        x, wide = (torch.zeros(s, device="cuda", requires_grad=True) for s in ((2, 6), (2, 9000)))
        ours, torchs = (norm_gate(x, x, backend=b).grad_fn.name() for b in ("triton", "torch"))
        assert ours != torchs and norm_gate(x, x).grad_fn.name() == ours
        with use_backend("reference"):
            assert norm_gate(x, x).grad_fn.name() == torchs
        assert norm_gate(wide, wide).grad_fn.name() == torchs
        with pytest.raises(RuntimeError, match="up to 8192 channels, got 9000"):
            norm_gate(wide, wide, backend="triton")


def test_compile_in_one_graph():
    args = arguments("x", "z", "weight", "bias")
    torch.compiler.reset()
    compiled = torch.compile(norm_gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), norm_gate(**args))


@pytest.mark.gpu
def test_compile_in_one_graph_on_cuda():
    args = {k: v.detach().cuda().requires_grad_() for k, v in arguments("x", "z", "weight", "bias").items()}
    torch.compiler.reset()
    compiled = torch.compile(norm_gate, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = torch.autograd.grad(norm_gate(**args, backend="torch").square().sum(), list(args.values()))
    actual = torch.autograd.grad(compiled(**args, backend="triton").square().sum(), list(args.values()))
    torch.testing.assert_close(actual, expected)
