"""Selective scans: the shape contract, the choice of implementation, autograd and torch.library registration."""

from mambavision.ops.dispatch import Backend, describe_backends, use_backend
from mambavision.ops.multi_scan import multi_scan
from mambavision.ops.orders import OrderTable, Preset, ScanOrder, order_table, scan_order
from mambavision.ops.selective_scan import selective_scan
from mambavision.ops.ssd import Diagonal, SSDBackend, noncausal_ssd, ssd

__all__ = [
    "Backend",
    "Diagonal",
    "OrderTable",
    "Preset",
    "SSDBackend",
    "ScanOrder",
    "describe_backends",
    "multi_scan",
    "noncausal_ssd",
    "order_table",
    "scan_order",
    "selective_scan",
    "ssd",
    "use_backend",
]
