"""FLOPs and multiply-accumulates of a network, the selective scan counted."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import mambavision.ops  # noqa: F401  registers the scan


def scan_flops(x: list[int], delta: list[int], A: list[int], *_, **__) -> int:
    """9 B L K D N for the recurrence (VMamba's rule)."""
    batch, length, K, channels = delta
    return 9 * batch * length * K * channels * A[-1]


def attention_flops(query: list[int], key: list[int], value: list[int], *_, **__) -> int:
    """Two products: torch counts those of a GPU's attention, not of the CPU's."""
    return sdpa_flop_count(query, key, value)


_RULES = {
    torch.ops.mambavision.scan: scan_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
}


@torch.inference_mode()
def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of convolutions, products, attention and scans in one call, two for a multiply-accumulate.

    Those of the definition where the tensors are on the CPU: a GPU's joined products multiply zeros too.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_RULES)
    with counter:
        call()
    return counter.get_total_flops()


def count_macs(net: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates of a restoration network on one picture of `size` (H, W): half of its FLOPs.

    The network runs once, and must be on the CPU, where the products are those of the definition.
    """
    device = next(net.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"count_macs needs a network on the CPU, got one on {device}")
    x: Tensor = torch.zeros(1, net.config["in_channels"], *size)
    training = net.training
    flops = count_flops(lambda: net.eval()(x))
    net.train(training)
    return flops // 2
