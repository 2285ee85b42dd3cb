"""The 2-D selective scan of VMamba and Mamba-YOLO."""

import math

from torch import Tensor, nn

from mambavision.layers.ssm import (
    Orders,
    SelectiveSSM,
    SSMInit,
    check_channels_last,
    check_sizes,
    init_mamba,
    two_linear,
)
from mambavision.ops import Activation, depthwise_conv, norm_gate


class SS2D(SelectiveSSM):
    """Mix the pixels of an image (B, H, W, C) by selective scans along its rows and columns, both ways.

    ::

        x = act(conv2d(in_proj_x(input)))    z = act(in_proj_z(input))
        output = out_proj(out_norm(sum over scans of ssm_k(x)) * z)

    Without the gate z: out_proj(out_norm(...)). Parameter names are those of VMamba and Mamba-YOLO. VMamba's SS2D v0 is
    the default; its "v05_noz" is gated=False; Mamba-YOLO's has act_layer=nn.GELU, init=init_mamba_yolo.
    The parameters of in_proj, conv2d and out_norm are used, not these modules: hooks on them do not run.
    Source: Liu et al., "VMamba", arXiv 2401.10166, section 4.2; Wang et al., "Mamba YOLO", arXiv 2406.05835.

    Args:
        d_model: channels C of input and output.
        d_state: N, states per channel.
        expand: d_inner = expand * d_model.
        dt_rank: R; None is ceil(d_model / 16).
        d_conv: width of the depth-wise convolution, odd.
        conv_bias, bias: whether the convolution and the two outer projections have a bias.
        gated: whether z exists.
        act_layer: activation of x and z.
        orders: K scan orders, see :class:`SelectiveSSM`.
        init: sets A_logs, Ds, dt_projs_weight and dt_projs_bias.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: float = 2,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        gated: bool = True,
        act_layer: type[nn.Module] = nn.SiLU,
        orders: Orders = "cross",
        init: SSMInit = init_mamba,
    ) -> None:
        check_sizes(d_model=d_model, d_conv=d_conv)
        d_inner = int(expand * d_model)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        super().__init__(d_inner, dt_rank, d_state=d_state, orders=orders, init=init)
        self.in_proj = nn.Linear(d_model, 2 * d_inner if gated else d_inner, bias=bias)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, bias=conv_bias)
        self.act = act_layer()
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, H, W, C); same shape. The permuted view of a channels_last image is not copied.

        Raises:
            ValueError: If x has another layout or number of channels.
        """
        check_channels_last(x, "(B, H, W, C)", self.in_proj.in_features)
        x, z = two_linear(x, self.in_proj) if self.gated else (self.in_proj(x), None)
        activation = _fused(self.act)
        x = depthwise_conv(x, self.conv2d.weight, self.conv2d.bias, activation=activation)
        if activation is None:
            x, z = self.act(x), None if z is None else self.act(z)
        y = super().forward(x.flatten(1, 2), x.shape[1:3]).view_as(x)
        norm = self.out_norm
        return self.out_proj(norm_gate(y, z, norm.weight, norm.bias, activation=activation, eps=norm.eps))


def _fused(act: nn.Module) -> Activation | None:
    """The name under which operators know an activation, if they do."""
    if type(act) is nn.SiLU:
        return "silu"
    return "gelu" if type(act) is nn.GELU and act.approximate == "none" else None
