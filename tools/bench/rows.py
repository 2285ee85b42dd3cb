"""The workloads, by name."""

from bench.scan import MultiScan, SelectiveScan
from bench.ssd import BidirectionalSSD

Row = MultiScan | SelectiveScan | BidirectionalSSD

CPU_ROWS: dict[str, Row] = {
    "384x196": SelectiveScan(1, 384, 196, 16),
    "256x1600": SelectiveScan(1, 256, 1600, 16),
    "96x16384": SelectiveScan(1, 96, 16384, 16),
    "cross": MultiScan(1, 384, (14, 14), 16),
}
CUDA_ROWS: dict[str, Row] = {
    "vmamba-t": MultiScan(64, 192, (56, 56), 1),
    "yolo-p2": MultiScan(16, 128, (160, 160), 16),
    "yolo-p3": MultiScan(16, 256, (80, 80), 16),
    "yolo-p5": MultiScan(1, 512, (20, 20), 16),
    "dim-256": MultiScan(64, 2304, (16, 16), 16, "unidirectional"),
    "dim-1024": MultiScan(8, 2304, (64, 64), 16, "unidirectional"),
    "serpent": MultiScan(1, 96, (512, 512), 16),
    "serpent-slow": MultiScan(1, 96, (512, 512), 16, slow=True),
    "serpent-next": MultiScan(1, 192, (256, 256), 16),
    "drop-in": SelectiveScan(64, 768, 3136, 1, 4),
    "ssd-64x256": BidirectionalSSD(64, 256),
    "ssd-16x1024": BidirectionalSSD(16, 1024),
    "ssd-4x4096": BidirectionalSSD(4, 4096),
    "ssd-1x16384": BidirectionalSSD(1, 16384),
    "ssd-64x196": BidirectionalSSD(64, 196),
    "ssd-64x197": BidirectionalSSD(64, 197),
    "ssd-4x3136": BidirectionalSSD(4, 3136),
}
ROWS = {"cpu": CPU_ROWS, "cuda": CUDA_ROWS}
FIRST_CALLS: dict[str, Row] = {"multi_scan": CUDA_ROWS["yolo-p5"], "ssd": BidirectionalSSD(1, 1024)}
