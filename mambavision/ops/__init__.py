"""Selective scans: the shape contract, the choice of implementation, autograd and torch.library registration."""

from mambavision.ops.conv_ssd import conv_ssd
from mambavision.ops.depthwise_conv import Activation, Padding, depthwise_conv
from mambavision.ops.dispatch import Backend, describe_backends, use_backend
from mambavision.ops.multi_scan import multi_scan
from mambavision.ops.norm_gate import norm_gate
from mambavision.ops.orders import OrderTable, Preset, ScanOrder, order_table, scan_order
from mambavision.ops.projected_scan import projected_scan
from mambavision.ops.selective_scan import selective_scan
from mambavision.ops.ssd import Diagonal, SSDBackend, noncausal_ssd, ssd

__all__ = [
    "Activation",
    "Backend",
    "Diagonal",
    "OrderTable",
    "Padding",
    "Preset",
    "SSDBackend",
    "ScanOrder",
    "conv_ssd",
    "depthwise_conv",
    "describe_backends",
    "multi_scan",
    "noncausal_ssd",
    "norm_gate",
    "order_table",
    "projected_scan",
    "scan_order",
    "selective_scan",
    "ssd",
    "use_backend",
]
