"""Mamba mixers of token sequences. B batch, L tokens, D d_inner, N d_state, R dt_rank."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers.ssm import SSMInit, check_channels_last, check_sizes, init_mamba, ssm_scan, two_linear
from mambavision.ops import depthwise_conv, norm_gate


class MambaMixer(nn.Module):
    """Mamba-1 block: out_proj(ssm(silu(conv1d(x))) * silu(z)) with [x, z] = in_proj(input), causal in its tokens.

    Parameter names are those of state-spaces/mamba, so that its checkpoints load. Parameters are used, not the modules
    that hold them (but out_proj): hooks on these do not run.
    Source: Gu and Dao, "Mamba", arXiv 2312.00752, figure 3.

    Args:
        d_model: channels of input and output.
        d_state: N, states per channel.
        d_conv: width of the causal convolution.
        expand: D = expand * d_model.
        dt_rank: R; None is ceil(d_model / 16).
        conv_bias, bias: whether the convolution and the two outer projections have a bias.
        init: sets A_log, D and dt_proj.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        init: SSMInit = init_mamba,
    ) -> None:
        super().__init__()
        d_inner = int(expand * d_model)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        check_sizes(d_model=d_model, d_inner=d_inner, dt_rank=dt_rank, d_state=d_state, d_conv=d_conv)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        init(self.A_log, self.D, self.dt_proj.weight, self.dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, L, d_model); same shape. Raises ValueError if x has another."""
        check_channels_last(x, "(B, L, C)", self.in_proj.in_features)
        x, z = two_linear(x, self.in_proj)
        y = mamba_direction(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        return self.out_proj(norm_gate(y, z))


class BiMambaMixer(MambaMixer):
    """Vim's bidirectional mixer: a second convolution and SSM run from the last token to the first; same x and z.

    Output: out_proj((forward + backward) / 2 * silu(z)); of out_proj too only the parameters are used. Parameter names
    are those of hustvl/Vim's bimamba v2 (a second set with the suffix `_b`). Source: Zhu et al., "Vision Mamba", arXiv
    2401.09417, algorithm 1.

    Args: as :class:`MambaMixer`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        init: SSMInit = init_mamba,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            conv_bias=conv_bias,
            bias=bias,
            init=init,
        )
        d_inner, dt_rank = self.dt_proj.weight.shape
        self.conv1d_b = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias)
        self.x_proj_b = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj_b = nn.Linear(dt_rank, d_inner)
        self.A_b_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D_b = nn.Parameter(torch.empty(d_inner))
        init(self.A_b_log, self.D_b, self.dt_proj_b.weight, self.dt_proj_b.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, L, d_model); same shape. Raises ValueError if x has another."""
        check_channels_last(x, "(B, L, C)", self.in_proj.in_features)
        x, z = two_linear(x, self.in_proj)
        y = mamba_direction(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        y_b = mamba_direction(x, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        return F.linear(norm_gate(y + y_b, z), self.out_proj.weight / 2, self.out_proj.bias)


def mamba_direction(
    x: Tensor,
    conv1d: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """One direction of a mixer: ssm(silu(conv1d(x))) of x (B, L, D) with the conv and SSM looking back, or ahead."""
    padding = "future" if reverse else "past"
    x = depthwise_conv(x, conv1d.weight, conv1d.bias, padding=padding, activation="silu")
    return ssm_scan(
        x,
        x_proj.weight[None],
        dt_proj.weight[None],
        dt_proj.bias[None],
        A_log[None],
        D[None],
        orders=("row_reverse" if reverse else "row",),
        grid=(1, x.shape[1]),
    )
