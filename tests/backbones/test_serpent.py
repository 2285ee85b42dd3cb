import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mambavision.backbones import serpent
from mambavision.backbones.serpent import (
    Serpent,
    StridedScan,
    WaveletScan,
    config_from_state_dict,
    haar,
    inverse_haar,
    serpent_b,
    serpent_debug,
    serpent_l,
    serpent_s,
    serpent_t,
)

SHAPES = [
    dict(dims=(8, 16), depths=(1, 2), d_state=(2, 1), strides=(2, 1)),
    dict(dims=(8, 16, 24), depths=(1, 2, 1), d_state=(1, 3, 2), strides=(4, 2, 1), refinement=1, expand=0.5),
    dict(dims=(16,), depths=(2,), d_state=(1,), strides=(2,), mixer="wavelet", patch_size=2, ffn_expand=1.5),
]


def drawn(in_channels: int = 1, **arguments) -> Serpent:
    """A small network whose output depends on its input."""
    torch.manual_seed(0)
    net = Serpent(in_channels, **SHAPES[0] | arguments)
    nn.init.normal_(net.head.weight, std=0.1)
    return net


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("in_channels", "scale", "sigma_input"), [(1, 1, True), (3, 4, False), (3, 1, True)])
def test_a_state_dict_alone_tells_the_arguments(shape, in_channels, scale, sigma_input):
    net = Serpent(in_channels, **shape, scale=scale, sigma_input=sigma_input)
    state = net.state_dict()
    config = config_from_state_dict(state)
    assert config == net.config
    Serpent(**config).load_state_dict(state)


def test_another_state_dict_is_refused():
    with pytest.raises(ValueError, match="not the state dict of a Serpent"):
        config_from_state_dict(nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize(
    ("build", "low", "high"), [(serpent_t, 0.2, 0.3), (serpent_s, 0.8, 1), (serpent_b, 3.4, 4.4), (serpent_l, 10, 13)]
)
def test_sizes(build, low, high):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(3, scale=1, sigma_input=True).parameters())
    assert low < parameters / 1e6 < high


def test_haar_is_orthonormal_and_inverted():
    x = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    bands = haar(x)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    torch.testing.assert_close(inverse_haar(bands), x)
    rows = torch.tensor([1.0, -1.0]).repeat(2)[None, :, None, None].expand(1, 4, 4, 1)
    assert haar(rows).squeeze().sum((0, 1)).tolist() == [0, 8, 0, 0]  # lines that alternate: the second band alone


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "turn", [lambda x: x.flip(1, 2), lambda x: x.transpose(1, 2)], ids=["half a turn", "transpose"]
)
def test_a_core_with_one_direction_s_weights_has_no_direction(stride, turn):
    torch.manual_seed(0)
    core = StridedScan(6, d_state=2, expand=1, stride=stride).double()
    with torch.no_grad():
        for p in (core.x_proj_weight, core.dt_projs_weight, core.dt_projs_bias):
            p.copy_(p[:1].expand_as(p))
        core.conv2d.weight.add_(core.conv2d.weight.clone().flip(2, 3))
        core.conv2d.weight.add_(core.conv2d.weight.clone().transpose(2, 3))
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    y = core(x)
    torch.testing.assert_close(core(turn(x)), turn(y))
    with torch.no_grad():
        core.dt_projs_bias[0] += 1
    assert not torch.allclose(core(turn(x)), turn(core(x)))


@pytest.mark.parametrize("core", [StridedScan(4, d_state=1, expand=1, stride=2), WaveletScan(4, d_state=1, expand=1)])
def test_a_core_sees_the_whole_image(core):
    x = torch.randn(1, 8, 8, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(core(x)[0, 5, 2].square().sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_stride_is_a_scan_of_means_beside_the_pixels():
    core = StridedScan(4, d_state=2, expand=1, stride=2)
    u = torch.randn(1, 4, 6, 4)
    means = (u[:, ::2, ::2] + u[:, 1::2, ::2] + u[:, ::2, 1::2] + u[:, 1::2, 1::2]) / 4
    expected = u + core.scan(means).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(core.add_tokens(u, core.scan(core.tokens(u))), expected)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        for v in made if isinstance(made, tuple) else (made,):
            self.elements = max(self.elements, v.numel() if isinstance(v, torch.Tensor) else 0)
        return made


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pixels", [1, 200])
def test_a_large_picture_in_bands_is_the_same(monkeypatch, shape, dtype, pixels):
    net = drawn(3, **shape | dict(ffn_expand=6))  # the widest features are those of the feed-forwards
    x = torch.rand(1, 3, 44, 37)

    def restored(y: torch.Tensor) -> tuple[torch.Tensor, int]:
        with torch.autocast("cpu", dtype, enabled=dtype is not None), _Largest() as largest:
            return net(y), largest.elements

    expected, whole = restored(x)
    monkeypatch.setattr(serpent, "_BAND", pixels)
    assert torch.equal(restored(x)[0], expected) and restored(x)[1] == whole  # too small for bands
    monkeypatch.setattr(serpent, "_LARGE", 1)
    found, most = restored(x)
    torch.testing.assert_close(found, expected)
    assert most < whole
    both = restored(torch.cat([x, x]))[0]  # several pictures are not worked on in bands
    torch.testing.assert_close(both[:1], expected)


@pytest.mark.parametrize("mixer", ["strided", "wavelet"])
def test_every_parameter_learns(mixer):
    net = drawn(mixer=mixer, strides=(2, 1) if mixer == "strided" else (2, 2), sigma_input=True)
    net(torch.rand(2, 1, 10, 7), torch.rand(2)).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name


def test_crop_does_not_depend_on_what_is_padded():
    net = drawn()
    x = torch.rand(1, 1, 7, 9)
    reflected = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="reflect")  # to multiples of 2
    torch.testing.assert_close(net(x), net(reflected)[..., :7, :9])


def test_sigma_is_a_level_map():
    net = drawn(sigma_input=True)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(net(x), net(x, torch.zeros(2)))
    first = net(x, torch.tensor([0.1, 0.0]))
    assert not torch.allclose(first[0], net(x)[0]) and torch.allclose(first[1], net(x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype):
    net = drawn(3)
    x = torch.rand(1, 3, 16, 16)
    expected = net(x) - x
    with torch.autocast("cpu", dtype=dtype):
        out = net(x)
    out.sum().backward()
    assert out.dtype == torch.float32 and ((out - x) - expected).abs().max() < 0.05 * expected.std()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in net.parameters())


def test_compiles_into_one_graph():
    net = drawn()
    x = torch.rand(1, 1, 16, 16)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1,)), "one entry for each level"),
        (dict(depths=(1, 0)), "every level needs a block"),
        (dict(mixer="fourier"), "mixer must be"),
        (dict(mixer="wavelet"), "strides of a wavelet core are 2"),
        (dict(in_channels=4), "in_channels must be 1 or 3, got 4"),
        (dict(expand=0.3), "whole channels for 8"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Serpent(**SHAPES[0] | arguments)


def test_debug_is_tiny():
    assert sum(p.numel() for p in serpent_debug().parameters()) < 20_000
