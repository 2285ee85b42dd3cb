import pytest
import torch
from torch import nn

from mambavision.backbones.mamba_yolo import (
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
    check_module(fixture, block, x=x, tol=1e-5, grad_tol=1e-4)


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
    fixture.check("grad_input", x.grad, tol=1e-4)
    grad = merge.conv.weight.grad.permute(0, 3, 2, 1).reshape(64, 128, 1, 1)
    fixture.check("grad.pw_linear.0.weight", grad, tol=1e-4)
    fixture.check("out_train", merge.train()(x), tol=1e-5)


@pytest.mark.parametrize("variant", ["released", "aaai"])
def test_features_have_strides_8_16_32_on_a_wide_image(variant):
    backbone, neck = MambaYOLOBackbone("debug", variant), MambaYOLOPAFPN("debug", variant)
    out = neck(backbone(torch.rand(2, 3, 64, 96)))
    assert [tuple(p.shape) for p in out] == [(2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]
    assert backbone.out_channels == neck.out_channels == (16, 24, 32)
    sum(p.square().mean() for p in out).backward()
    silent = [n for m in (backbone, neck) for n, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(n.endswith("bias") for n in silent), silent  # a bias in front of BatchNorm has no effect


@pytest.mark.parametrize("height", [33, 48])
def test_image_that_is_no_multiple_of_32_is_refused(height):
    with pytest.raises(ValueError, match=f"multiples of 32, got {height} x 64"):
        MambaYOLOBackbone("debug")(torch.rand(1, 3, height, 64))


def test_odd_image_is_not_merged():
    with pytest.raises(ValueError, match="even height and width, got 5 x 6"):
        VisionClueMerge(4, 8)(torch.rand(1, 4, 5, 6))


@pytest.mark.parametrize(("size", "variant"), [("s", "aaai"), ("t", "v2")])
def test_unknown_size_or_variant_is_refused(size, variant):
    with pytest.raises(ValueError, match="must be"):
        MambaYOLOBackbone(size, variant)


def test_batch_norms_have_the_constants_of_the_whole_model():
    norms = [m for m in MambaYOLOPAFPN("debug").modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype):
    torch.manual_seed(0)
    backbone = MambaYOLOBackbone("debug", "released").eval()
    x = torch.rand(1, 3, 64, 64)
    expected = backbone(x)[1]
    with torch.autocast("cpu", dtype=dtype):
        out = backbone(x)[1]
    out.float().sum().backward()
    assert (out - expected).abs().max() < 0.1 * expected.std()
    assert all(p.grad is None or (p.grad.isfinite().all() and p.grad.dtype == p.dtype) for p in backbone.parameters())
