"""Mamba-2 mixers of token sequences. B batch, L tokens, D d_inner, H heads of P channels, G groups, N d_state."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.ssm import check_channels_last, check_sizes
from mambavision.ops import Padding, conv_ssd, depthwise_conv, norm_gate, ssd


class Mamba2Mixer(nn.Module):
    """Mamba-2 block: out_proj(norm(ssd(x, dt, B, C) * silu(z))) with [z, x, B, C, dt] = in_proj(input), causal.

    x, B and C pass through a depth-wise convolution and SiLU; norm is a root-mean-square normalisation. Parameter names
    are those of state-spaces/mamba's Mamba2, so that its checkpoints load. The parameters of in_proj, conv1d and norm
    are used, not these modules: hooks on them do not run.
    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7.

    Args:
        d_model: channels of input and output.
        d_state: N, states per channel.
        d_conv: width of the convolution.
        expand: D = expand * d_model.
        headdim: P, channels that share a decay.
        ngroups: G, groups of heads that share B and C.

    Raises ValueError where heads do not divide the channels, or groups the heads, or sizes are below 1.
    """

    padding: Padding = "past"
    bidirectional = False

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        sizes = {"d_state": d_state, "d_conv": d_conv, "headdim": headdim, "ngroups": ngroups}
        check_sizes(d_model=d_model, d_inner=d_inner, **sizes)
        nheads = d_inner // headdim
        if d_inner % headdim or nheads % ngroups:
            raise ValueError(f"{d_inner} channels cannot be heads of {headdim} in {ngroups} groups of as many heads")
        wide = d_inner + 2 * ngroups * d_state  # x, B and C
        self.ngroups = ngroups
        self.in_proj = nn.Linear(d_model, d_inner + wide + nheads, bias=False)
        self.conv1d = nn.Conv1d(wide, wide, d_conv, groups=wide)
        self.dt_bias = nn.Parameter(torch.empty(nheads))
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.D = nn.Parameter(torch.ones(nheads))
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        init_mamba2(self.A_log, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, L, d_model); same shape. Raises ValueError if x has another."""
        check_channels_last(x, "(B, L, C)", self.in_proj.in_features)
        weight = self.in_proj.weight
        if x.device.type == "cuda" and len(weight) % 64:  # tokens at multiples of 128 bytes, as torch.compile lays them
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 64))
        y = conv_ssd(
            F.linear(x, weight),
            self.conv1d.weight,
            self.conv1d.bias,
            -torch.exp(self.A_log.float()),
            self.D,
            self.dt_bias,
            self.norm.weight,
            ngroups=self.ngroups,
            padding=self.padding,
            bidirectional=self.bidirectional,
            eps=self.norm.eps,
        )
        return self.out_proj(y)


class BiMamba2Mixer(Mamba2Mixer):
    """Mamba-2's mixer in both directions, which share their parameters and are computed in one pass.

    y = ssd(x) + reversed(ssd(reversed(x))), with D x once; the convolution looks both ways, so its width is odd. Tokens
    in reversed order with a reversed convolution give the reversed output: an order and its reverse are one here.

    Args: as :class:`Mamba2Mixer`.
    """

    padding: Padding = "same"
    bidirectional = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 3,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
    ) -> None:
        super().__init__(d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, ngroups=ngroups)


class HydraMixer(nn.Module):
    """Hydra's quasi-separable mixer: two scans that each stop short of their own token, and a diagonal of its own.

    ::

        y_i = C_{i-1} h_{i-1} + C'_{i+1} h'_{i+1} + (fc_D x_i + D) x_i        out_proj(rms_norm(y) silu(z))

    with the states h and h' of a scan from the first token and one from the last, and dt, B and C of each; x and the
    convolution, which looks both ways, are shared. Parameter names are those of goombalab/hydra. The parameters of
    conv1d, fc_D and norm are used, not these modules: hooks on them do not run.
    Source: Hwang et al., "Hydra", arXiv 2407.09941, section 3.

    Args: as :class:`Mamba2Mixer`, with one group.
    """

    def __init__(
        self, d_model: int, *, d_state: int = 64, d_conv: int = 7, expand: float = 2, headdim: int = 64
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        check_sizes(d_model=d_model, d_inner=d_inner, d_state=d_state, d_conv=d_conv, headdim=headdim)
        nheads = d_inner // headdim
        if d_inner % headdim:
            raise ValueError(f"{d_inner} channels cannot be heads of {headdim}")
        wide = d_inner + 4 * d_state  # x, then B and C of each direction
        self.sizes = (d_inner, wide, 2 * nheads)  # of z, of what is convolved, of dt
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(wide, wide, d_conv, groups=wide)
        self.dt_bias = nn.Parameter(torch.empty(nheads))
        self.A_log = nn.Parameter(torch.empty(nheads))
        self.D = nn.Parameter(torch.ones(nheads))
        self.fc_D = nn.Linear(d_inner, nheads, bias=False)
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        init_mamba2(self.A_log, self.dt_bias)
        nn.init.zeros_(self.A_log)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, L, d_model); same shape. Raises ValueError if x has another."""
        check_channels_last(x, "(B, L, C)", self.in_proj.in_features)
        d_inner, wide, _ = self.sizes
        z, xBC, dt = self.in_proj(x).split(self.sizes, -1)
        xBC = depthwise_conv(xBC, self.conv1d.weight, self.conv1d.bias, activation="silu")
        x, *BC = xBC.split((d_inner, *4 * [(wide - d_inner) // 4]), -1)
        D = F.linear(x, self.fc_D.weight) + self.D
        x = x.unflatten(-1, (len(self.D), -1))
        forth, back = (
            (x, dt, B[:, :, None], C[:, :, None]) for dt, B, C in zip(dt.chunk(2, -1), BC[::2], BC[1::2], strict=True)
        )
        y = D[..., None] * x + self._before(*forth) + self._before(*(v.flip(1) for v in back)).flip(1)
        return self.out_proj(norm_gate(y.flatten(-2), z, self.norm.weight, norm="rms", eps=self.norm.eps))

    def _before(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """What each token's predecessor reads from the scan, zeros for the first."""
        y = ssd(x, dt, -torch.exp(self.A_log.float()), B, C, dt_bias=self.dt_bias, dt_softplus=True)
        return F.pad(y, (0, 0, 0, 0, 1, -1))


@torch.no_grad()
def init_mamba2(A_log: Tensor, dt_bias: Tensor, *, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
    """Initialise as Mamba-2 does: A = -U(1, 16), softplus(dt_bias) log-uniform in [dt_min, dt_max]; both (H,)."""
    A_log.uniform_(1, 16).log_()
    dt = torch.empty_like(dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=1e-4)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
