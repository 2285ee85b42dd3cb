import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambavision.layers import (
    SS2D,
    BiMamba2Mixer,
    BiMambaMixer,
    HydraMixer,
    Mamba2Mixer,
    MambaMixer,
    SelectiveSSM,
    init_mamba_yolo,
)
from tests.parity import check_module, load


class ChannelsFirst(nn.Module):
    """An image mixer (B, H, W, C) seen as (B, C, H, W), with the mixer's own parameter names."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def named_parameters(self, *args, **kwargs):
        return self.mixer.named_parameters(*args, **kwargs)

    def forward(self, x):
        return self.mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fitted(module: nn.Module, weights: dict) -> nn.Module:
    """Load official weights; a 1x1 convolution's kernel axes are dropped where a linear layer stands in for it."""
    own = module.state_dict()
    module.load_state_dict({k: v.reshape(own[k].shape) if v.shape[2:] == (1, 1) else v for k, v in weights.items()})
    return module


def test_mamba_mixer_is_the_published_block():
    fixture = load("mamba1_d32")
    check_module(fixture, fitted(MambaMixer(32), fixture.weights()), tol=1e-5, grad_tol=1e-4)


def test_bi_mamba_mixer_is_vims_block():
    fixture = load("vim_mamba_v2_d32")
    check_module(fixture, fitted(BiMambaMixer(32), fixture.weights()), tol=1e-5, grad_tol=1e-4)


def test_ss2d_is_vmambas_v0():
    fixture = load("vmamba_ss2d_v0_cl")
    check_module(fixture, fitted(SS2D(32), fixture.weights()), tol=1e-5, grad_tol=1e-4)


def test_ss2d_without_gate_is_vmambas_v05_noz():
    fixture = load("vmamba_ss2d_v05noz_cf")
    ss2d = SS2D(32, d_state=1, expand=1, conv_bias=False, gated=False)
    check_module(fixture, ChannelsFirst(fitted(ss2d, fixture.weights())), tol=1e-5, grad_tol=1e-4)


@pytest.mark.parametrize("name", ["myolo_block_ss2d_d32", "myolo_block_ss2d_d32_ssm8"])
def test_ss2d_is_mamba_yolos(name):
    fixture = load(name)
    ss2d = SS2D(32, act_layer=nn.GELU, init=init_mamba_yolo)
    check_module(fixture, ChannelsFirst(fitted(ss2d, fixture.weights())), tol=1e-5, grad_tol=1e-4)


def test_mamba_mixer_is_causal_and_bi_mamba_is_not():
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 7] += 1
    for mixer, before in ((MambaMixer(16), False), (BiMambaMixer(16), True)):
        moved = (mixer(x) - mixer(changed)).abs().sum((0, 2)) > 1e-7
        assert moved[7:].all() and moved[:7].any() == before


def test_ss2d_with_biases_splits_them_as_the_weights():
    torch.manual_seed(0)
    ss2d, x = SS2D(8, bias=True), torch.randn(1, 4, 5, 8)
    u, z = ss2d.in_proj(x).chunk(2, -1)
    u = F.silu(ss2d.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    y = SelectiveSSM.forward(ss2d, u.flatten(1, 2), (4, 5)).view_as(u)
    torch.testing.assert_close(ss2d(x), ss2d.out_proj(ss2d.out_norm(y) * F.silu(z)))


@pytest.mark.parametrize("orders", ["unidirectional", "cross", ("row", "hilbert"), (torch.arange(35).flip(0),)])
def test_ss2d_takes_any_orders_and_images(orders):
    ss2d = SS2D(12, orders=orders)
    x = torch.randn(2, 5, 7, 12, requires_grad=True)
    y = ss2d(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in ss2d.parameters())


def test_ss2d_output_is_a_channels_last_view_of_an_image():
    x = torch.randn(2, 16, 6, 10).contiguous(memory_format=torch.channels_last)
    y = SS2D(16)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixer", [MambaMixer, BiMambaMixer, SS2D])
def test_half_precision_autocast_stays_close_to_float32(mixer, dtype):
    torch.manual_seed(0)
    module = mixer(32)
    x = torch.randn(2, 6, 8, 32) if mixer is SS2D else torch.randn(2, 48, 32)
    expected = module(x)
    with torch.autocast("cpu", dtype=dtype):
        out = module(x)
    assert (out - expected).abs().max() < 0.1 * expected.std()
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


ON_TOKENS = [MambaMixer, BiMambaMixer, Mamba2Mixer, BiMamba2Mixer, HydraMixer]


@pytest.mark.parametrize("mixer", ON_TOKENS)
def test_func_gives_the_gradients_of_each_sample(mixer):
    torch.manual_seed(0)
    mixer, x = mixer(32), torch.randn(2, 9, 32)

    def loss(parameters, sample):
        return torch.func.functional_call(mixer, parameters, (sample[None],)).square().sum()

    parameters = dict(mixer.named_parameters())
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(2):
        expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("mixer", [*ON_TOKENS, SS2D])
def test_forward_mode_is_reverse_modes(mixer):
    torch.manual_seed(0)
    layer, shape = mixer(32), (1, 3, 4, 32) if mixer is SS2D else (1, 9, 32)
    x, way, weight = torch.randn(3, *shape)
    _, found = torch.func.jvp(lambda x: (layer(x) * weight).sum(), (x,), (way,))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((layer(leaf) * weight).sum(), leaf)
    torch.testing.assert_close(found, (gradient * way).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", ON_TOKENS)
def test_exports_with_a_length_that_is_open(mixer):
    torch.manual_seed(0)
    layer, length = mixer(32).eval(), torch.export.Dim("length", min=1, max=4096)
    program = torch.export.export(layer, (torch.randn(1, 40, 32),), dynamic_shapes=({1: length},)).module()
    for size in (1, 40, 150):
        x = torch.randn(1, size, 32)
        torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize("mixer", ON_TOKENS)
def test_a_batch_of_none(mixer):
    x = torch.randn(0, 9, 32, requires_grad=True)
    y = mixer(32)(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 9, 32)


def test_whole_module_in_bfloat16():
    module = SS2D(32).bfloat16()
    out = module(torch.randn(1, 6, 8, 32, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_ss2d_compiles_without_a_graph_break():
    module, x = SS2D(8), torch.randn(1, 4, 6, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("mixer", [SS2D, MambaMixer, BiMambaMixer, Mamba2Mixer, BiMamba2Mixer, HydraMixer])
def test_other_layouts_are_refused(mixer):
    layer, right = mixer(32), (2, 6, 8, 32) if mixer is SS2D else (2, 48, 32)
    layout = r"\(B, H, W, C\)" if mixer is SS2D else r"\(B, L, C\)"
    channels_first = (right[0], right[-1], *right[1:-1])
    for shape in (channels_first, right[1:], (*right[:-1], 16), (1, *right)):
        wrong = rf"channels-last {layout} with C = 32, got \({', '.join(map(str, shape))}\)"
        with pytest.raises(ValueError, match=wrong):
            layer(torch.zeros(shape))


@pytest.mark.parametrize("mixer", [MambaMixer, BiMambaMixer, SS2D, Mamba2Mixer, BiMamba2Mixer, HydraMixer])
@pytest.mark.parametrize("wrong", ["d_model", "d_state", "d_conv"])
def test_sizes_below_one_are_refused(mixer, wrong):
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, got 0"):
        mixer(**{"d_model": 64, wrong: 0})


@pytest.mark.parametrize(("mixer", "wrong"), [(SS2D, "dt_rank"), (Mamba2Mixer, "headdim"), (Mamba2Mixer, "ngroups")])
def test_other_sizes_below_one_are_refused(mixer, wrong):
    with pytest.raises(ValueError, match=f"{wrong} must be at least 1, got -1"):
        mixer(64, **{wrong: -1})


def test_lengths_stay_dynamic_when_compiled_or_exported():
    module, x = SS2D(8).eval(), torch.randn(2, 5, 6, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    for call, other in ((compiled, torch.randn(3, 4, 7, 8)), (exported, torch.randn(3, 5, 6, 8))):
        with torch.no_grad():
            torch.testing.assert_close(call(other), module(other))


def step(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(leaf)
    # a graph kept by y would bind the parameters to the stream of this step
    return [y.detach(), *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))]


def on_gpu(mixer: type[nn.Module], device: str = "cuda") -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layer = mixer(32).to(device)
    return layer, torch.randn((2, 6, 8, 32) if mixer is SS2D else (2, 48, 32), device=device, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [MambaMixer, BiMambaMixer, SS2D])
def test_a_training_step_in_a_cuda_graph(mixer):
    layer, x = on_gpu(mixer)
    other = torch.randn_like(x)
    expected = step(layer, other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layer, x)
    x.copy_(other)
    graph.replay()
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [*ON_TOKENS, SS2D])
def test_torch_func_on_cuda(mixer):
    layer, x = on_gpu(mixer)
    x, way, weight = x.float(), *torch.randn(2, *x.shape, device="cuda")
    _, along = torch.func.jvp(lambda x: (layer(x) * weight).sum(), (x,), (way,))
    gradient = torch.func.grad(lambda x: (layer(x) * weight).sum())(x)
    torch.testing.assert_close(along, (gradient * way).sum(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [BiMambaMixer, SS2D])
def test_on_another_stream(mixer):
    layer, x = on_gpu(mixer)
    expected = step(layer, x)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on the other stream before this one ends sees zeros
        late.copy_(x)
        found = step(layer, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mixer", [BiMambaMixer, SS2D])
def test_on_a_device_that_is_not_the_current_one(mixer):
    layer, x = on_gpu(mixer, "cuda:1")
    found = step(layer, x)
    with torch.cuda.device(1):
        expected = step(layer, x)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", [BiMambaMixer, SS2D])
def test_compiled_with_dynamic_lengths_on_cuda(mixer):
    layer, x = on_gpu(mixer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 5):
        part = x[:, :length] if mixer is SS2D else x[:, : 8 * length]
        for one, two in zip(step_of(compiled, layer, part), step_of(layer, layer, part), strict=True):
            torch.testing.assert_close(one, two)


def step_of(call, layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaf = x.float().detach().requires_grad_()
    y = call(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *layer.parameters()], torch.ones_like(y))]
