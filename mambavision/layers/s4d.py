"""S4D: a linear time-invariant state-space layer with a complex diagonal state matrix, as a long convolution.

B sequences, L steps, H channels, N d_state: N / 2 conjugate pairs, of which one half is kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class S4DKernel(nn.Module):
    """The convolution kernel of S4D: K_l = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n l), zero-order hold.

    A_n = -exp(log_A_real) + i A_imag. S4D-Lin: A_n = -1/2 + i pi n at the start; dt log-uniform in [dt_min, dt_max];
    C complex normal. Parameter names are those of state-spaces/s4's stand-alone S4D.
    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", arXiv 2206.11893.

    Args:
        d_model: channels H, each with its own kernel.
        d_state: N, even.
        dt_min, dt_max: range of the step dt.

    Raises:
        ValueError: If d_state is odd.
    """

    def __init__(self, d_model: int, *, d_state: int = 64, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        if d_state % 2 or d_state < 2:
            raise ValueError(f"d_state counts both of each conjugate pair: it must be even, got {d_state}")
        super().__init__()
        pairs = d_state // 2
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d_model, pairs, dtype=torch.cfloat)).clone())
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_A_real = nn.Parameter(torch.full((d_model, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs, dtype=torch.get_default_dtype()).repeat(d_model, 1))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log(A_bar) = dt A and C (A_bar - 1) / A, complex (H, N / 2)."""
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        log_A = A * torch.exp(self.log_dt)[:, None]
        return log_A, torch.view_as_complex(self.C) * (torch.exp(log_A) - 1) / A

    def forward(self, length: int) -> Tensor:
        """K (H, length), real.

        With l = q s + r, s about sqrt(length), it is a product of (H, q, N) and (H, N, r): the powers of all lengths,
        (H, N / 2, length), are never formed.
        """
        with torch.autocast(self.C.device.type, enabled=False):
            log_A, C = self.discrete()
            s = math.ceil(math.sqrt(length))
            steps = torch.arange(s, device=C.device)
            far = torch.view_as_real(C[:, None] * torch.exp(log_A[:, None] * (s * steps[: -(-length // s), None])))
            near = torch.view_as_real(torch.exp(log_A[..., None] * steps))  # (H, N / 2, r, 2)
            near = torch.cat([near[..., 0], -near[..., 1]], 1)  # Re(a b) = Re a Re b - Im a Im b
            return 2 * (torch.cat([far[..., 0], far[..., 1]], -1) @ near).flatten(1)[:, :length]


def fft_conv(u: Tensor, *kernels: Tensor, reverse: tuple[bool, ...]) -> list[Tensor]:
    """Convolve sequences with kernels of their length: y_t = sum_l k_l u_{t-l}, or with ``reverse`` k_l u_{t+l}.

    Zeros outside; O(L log L), in float32 or float64; u is transformed once.

    Shapes: u (B, H, L), kernels (H, L) each; returns (B, H, L) for each kernel, in float32 at least.
    """
    length = u.shape[-1]
    with torch.autocast(u.device.type, enabled=False):
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        u_f = torch.fft.rfft(u, n=2 * length)
        outputs = []
        for kernel, back in zip(kernels, reverse, strict=True):
            k_f = torch.fft.rfft(kernel.to(u.dtype), n=2 * length)
            outputs.append(torch.fft.irfft(u_f * (k_f.conj() if back else k_f), n=2 * length)[..., :length])
    return outputs


class S4D(nn.Module):
    """S4D layer: GLU(output_linear(GELU(K * u + D u))) with the kernel K of :class:`S4DKernel`, causal.

    Args:
        d_model: channels H.
        d_state: N.
    """

    def __init__(self, d_model: int, *, d_state: int = 64) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel = S4DKernel(d_model, d_state=d_state)
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1))  # the published layer's names

    def after(self, y: Tensor, u: Tensor) -> Tensor:
        """The layer's output (B, L, H) from the convolution's y (B, H, L) and its input u (B, L, H)."""
        y = F.gelu(torch.addcmul(y.mT.to(u.dtype), u, self.D.to(u.dtype)))
        weight, bias = self.output_linear[0].weight[..., 0], self.output_linear[0].bias
        return F.glu(F.linear(y, weight, bias), -1)

    def forward(self, u: Tensor) -> Tensor:
        """Mix u (B, L, H); same shape."""
        (y,) = fft_conv(u.mT, self.kernel(u.shape[1]), reverse=(False,))
        return self.after(y, u)
