import math

import pytest
import torch
import torch.nn.functional as F

from mambavision.layers.s4d import S4D, S4DKernel, fft_conv


def drawn(d_model: int = 5, d_state: int = 6) -> S4DKernel:
    torch.manual_seed(0)
    return S4DKernel(d_model, d_state=d_state).double()


def recurrence(kernel: S4DKernel, u: torch.Tensor) -> torch.Tensor:
    """The state equation x' = A x + u, y = 2 Re C x under zero-order hold, step by step; u (B, H, L)."""
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)  # (H, N / 2)
    A_bar = torch.exp(A * kernel.log_dt.exp()[:, None])
    B_bar = (A_bar - 1) / A
    x = torch.zeros(len(u), *A.shape, dtype=A.dtype)
    outputs = []
    for t in range(u.shape[-1]):
        x = A_bar * x + B_bar * u[..., t, None]
        outputs.append(2 * (torch.view_as_complex(kernel.C) * x).sum(-1).real)
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 64, 65])
def test_the_convolution_is_the_recurrence(length):
    kernel = drawn()
    u = torch.randn(2, 5, length, dtype=torch.float64)
    (y,) = fft_conv(u, kernel(length), reverse=(False,))
    torch.testing.assert_close(y, recurrence(kernel, u))


def test_gradients_are_those_of_the_recurrence():
    kernel = drawn()
    u = torch.randn(2, 5, 21, dtype=torch.float64, requires_grad=True)
    inputs, grad = [u, *kernel.parameters()], torch.randn(2, 5, 21, dtype=torch.float64)
    (y,) = fft_conv(u, kernel(21), reverse=(False,))
    found = torch.autograd.grad(y, inputs, grad)
    expected = torch.autograd.grad(recurrence(kernel, u), inputs, grad)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_reverse_is_the_convolution_of_flipped_sequences():
    kernel = drawn()
    u = torch.randn(2, 5, 12, dtype=torch.float64)
    past, future = fft_conv(u, kernel(12), kernel(12), reverse=(False, True))
    torch.testing.assert_close(future, recurrence(kernel, u.flip(-1)).flip(-1))
    torch.testing.assert_close(past, recurrence(kernel, u))


def test_float32_kernels_are_close_to_float64():
    kernel = S4DKernel(16, d_state=64)
    exact = kernel.double()(400)
    assert (kernel.float()(400) - exact).abs().max() < 1e-4 * exact.abs().max()


def test_it_starts_as_s4d_lin():
    kernel = S4DKernel(512, d_state=8)
    torch.testing.assert_close(-kernel.log_A_real.exp(), torch.full((512, 4), -0.5))
    torch.testing.assert_close(kernel.A_imag, math.pi * torch.arange(4.0).expand(512, 4))
    dt = kernel.log_dt.exp()
    assert 1e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1
    assert kernel.C.detach().std() == pytest.approx(0.5**0.5, rel=0.1)


def test_an_odd_state_is_refused():
    with pytest.raises(ValueError, match="must be even, got 7"):
        S4DKernel(4, d_state=7)


def test_the_layer_is_causal_and_is_what_it_says():
    torch.manual_seed(0)
    layer = S4D(6, d_state=4).double()
    u = torch.randn(2, 9, 6, dtype=torch.float64)
    y = layer(u)
    conv = recurrence(layer.kernel, u.mT).mT
    linear = layer.output_linear[0]
    torch.testing.assert_close(y, F.glu(F.linear(F.gelu(conv + layer.D * u), linear.weight[..., 0], linear.bias), -1))
    other = u.clone()
    other[:, 5] += 1
    torch.testing.assert_close(layer(other)[:, :5], y[:, :5])
    assert not torch.allclose(layer(other)[:, 5:], y[:, 5:])
