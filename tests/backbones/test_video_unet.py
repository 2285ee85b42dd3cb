from typing import get_args

import pytest
import torch
from torch import nn

from mambavision.backbones.video_unet import (
    Temporal,
    VideoUNet,
    video_unet_b,
    video_unet_debug,
    video_unet_l,
    video_unet_s,
    video_unet_t,
)
from tests import parity

OURS = {"init_conv": "init_conv", "init_temporal": "init_temporal_layer", "time_emb": "time_mlp"}
OURS |= {f"{way}{i}": f"{way}s.{i}.3" for way in ("down", "up") for i in range(4)}
OURS |= {"mid_temporal": "mid_temporal_layer", "mid": "mid_block2"}


def test_it_is_the_published_network():
    fixture = parity.load("svd_unet_bi_s6_v20")
    net = VideoUNet((8, 16, 16), dim=16)
    weights = fixture.weights()
    del weights["time_rel_pos_bias.relative_attention_bias.weight"]  # built there, but used by attention alone
    net.load_state_dict(weights)
    seen = {}
    for key, name in OURS.items():
        net.get_submodule(name).register_forward_hook(lambda module, args, y, key=key: seen.update({key: y}))
    x = fixture.input().requires_grad_()
    out = net.eval()(x, torch.tensor(fixture.meta["timesteps"]))
    # in float64 all are within 1.2e-5 of the fixture; what float32 rounds depends on the CPU, 3.3e-5 on some
    for key, y in seen.items():
        fixture.check(key, y if y.dim() == 2 else y.permute(0, 4, 1, 2, 3), tol=1e-4)
    fixture.check("out", out, tol=1e-4)
    (out * parity.normal(fixture.meta["out_grad_seed"], out.shape)).sum().backward()
    fixture.check("grad_input", x.grad, tol=1e-4)
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    assert norms == pytest.approx(fixture.meta["grad_l2"], rel=1e-3)


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_every_parameter_of_every_form_learns(temporal):
    torch.manual_seed(0)
    net = video_unet_debug((5, 8, 8), in_channels=1, temporal=temporal, num_classes=3)
    x = torch.randn(2, 1, 5, 8, 8)
    y = net(x, torch.tensor([0.0, 1000.0]), torch.tensor([1, 3]))
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_the_arguments_alone_rebuild_it(temporal):
    net = video_unet_debug((4, 16, 16), temporal=temporal, num_classes=2)
    VideoUNet(**net.config).load_state_dict(net.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("temporal", get_args(Temporal))
def test_the_gpu_computes_what_the_cpu_does(temporal, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    net = video_unet_t((20, 16, 16), in_channels=1, temporal=temporal)
    x, t = torch.randn(2, 1, 20, 16, 16), torch.tensor([100.0, 800.0])
    out_gradient = torch.randn_like(x)
    results = []
    for device in ("cpu", "cuda"):
        net.to(device).zero_grad()
        y = net(x.to(device), t.to(device))
        y.backward(out_gradient.to(device))
        gradients = {name: p.grad.cpu().clone() for name, p in net.named_parameters()}  # net.to moves p.grad in place
        results.append({"y": y.detach().cpu()} | gradients)
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm()
        assert error < 1e-3, (name, float(error))


def test_weights_can_be_spread_block_by_block():
    """FSDP gathers a block's weights for its forward alone, and refuses torch's containers."""
    net = video_unet_debug((4, 8, 8), in_channels=1)
    used_inside = []
    for block in net.blocks:
        assert not isinstance(block, nn.ModuleList | nn.ModuleDict)
        for module in block.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_pre_hook(lambda module, args, block=block: used_inside.append(inside[block]))
        block.register_forward_pre_hook(lambda module, args: inside.update({module: True}))
        block.register_forward_hook(lambda module, args, y: inside.update({module: False}))
    inside = dict.fromkeys(net.blocks, False)
    net(torch.randn(1, 1, 4, 8, 8), torch.tensor([500.0]))
    assert used_inside and all(used_inside)


def test_checkpointing_changes_no_gradient():
    x, t, grads = torch.randn(1, 3, 4, 16, 16), torch.tensor([30.0]), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = video_unet_debug((4, 16, 16), temporal="attention", gradient_checkpointing=checkpointing)
        grads.append(torch.autograd.grad(net(x, t).square().sum(), list(net.parameters())))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_any_number_of_frames():
    net = video_unet_debug((4, 16, 16))
    assert net(torch.randn(1, 3, 7, 16, 16), torch.tensor([3.0])).shape == (1, 3, 7, 16, 16)


def test_no_label_is_the_null_class():
    net = video_unet_debug((4, 16, 16), num_classes=4)
    x, t = torch.randn(2, 3, 4, 16, 16), torch.tensor([5.0, 700.0])
    torch.testing.assert_close(net(x, t), net(x, t, torch.tensor([4, 4])))
    assert not torch.allclose(net(x, t)[0], net(x, t, torch.tensor([0, 4]))[0])


@pytest.mark.parametrize("temporal", ["bi_s4d", "bi_s6", "attention", "linear_attention"])
def test_autocast_stays_close_to_float32(temporal):
    torch.manual_seed(0)
    net = video_unet_debug((4, 16, 16), temporal=temporal)
    x, t = torch.randn(1, 3, 4, 16, 16), torch.tensor([300.0])
    expected = net(x, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x, t)
    assert y.dtype == x.dtype and (y - expected).std() < 0.03 * expected.std()


def test_compiles_into_one_graph():
    net = VideoUNet((3, 4, 4), in_channels=1, dim=8, dim_mults=(1,), d_state=2, heads=1)
    x, t = torch.randn(1, 1, 3, 4, 4), torch.tensor([3.0])
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t), net(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "millions"), [(video_unet_t, 3.22), (video_unet_s, 15.0), (video_unet_b, 57.5), (video_unet_l, 175.4)]
)
def test_sizes(build, millions):
    with torch.device("meta"):
        net = build((64, 32, 32))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(temporal="lstm"), "temporal must be one of bi_s4d, .*, got 'lstm'"),
        (dict(input_size=(32, 32)), "frames, height and width"),
        (dict(input_size=(8, 20, 32)), "20x32 pixels: both sides must be multiples of 8"),
        (dict(input_size=(0, 32, 32)), "at least 1 each"),
        (dict(dim=20), "divisible into 8 groups, got 20"),
        (dict(dim=9, groups=3), "dim must be even"),
        (dict(temporal="rotary_attention", head_dim=5), "head_dim must be even"),
        (dict(dim_mults=()), r"dim_mults must name at least one level, .* got \[\]"),
        (dict(dim_mults=(1, 0)), r"each at least 1, got \[1, 0\]"),
        (dict(num_classes=-1), "num_classes must be at least 0, .* got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoUNet(**dict(input_size=(8, 16, 16), dim=16) | arguments)


def test_bad_inputs_are_refused():
    net = video_unet_debug((4, 16, 16))
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.randn(1, 3, 4, 15, 16), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="num_classes=0"):
        net(torch.randn(1, 3, 4, 16, 16), torch.tensor([0.0]), torch.tensor([1]))
