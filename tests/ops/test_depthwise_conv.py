"""The public depthwise_conv: its equation, its refusals, the choice of implementation, registration with torch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mambavision.ops import depthwise_conv, dispatch, use_backend


@pytest.mark.parametrize("padding", ["same", "past", "future"])
def test_tokens_are_the_sum_of_the_docstring(padding):
    x, weight, bias = torch.randn(2, 9, 3), torch.randn(3, 1, 5), torch.randn(3)
    y = depthwise_conv(x, weight, bias, padding=padding)
    for t in range(9):
        expected = bias.clone().expand(2, 3)
        for j in range(5):
            at = t + {"same": j - 2, "past": j - 4, "future": 4 - j}[padding]
            expected = expected + (weight[:, 0, j] * x[:, at] if 0 <= at < 9 else 0)
        torch.testing.assert_close(y[:, t], expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_past_and_future_are_causal_convolutions_of_the_tokens_and_of_the_reversed_tokens(reverse):
    x, weight = torch.randn(2, 9, 3), torch.randn(3, 1, 4)
    flipped = x.flip(1) if reverse else x
    expected = F.conv1d(F.pad(flipped.transpose(1, 2), (3, 0)), weight, groups=3).transpose(1, 2)
    expected = expected.flip(1) if reverse else expected
    torch.testing.assert_close(depthwise_conv(x, weight, padding="future" if reverse else "past"), expected)


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("width", [(3, 3), (1, 5)])
def test_pixels_are_conv2d(width, activation):
    x = torch.randn(2, 6, 7, 4)
    conv = torch.nn.Conv2d(4, 4, width, padding=(width[0] // 2, width[1] // 2), groups=4)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = {None: expected, "silu": F.silu(expected), "gelu": F.gelu(expected)}[activation]
    before = x.clone()
    torch.testing.assert_close(depthwise_conv(x, conv.weight, conv.bias, activation=activation), expected)
    with torch.inference_mode():
        torch.testing.assert_close(depthwise_conv(x, conv.weight, conv.bias, activation=activation), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("padding", ["same", "past", "future"])
def test_gradcheck(padding):
    arguments = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 4, 2), (2, 1, 3, 3), (2,))]
    torch.autograd.gradcheck(lambda *a: depthwise_conv(*a, padding=padding, activation="silu"), arguments)


WRONG = {
    "x must be": {"x": torch.zeros(5, 3)},
    "weight must be .3, 1, k.": {"weight": torch.zeros(3, 1, 3, 3)},
    "weight must be": {"weight": torch.zeros(3, 3, 3)},
    "bias must be": {"bias": torch.zeros(4)},
    "padding must be": {"padding": "valid"},
    "odd widths, got .4,": {"weight": torch.zeros(3, 1, 4), "padding": "same"},
    "activation must be": {"activation": "relu"},
    "unknown backend 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message):
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 1, 4), "padding": "past"} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        depthwise_conv(**arguments)


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv("MAMBAVISION_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_triton_on_the_cpu_is_refused_with_the_reason(no_environment):
    with pytest.raises(RuntimeError, match="CUDA"):
        depthwise_conv(torch.zeros(1, 5, 3), torch.zeros(3, 1, 3), backend="triton")


def test_a_gpu_runs_triton_unless_plain_torch_is_asked_for(no_environment, monkeypatch, caplog):
    pytest.importorskip("triton", reason="triton comes with torch on Linux only")
    with FakeTensorMode():
        x, weight = (torch.zeros(s, device="cuda", requires_grad=True) for s in ((1, 9, 9, 3), (3, 1, 3, 3)))
        wide = torch.zeros(3, 1, 7, 7, device="cuda")

        def operator(weight=weight, **options):
            return depthwise_conv(x, weight, **options).grad_fn.name()

        ours, torchs = operator(backend="triton"), operator(backend="torch")
        assert ours != torchs and operator() == ours
        with use_backend("chunked"):
            assert operator() == torchs
        with use_backend("triton"):
            assert operator() == ours
        monkeypatch.setenv("MAMBAVISION_BACKEND", "reference")
        assert operator() == torchs
        monkeypatch.delenv("MAMBAVISION_BACKEND")
        dispatch._log_once.cache_clear()
        with caplog.at_level("WARNING", "mambavision"):
            assert operator(wide) == operator(wide) == torchs
        assert ["up to 25 taps, got 49" in record.message for record in caplog.records] == [True]
        with pytest.raises(RuntimeError, match="up to 25 taps, got 49"):
            operator(wide, backend="triton")


def test_parameters_in_float32_with_tokens_in_bfloat16():
    x, weight, bias = torch.randn(2, 9, 8), torch.randn(8, 1, 3), torch.randn(8)
    y = depthwise_conv(x.bfloat16(), weight, bias, activation="gelu")
    assert y.dtype == torch.bfloat16
    expected = depthwise_conv(x.bfloat16().float(), weight, bias, activation="gelu")
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_float32_tokens_under_autocast_give_its_dtype():
    x, weight = torch.randn(2, 9, 8), torch.randn(8, 1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise_conv(x, weight)
    assert torch.equal(y, depthwise_conv(x.bfloat16(), weight))


def test_compile_in_one_graph():
    x, weight = torch.randn(2, 6, 7, 4, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    torch.compiler.reset()

    def function(x, weight):
        return depthwise_conv(x, weight, activation="silu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x, weight), function(x, weight)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
def test_compile_in_one_graph_on_cuda():
    leaves = [torch.randn(s, device="cuda", requires_grad=True) for s in ((2, 6, 7, 4), (4, 1, 3, 3), (4,))]
    torch.compiler.reset()
    compiled = torch.compile(depthwise_conv, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = torch.autograd.grad(depthwise_conv(*leaves).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves, backend="triton").square().sum(), leaves)
    torch.testing.assert_close(actual, expected)
