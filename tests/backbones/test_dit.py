import pytest
import torch

from mambavision.backbones import dit
from mambavision.backbones.dim import dim_debug
from mambavision.backbones.dit import DiT, dit_debug
from mambavision.engine.flops import count_flops
from tests.backbones.test_dim import awake, inputs, millions


@pytest.mark.parametrize("size, published", [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_parameters_are_the_published_ones(size, published):
    """Table 1 of arXiv 2212.09748 counts a predicted variance: twice the output channels."""
    with torch.device("meta"):
        net = getattr(dit, f"dit_{size}")((32, 32), num_classes=1000)
    variance = sum(p.numel() for p in net.final.linear.parameters()) / 1e6
    assert millions(net) + variance == pytest.approx(published, abs=0.51)


def test_macs_are_the_published_ones():
    """6.06 G for DiT-S/2 at 256 tokens, attention counted (arXiv 2212.09748, table 4)."""
    net = dit.dit_s((32, 32), num_classes=1000)
    x, t, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    assert count_flops(lambda: net(x, t, labels)) / 2e9 == pytest.approx(6.06, rel=5e-3)


def test_untrained_output_is_zero():
    assert not dit_debug((8, 8), num_classes=10)(*inputs()).any()


@pytest.mark.parametrize("size", [(8, 8), (3, 8, 8)])
def test_every_parameter_learns_in_bfloat16(size):
    net = awake(dit_debug(size, num_classes=10, positions="learned")).bfloat16()
    x, t, labels = inputs(size)
    y = net(x.bfloat16(), t, labels)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_tokens_in_any_order_give_the_same():
    """Attention knows no order: permuted tokens with permuted positions are the permuted output."""
    net = awake(dit_debug((8, 8)))
    h, c, order = torch.randn(2, 16, 32), torch.randn(2, 32), torch.randperm(16)
    torch.testing.assert_close(net.blocks[0](h[:, order], c), net.blocks[0](h, c)[:, order])


def test_it_differs_from_dim_in_its_blocks_alone():
    one, other = dit_debug((8, 8), num_classes=10), dim_debug((8, 8), num_classes=10)

    def around(net):
        return {name: tuple(v.shape) for name, v in net.state_dict().items() if not name.startswith("blocks.")}

    assert around(one) == around(other)


def test_checkpointing_changes_no_gradient():
    net = awake(dit_debug((8, 8), num_classes=10))
    grads = []
    for net.gradient_checkpointing in (False, True):
        grads.append(torch.autograd.grad(net(*inputs()).square().sum(), list(net.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_its_config_builds_it_again():
    net = awake(dit_debug((3, 8, 8), num_classes=3, positions="learned"))
    twin = DiT(**net.config)
    twin.load_state_dict(net.state_dict())
    x, t, _ = inputs((3, 8, 8))
    assert torch.equal(twin(x, t), net(x, t))


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="32 is not divisible by 5"):
        dit_debug((8, 8), nheads=5)
    with pytest.raises(ValueError, match="num_classes must be at least 0, .* got -1"):
        dit_debug((8, 8), num_classes=-1)
    with pytest.raises(ValueError, match=r"got \(2, 4, 8, 16\)"):
        dit_debug((8, 8))(torch.zeros(2, 4, 8, 16), torch.zeros(2))


@pytest.mark.parametrize("name", sorted(name for name in vars(dit) if name.startswith("dit_")))
def test_options_go_before_what_a_size_has(name):
    net = getattr(dit, name)((8, 8), d_model=48, depth=1, nheads=3)
    assert net.config | dict(d_model=48, depth=1, nheads=3) == net.config


def test_compile_in_one_graph():
    net = awake(dit_debug((4, 4), num_classes=10))
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs((4, 4))), net(*inputs((4, 4))))
