import re
from collections import defaultdict

import pytest
import torch

from mambavision.backbones import dim, dit
from mambavision.backbones.dim import CYCLES, DiM, dim_debug, layer_sequences
from mambavision.engine.flops import count_flops
from mambavision.ops import scan_order
from tests.parity import load

MIXERS = ("mamba", "ssd")


def awake(net):
    """With no layer of zeros."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return net


def inputs(size=(8, 8), batch=2):
    torch.manual_seed(2)
    return torch.randn(batch, 4, *size), torch.tensor([3.0, 997.0][:batch]), torch.tensor([0, 10][:batch])


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "size, once, twice", [("s", 17.8, 35.7), ("b", 69.3, 138.6), ("l", 245, 489), ("xl", 360, 720)]
)
def test_parameters_of_the_blocks(size, once, twice):
    """Counts of the Vim block under adaLN, from shared/reference/diffusion.md 1.3."""
    with torch.device("meta"):
        for name, expected in ((f"dim_{size}", once), (f"dim_{size}_2x", twice)):
            net = getattr(dim, name)((32, 32), mixer="mamba", positions="learned")
            assert millions(net.blocks) == pytest.approx(expected, rel=4e-3)


def test_macs_with_256_tokens():
    """3.5 G of the Vim blocks of S (shared/reference/diffusion.md 1.3), the scan counted as 9 FLOPs a state."""
    net = dim.dim_s((32, 32), mixer="mamba")
    assert count_flops(lambda: net(torch.zeros(1, 4, 32, 32), torch.zeros(1))) / 2e9 == pytest.approx(3.5, rel=0.015)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_iso_parameter_sizes_have_dits_parameters(size, mixer):
    with torch.device("meta"):
        twin = millions(getattr(dit, f"dit_{size}")((32, 32)))
        for name in (f"dim_{size}_2x", f"dim_{size}_mlp"):
            assert millions(getattr(dim, name)((32, 32), mixer=mixer)) == pytest.approx(twin, rel=0.12)


@pytest.mark.parametrize("mixer", MIXERS)
def test_untrained_output_is_zero_and_blocks_are_the_identity(mixer):
    net = dim_debug((8, 8), num_classes=10, mixer=mixer)
    assert not net(*inputs()).any()
    x = torch.randn(2, 16, 32)
    assert torch.equal(net.blocks[0](x, torch.randn(2, 32)), x)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size, orders, mlp", [((8, 8), "zigzag", 0), ((3, 8, 8), "factorised", 2)])
def test_every_parameter_learns_in_bfloat16(mixer, size, orders, mlp):
    net = dim_debug(size, num_classes=10, mixer=mixer, orders=orders, depth=3, positions="learned", mlp_ratio=mlp)
    net = awake(net).bfloat16()
    x, t, labels = inputs(size)
    y = net(x.bfloat16(), t, labels)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("orders", ["cross", "zigzag", "hilbert", ["col", "col", "serpentine"]])
def test_orders_are_explicit_permutations(mixer, orders):
    net = awake(dim_debug((8, 8), mixer=mixer, orders=orders, depth=5))
    cycle = CYCLES.get(orders) if isinstance(orders, str) else orders
    x, t, _ = inputs()
    c = net.condition(t, None)
    h = net.embed(dim.patchify(x, 2)) + net.positions
    for i, block in enumerate(net.blocks):
        order = scan_order(cycle[i % len(cycle)], (4, 4))
        h = h.index_copy(1, order, block(h[:, order], c))
    y, expected = net(x, t), dim.unpatchify(net.final(h, c), 2, (8, 8))
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    grads = [torch.autograd.grad((v * weight).sum(), list(net.parameters())) for v in (y, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_factorised_video_is_frames_then_positions(mixer):
    net = awake(dim_debug((3, 4, 6), mixer=mixer, orders="factorised", depth=3))
    x, t, _ = inputs((3, 4, 6))
    c = net.condition(t, None)
    h = (net.embed(dim.patchify(x, 2)) + net.positions).view(2, 3, 2, 3, 32)
    rows, columns, times = net.blocks
    h = rows(h.flatten(0, 1).flatten(1, 2), c.repeat_interleave(3, 0)).view_as(h)
    turned = h.transpose(2, 3).reshape(6, 6, 32)
    h = columns(turned, c.repeat_interleave(3, 0)).view(2, 3, 3, 2, 32).transpose(2, 3)
    pixels = h.permute(0, 2, 3, 1, 4).reshape(12, 3, 32)
    h = times(pixels, c.repeat_interleave(6, 0)).view(2, 2, 3, 3, 32).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(net(x, t), dim.unpatchify(net.final(h.flatten(1, 3), c), 2, (3, 4, 6)))


def test_flattened_video_is_one_long_sequence():
    video, image = (awake(dim_debug(size, orders="raster")) for size in ((3, 4, 4), (12, 4)))
    image.load_state_dict(video.state_dict())
    image.positions = video.positions
    x, t, _ = inputs((3, 4, 4))
    torch.testing.assert_close(video(x, t).flatten(2, 3), image(x.flatten(2, 3), t))


def test_sequences_of_a_layer():
    order, count = layer_sequences("pixel_time", (2, 1, 3))
    assert (order.tolist(), count) == ([0, 3, 1, 4, 2, 5], 3)
    order, count = layer_sequences("frame_col", (2, 2, 2))
    assert (order.tolist(), count) == ([0, 2, 1, 3, 4, 6, 5, 7], 2)
    assert layer_sequences("hilbert", (2, 2))[1] == 1
    for order in ("frame_row", "pixel_time"):
        with pytest.raises(ValueError, match="T, H, W"):
            layer_sequences(order, (4, 4))


@pytest.mark.parametrize("side", [4, 8])
def test_zigzag_is_the_cycle_of_zigma(side):
    """The eight paths of CompVis/zigma, in its order."""
    paths = load("zigma_paths").arrays[f"zigzag_{side}"]
    for order, path in zip(CYCLES["zigzag"], paths, strict=True):
        assert layer_sequences(order, (side, side))[0].tolist() == path.tolist()


def test_tokens_are_moved_only_in_layers_of_another_order():
    assert dim_debug((8, 8), depth=4, orders="raster").tables == [None] * 4
    assert [bool(table) for table in dim_debug((8, 8), depth=3, orders=["row", "row", "col"]).tables] == [0, 0, 1]
    tables = [b for name, b in dim_debug((8, 8), depth=8, orders="cross").named_buffers() if "order" in name]
    assert [table.shape for table in tables] == [(2, 16)]


def test_a_transposed_image_is_a_column_scan():
    rows, columns = (awake(dim_debug((8, 8), orders=[order], positions="learned")) for order in ("row", "col"))
    columns.load_state_dict(rows.state_dict())
    columns.embed.weight.data = rows.embed.weight.unflatten(1, (-1, 2, 2)).mT.flatten(1)
    linear = rows.final.linear
    columns.final.linear.weight.data = linear.weight.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)
    columns.final.linear.bias.data = linear.bias.unflatten(0, (-1, 2, 2)).mT.flatten()
    columns.positions.data = rows.positions.view(4, 4, 32).transpose(0, 1).flatten(0, 1)
    x, t, _ = inputs()
    torch.testing.assert_close(columns(x.mT, t).mT, rows(x, t))


@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing_changes_no_gradient(mixer):
    net = awake(dim_debug((8, 8), num_classes=10, mixer=mixer, orders="cross"))
    grads = []
    for net.gradient_checkpointing in (False, True):
        grads.append(torch.autograd.grad(net(*inputs()).square().sum(), list(net.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_no_labels_are_the_null_class_and_classes_matter():
    net = awake(dim_debug((8, 8), num_classes=10))
    x, t, _ = inputs()
    null = net(x, t, torch.full((2,), 10))
    torch.testing.assert_close(net(x, t), null)
    assert not torch.allclose(net(x, t, torch.tensor([1, 2])), null)


def test_its_config_builds_it_again():
    net = awake(dim_debug((3, 8, 8), num_classes=3, orders="factorised", mixer="mamba", positions="learned"))
    twin = DiM(**net.config)
    twin.load_state_dict(net.state_dict())
    x, t, _ = inputs((3, 8, 8))
    assert torch.equal(twin(x, t), net(x, t))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mixer": "attention"}, "mixer must be one of mamba, ssd"),
        ({"positions": "rotary"}, "positions must be one of"),
        ({"orders": []}, "orders is empty"),
        ({"orders": "factorised"}, "T, H, W"),
        ({"orders": "spiral"}, "spiral"),
        ({"patch_size": 3}, "8 x 8 cannot be cut"),
        ({"num_classes": -1}, "num_classes must be at least 0, .* got -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dim_debug((8, 8), **options)


@pytest.mark.parametrize("name", sorted(name for name in vars(dim) if name.startswith("dim_")))
def test_options_go_before_what_a_size_has(name):
    net = getattr(dim, name)((8, 8), d_model=32, depth=1, headdim=16, expand=2, mlp_ratio=1)
    assert net.config | dict(d_model=32, depth=1, headdim=16, expand=2, mlp_ratio=1) == net.config


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"takes inputs \(B, 4, 8, 8\), got \(2, 4, 8, 16\)"):
        dim_debug((8, 8))(torch.zeros(2, 4, 8, 16), torch.zeros(2))


@pytest.mark.parametrize("mixer", MIXERS)
def test_compile_in_one_graph(mixer):
    net = awake(dim_debug((4, 4), num_classes=10, mixer=mixer, orders="cross"))
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs((4, 4))), net(*inputs((4, 4))))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size, orders, mlp", [((16, 16), "zigzag", 0), ((4, 16, 16), "factorised", 4)])
def test_a_gpu_in_bfloat16_agrees(mixer, size, orders, mlp, compiled):
    torch.manual_seed(0)
    sizes = dict(d_model=128, d_state=64, headdim=64, depth=3)
    net = awake(dim_debug(size, **sizes, mixer=mixer, orders=orders, mlp_ratio=mlp))
    x, t, _ = inputs(size)
    weight = torch.randn(x.shape)

    def step(device, autocast=True):
        net.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = net(x.to(device), t.to(device))
        grads = torch.autograd.grad((y.float() * weight.to(device)).sum(), list(net.parameters()))
        # of all blocks at once: a block's few heads may have sums that cancel, which no bfloat16 gets right
        found = defaultdict(list, y=[y])
        for (name, _), grad in zip(net.named_parameters(), grads, strict=True):
            found[re.sub(r"blocks\.\d+\.", "", name)].append(grad)
        return {name: torch.cat([v.flatten() for v in values]).float().cpu() for name, values in found.items()}

    expected = step("cpu", autocast=False)
    if compiled:
        torch.compiler.reset()
        for block in net.blocks:
            block.compile(fullgraph=True)
    found = step("cuda")
    errors = {name: ((found[name] - e).norm() / e.norm()).item() for name, e in expected.items()}
    few = ("mixer.A_log", "mixer.D", "mixer.dt_bias")  # a number a head; a CPU's bfloat16 is up to 0.08 off
    bounds = dict.fromkeys(few, 0.12) | dict(y=0.02)
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= bounds.get(name, 0.06)}
    assert not wrong, wrong


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_checkpointing_in_autocast_on_a_gpu(mixer):
    net = awake(dim_debug((16, 16), d_model=64, d_state=64, headdim=64, mixer=mixer, orders="cross")).cuda()
    x, t, _ = (v.cuda() for v in inputs((16, 16)))
    grads = []
    for net.gradient_checkpointing in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            loss = net(x, t).float().square().sum()
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
