"""The selective state-space model over tokens in any scan orders, and the published ways to initialise it.

B batch, L tokens, D d_inner, N d_state, K scans, R dt_rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.ops import OrderTable, Preset, ScanOrder, projected_scan
from mambavision.ops.orders import PRESETS

Orders = Preset | Sequence[ScanOrder | Tensor] | OrderTable
SSMInit = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Sets, in place, A_log (..., N), D, dt_weight (..., R) and dt_bias."""


@torch.no_grad()
def init_mamba(
    A_log: Tensor,
    D: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    *,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    dt_init_floor: float = 1e-4,
    dt_scale: float = 1.0,
) -> None:
    """Initialise as Mamba does: S4D-real A = -(1..N), D = 1, softplus(dt_bias) log-uniform in [dt_min, dt_max].

    Shapes: A_log (..., N), D any, dt_weight (..., R), dt_bias any. Also VMamba's "v0".
    Source: Gu and Dao, "Mamba", arXiv 2312.00752, section 3.6.
    """
    A_log.copy_(torch.arange(1, A_log.shape[-1] + 1, dtype=A_log.dtype, device=A_log.device).log().expand_as(A_log))
    D.fill_(1)
    bound = dt_scale * dt_weight.shape[-1] ** -0.5
    dt_weight.uniform_(-bound, bound)
    dt = torch.empty_like(dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_init_floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@torch.no_grad()
def init_mamba_yolo(A_log: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Initialise as Mamba-YOLO's code does: A = -1 for every state, D = 1, dt_weight and dt_bias ~ N(0, 1)."""
    A_log.zero_()
    D.fill_(1)
    dt_weight.normal_()
    dt_bias.normal_()


@torch.no_grad()
def init_vmamba_v1(A_log: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Initialise as VMamba's "v1": A_log ~ N(0, 1), D = 1, dt_weight and dt_bias ~ 0.1 N(0, 1)."""
    A_log.normal_()
    D.fill_(1)
    dt_weight.normal_(std=0.1)
    dt_bias.normal_(std=0.1)


@torch.no_grad()
def init_vmamba_v2(A_log: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Initialise as VMamba's "v2": A = -1 for every state, D = 1, dt_weight and dt_bias ~ 0.1 U(0, 1)."""
    A_log.zero_()
    D.fill_(1)
    dt_weight.uniform_(0, 0.1)
    dt_bias.uniform_(0, 0.1)


def ssm_scan(
    x: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    orders: Orders,
    grid: tuple[int, ...],
) -> Tensor:
    """Project the tokens x to delta, B and C and scan them in K orders; return the sum over the orders.

    Every token is projected once: a projection of single tokens does not depend on their order.

    Shapes: x (B, L, D), x_proj (K, R + 2N, D), dt_weight (K, D, R), dt_bias (K, D), A_log (K, D, N), D (K, D).
    Returns (B, L, D), in image order and x's dtype.
    """
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    return projected_scan(x, x_proj, dt_weight, A, D, orders=orders, grid=grid, delta_bias=dt_bias)


def check_channels_last(x: Tensor, layout: Literal["(B, L, C)", "(B, H, W, C)"], channels: int) -> None:
    """Raise ValueError if x is not of this layout, with so many channels C."""
    if x.ndim != (4 if "H" in layout else 3) or x.shape[-1] != channels:
        raise ValueError(f"the input must be channels-last {layout} with C = {channels}, got {tuple(x.shape)}")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError if one of a layer's sizes, by name, is not 1 or more."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def two_linear(x: Tensor, projection: nn.Linear) -> tuple[Tensor, Tensor]:
    """The two halves of projection(x), as two products: the gradients of the halves need not be copied together."""
    weights = projection.weight.chunk(2)
    biases = (None, None) if projection.bias is None else projection.bias.chunk(2)
    return F.linear(x, weights[0], biases[0]), F.linear(x, weights[1], biases[1])


class SelectiveSSM(nn.Module):
    """Selective scans of channels-last tokens in K orders, each with its own parameters, summed in image order.

    For scan k, with i the token visited at step t::

        [dt, B, C] = x_proj_k x_i      delta = softplus(dt_projs_k dt + bias_k)
        h_t = exp(delta A_k) h_{t-1} + delta B x_i      y_i += C . h_t + D_k x_i

    Parameters carry VMamba's names: x_proj_weight (K, R + 2N, D), dt_projs_weight (K, D, R), dt_projs_bias (K, D),
    A_logs (K D, N), Ds (K D).

    Args:
        d_inner: channels D.
        dt_rank: R, rank of the projection to delta.
        d_state: N, states per channel.
        orders: K scan orders as :func:`mambavision.ops.multi_scan` takes them: "unidirectional", "bidirectional",
            "cross", or a sequence of K names or permutations.
        init: sets A_log, D and the projection to delta, for instance :func:`init_mamba`.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        d_inner: int,
        dt_rank: int,
        *,
        d_state: int = 16,
        orders: Orders = "cross",
        init: SSMInit = init_mamba,
    ) -> None:
        super().__init__()
        check_sizes(d_inner=d_inner, dt_rank=dt_rank, d_state=d_state)
        num_scans = _count(orders)
        self.orders = orders
        self.x_proj_weight = nn.Parameter(torch.empty(num_scans, dt_rank + 2 * d_state, d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(num_scans, d_inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(num_scans, d_inner))
        self.A_logs = nn.Parameter(torch.empty(num_scans * d_inner, d_state))
        self.Ds = nn.Parameter(torch.empty(num_scans * d_inner))
        nn.init.uniform_(self.x_proj_weight, -(d_inner**-0.5), d_inner**-0.5)  # as nn.Linear
        init(self.A_logs, self.Ds, self.dt_projs_weight, self.dt_projs_bias)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Scan x (B, L, D), whose tokens lie on `grid` (H, W) or (T, H, W) in row-major order; return (B, L, D)."""
        K = len(self.x_proj_weight)
        return ssm_scan(
            x,
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs.unflatten(0, (K, -1)),
            self.Ds.unflatten(0, (K, -1)),
            orders=self.orders,
            grid=grid,
        )


def _count(orders: Orders) -> int:
    if isinstance(orders, OrderTable):
        return len(orders.index)
    return len(PRESETS.get(orders, (orders,)) if isinstance(orders, str) else orders)
