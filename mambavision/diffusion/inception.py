"""The Inception of papers' FID: the network of 2015 that was trained with TensorFlow, from its weights for PyTorch.

They are torchvision's Inception v3 with 1008 outputs and other pools. What is computed before the first layer is as in
the graph of TensorFlow: the resizing of its first versions, and (x - 128) / 128.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
FIRST = "Conv2d_1a_3x3.conv.weight"
"""Whether a state dict has this tensor tells whether it is an Inception v3."""

_AVERAGED = ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b")


class _Pooled(nn.Module):
    """A block of torchvision whose last branch pools in another way.

    Args:
        block: Its output ends in the channels of ``block.branch_pool``.
        pool: In place of the block's.
    """

    def __init__(self, block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x: Tensor) -> Tensor:
        branch = self.block.branch_pool(self.pool(x))
        return torch.cat([self.block(x)[:, : -branch.shape[1]], branch], 1)


class Inception2015(nn.Module):
    """uint8 pictures (B, 3, H, W), RGB, to the 2048 features (B, 2048) before the last layer.

    Args:
        state: Its tensors, named as by pytorch-fid and torch-fidelity (weights-inception-2015-12-05-6726825d.pth).

    Raises:
        ValueError: If these are not its tensors.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        import torchvision  # seconds

        super().__init__()
        outputs = len(state.get("fc.weight", ()))
        if outputs != 1008:
            raise ValueError(
                f"an Inception v3 of {outputs} outputs: that of the FID, trained in 2015, has 1008; torchvision's own "
                "gives other distances"
            )
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        try:
            net.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ValueError(str(error).partition("\n")[2].strip() or str(error)) from error
        for name in _AVERAGED:  # TensorFlow's mean leaves the padding out
            _replace(net, name, lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        _replace(net, "7c", lambda x: F.max_pool2d(x, 3, stride=1, padding=1))  # the graph's, though its paper averages
        net.fc = nn.Identity()
        self.net = net.eval()

    def forward(self, batch: Tensor) -> Tensor:
        return self.net((resized(batch.float(), SIDE) - 128) / 128)


def _replace(net: nn.Module, name: str, pool: Callable[[Tensor], Tensor]) -> None:
    setattr(net, f"Mixed_{name}", _Pooled(getattr(net, f"Mixed_{name}"), pool))


def resized(x: Tensor, side: int) -> Tensor:
    """Pictures (B, C, H, W) at (side, side), bilinear as TensorFlow 1's: pixel i from place i * H / side.

    Args:
        x: Floats.
        side: Pixels.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=x.device) * (length / side)
        first = place.long()
        part = (place - first).view([-1 if i == dim else 1 for i in range(4)])
        low, high = x.index_select(dim, first), x.index_select(dim, (first + 1).clamp_max(length - 1))
        x = low + (high - low) * part
    return x
