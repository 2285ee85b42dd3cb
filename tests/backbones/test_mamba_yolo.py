import pytest
import torch
from torch import nn

from mambavision.backbones.mamba_yolo import (
    SPPF,
    LSBlock,
    MambaYOLOBackbone,
    MambaYOLOPAFPN,
    ODSSBlock,
    RGBlock,
    SimpleStem,
    VisionClueMerge,
    XSSBlock,
)
from tests.parity import check_module, load, normal

RENAMED = {
    "proj_conv.conv.": "proj_conv.0.",
    "proj_conv.bn.": "proj_conv.1.",
    "in_proj.conv.": "in_proj.0.",
    "in_proj.bn.": "in_proj.1.",
    "norm.": "norm.norm.",
    "norm2.": "norm2.norm.",
}
BLOCKS = {
    "myolo_block_lsblock_d32": lambda: LSBlock(32),
    "myolo_block_rgblock_d32": lambda: RGBlock(32),
    "myolo_block_simplestem_3_32": lambda: SimpleStem(32),
    "myolo_block_vssblock_24_32": lambda: ODSSBlock(24, 32, local=True),
    "myolo_block_xssblock_48_32_n2": lambda: XSSBlock(48, 32, 2, local=True),
}


class OfficialNames(nn.Module):
    """A block whose parameters are listed under their official names, written out by hand for these tests."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def official(self, name: str) -> str:
        for ours, theirs in RENAMED.items():
            if name.startswith(ours) and not isinstance(self.block, LSBlock):
                return name.replace(ours, theirs, 1)
        return name

    def named_parameters(self, *args, **kwargs):
        return ((self.official(k), v) for k, v in self.block.named_parameters(*args, **kwargs))

    def load(self, weights: dict[str, torch.Tensor]) -> "OfficialNames":
        own = self.block.state_dict()
        assert sorted(weights) == sorted(self.official(k) for k in own)
        self.block.load_state_dict({k: weights[self.official(k)].reshape(v.shape) for k, v in own.items()})
        return self

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_blocks_are_the_published_ones(name, memory_format):
    fixture = load(name)
    block = OfficialNames(BLOCKS[name]()).load(fixture.weights())
    x = fixture.input().contiguous(memory_format=memory_format)
    check_module(fixture, block, x=x, tol=1e-5, grad_tol=5e-5)


def test_vision_clue_merge_is_the_published_one():
    fixture = load("myolo_block_visionclue_32_64")
    w = fixture.weights()
    merge = VisionClueMerge(32, 64)
    names = {"conv.weight": "pw_linear.0.weight", "conv.bias": "pw_linear.0.bias"}
    names |= {f"bn.{k}": f"pw_linear.1.{k}" for k in merge.bn.state_dict()}
    state = {ours: w[theirs] for ours, theirs in names.items()}
    subgrids = state["conv.weight"].reshape(64, 2, 2, 32)  # (out, column parity, row parity, in)
    state["conv.weight"] = subgrids.permute(0, 3, 2, 1)
    merge.load_state_dict(state)

    x = fixture.input().requires_grad_()
    out = merge.eval()(x)
    fixture.check("out", out, tol=1e-5)
    seed = fixture.meta["out_grad_seed"]
    (out * normal(seed, out.shape)).sum().backward()
    fixture.check("grad_input", x.grad, tol=5e-5)
    grad = merge.conv.weight.grad.permute(0, 3, 2, 1).reshape(64, 128, 1, 1)
    fixture.check("grad.pw_linear.0.weight", grad, tol=5e-5)
    fixture.check("out_train", merge.train()(x), tol=1e-5)
