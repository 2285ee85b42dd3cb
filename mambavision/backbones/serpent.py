"""Serpent: a U-Net of selective scans that restores photos of any size, linear in their pixels.

After the published description of Sepehri, Fabian and Soltanolkotabi, "Serpent: Scalable and Efficient Image
Restoration via Multi-scale Structured State Space Models", arXiv 2403.17902: a hierarchy of blocks that turn an image
into sequences, scan them in four directions and process them at several scales. The exact configuration was not
available to us: widths, depths, the form of the multi-scale core (`StridedScan`, `WaveletScan`), the gated
feed-forward, resampling and the plain sums of the skips are choices made here.

Images are (B, C, H, W) in [0, 1]; features are (B, H, W, C), channels last, so that pixels are tokens without a copy.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambavision.layers import SelectiveSSM, init_mamba
from mambavision.layers.ssm import two_linear
from mambavision.ops import depthwise_conv, norm_gate
from mambavision.ops.depthwise_conv import in_place

Mixer = Literal["strided", "wavelet"]
"""Form of the multi-scale core: :class:`StridedScan` or :class:`WaveletScan`."""

_LARGE = 2**20  # pixels of the smallest pictures that a CPU works on in bands, see _bands
_BAND = 2**15  # pixels of a band


def init_serpent(A_log: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor) -> None:
    """Initialise as Mamba does, but with memories of 1 to 100 tokens, and D = 0: the pixels have a way of their own."""
    init_mamba(A_log, D, dt_weight, dt_bias, dt_min=0.01, dt_max=1.0)
    nn.init.zeros_(D)


class _Core(SelectiveSSM):
    """What both forms share: out_proj(out_norm(u + multi_scale(u)) * silu(z)), [u, z] from in_proj(norm(x)).

    u is convolved by a depth-wise 3x3 and SiLU.

    Args:
        dim: channels C of input and output.
        d_state: N, states per channel.
        expand: u and z have D = expand * C channels.
        channels: of a token of the scan, in multiples of D.
    """

    def __init__(self, dim: int, *, d_state: int, expand: float, channels: int = 1) -> None:
        d_inner = int(expand * dim)
        super().__init__(channels * d_inner, math.ceil(dim / 16), d_state=d_state, init=init_serpent)
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, dim, bias=False)

    def scan(self, x: Tensor) -> Tensor:
        """The four-direction scan of tokens (B, H, W, D) or (B, H, W, 4 D), summed; same shape."""
        return super().forward(x.flatten(1, 2), x.shape[1:3]).view_as(x)

    def tokens(self, u: Tensor) -> Tensor:
        """The tokens of the scan of u (B, H, W, D)."""
        raise NotImplementedError

    def add_tokens(self, u: Tensor, tokens: Tensor) -> Tensor:
        """u (B, H, W, D) and what the scan made of its tokens, at every pixel."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, H, W, C), H and W multiples of a token of the scan; same shape."""
        u, z = two_linear(_normalise(x, self.norm), self.in_proj)
        u = depthwise_conv(u, self.conv2d.weight, self.conv2d.bias, activation="silu")
        u = self.add_tokens(u, self.scan(self.tokens(u)))
        return self.out_proj(norm_gate(u, z, self.out_norm.weight, self.out_norm.bias))

    def add_to(self, x: Tensor) -> Tensor:
        """x + forward(x)."""
        bands = _bands(x, self.stride)
        if len(bands) == 1:
            return x + self(x)
        to_u, to_z = self.in_proj.weight.chunk(2)
        u = None
        for band in bands:
            inside = F.linear(_normalise(band.with_border(x), self.norm), to_u)
            inside = depthwise_conv(inside, self.conv2d.weight, self.conv2d.bias, activation="silu")
            u = inside.new_empty(*x.shape[:3], inside.shape[3]) if u is None else u
            band.of(u).copy_(band.without_border(inside))
        tokens = self.scan(self.tokens(u))
        y = torch.empty_like(x)
        for band in bands:
            z = F.linear(_normalise(band.of(x), self.norm), to_z)
            mixed = norm_gate(self.add_tokens(band.of(u), band.of(tokens)), z, self.out_norm.weight, self.out_norm.bias)
            torch.add(band.of(x), self.out_proj(mixed), out=band.of(y))
        return y


class StridedScan(_Core):
    """Pixels beside a scan at a stride s: out_proj(out_norm(u + repeat(ssm(mean(u)))) * silu(z)).

    With [u, z] = in_proj(norm(x)), u convolved by a depth-wise 3x3 and SiLU; mean averages s x s pixels to a token of
    the scan, repeat writes a token to s x s pixels.

    Args:
        dim: channels C of input and output.
        d_state: N, states per channel.
        expand: u and z have expand * C channels.
        stride: s.
    """

    def __init__(self, dim: int, *, d_state: int, expand: float, stride: int) -> None:
        super().__init__(dim, d_state=d_state, expand=expand)
        self.stride = stride

    def tokens(self, u: Tensor) -> Tensor:
        """mean(u), (B, H / s, W / s, D)."""
        return u if self.stride == 1 else self._cells(u).mean((2, 4))

    def add_tokens(self, u: Tensor, tokens: Tensor) -> Tensor:
        """u + repeat(tokens), (B, H, W, D)."""
        if self.stride == 1:
            return u + tokens
        return (self._cells(u) + tokens[:, :, None, :, None]).view_as(u)

    def _cells(self, u: Tensor) -> Tensor:
        """(B, H / s, s, W / s, s, D)."""
        return u.unflatten(2, (-1, self.stride)).unflatten(1, (-1, self.stride))


class WaveletScan(_Core):
    """Pixels beside a scan of their four Haar bands: out_proj(out_norm(u + haar^-1(ssm(haar(u)))) * silu(z)).

    u and z are those of :class:`StridedScan`. A token is 2 x 2 pixels, with the bands as 4 D channels.

    Args:
        dim: channels C of input and output.
        d_state: N, states per channel.
        expand: u and z have D = expand * C channels.
    """

    def __init__(self, dim: int, *, d_state: int, expand: float) -> None:
        super().__init__(dim, d_state=d_state, expand=expand, channels=4)
        self.stride = 2

    def tokens(self, u: Tensor) -> Tensor:
        """haar(u), (B, H / 2, W / 2, 4 D)."""
        return haar(u)

    def add_tokens(self, u: Tensor, tokens: Tensor) -> Tensor:
        """u + haar^-1(tokens), (B, H, W, D)."""
        return u + inverse_haar(tokens)


def haar(x: Tensor) -> Tensor:
    """Orthonormal Haar bands of x (B, H, W, D): (B, H / 2, W / 2, 4 D), in the order mean, rows, columns, diagonal."""
    top, bottom = x.unflatten(1, (-1, 2)).unbind(2)
    mean, difference = top + bottom, top - bottom
    (a, b), (c, d) = (v.unflatten(2, (-1, 2)).unbind(3) for v in (mean, difference))
    return torch.cat([a + b, c + d, a - b, c - d], -1) / 2


def inverse_haar(x: Tensor) -> Tensor:
    """The image (B, H, W, D) of bands (B, H / 2, W / 2, 4 D)."""
    a, c, b, d = (x / 2).chunk(4, -1)
    mean, difference = (torch.stack([v + w, v - w], 3).flatten(2, 3) for v, w in ((a, b), (c, d)))
    return torch.stack([mean + difference, mean - difference], 2).flatten(1, 2)


class GatedFeedForward(nn.Module):
    """Feed-forward of pixels with a depth-wise 3x3 gate: fc2(v * silu(dwconv(u))) with [u, v] = fc1(norm(x)).

    Args:
        dim: channels C of input and output.
        expand: u and v have expand * C channels.
    """

    def __init__(self, dim: int, expand: float) -> None:
        super().__init__()
        hidden = int(expand * dim)
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), same shape."""
        u, v = two_linear(_normalise(x, self.norm), self.fc1)
        # one name, and no v: here memory peaks
        u = depthwise_conv(u, self.dwconv.weight, self.dwconv.bias)
        u = norm_gate(v, u)
        del v
        return self.fc2(u)

    def add_to(self, x: Tensor) -> Tensor:
        """x + forward(x)."""
        bands = _bands(x)
        if len(bands) == 1:
            return x + self(x)
        to_u, to_v = self.fc1.weight.chunk(2)
        y = torch.empty_like(x)
        for band in bands:
            normalised = _normalise(band.with_border(x), self.norm)
            u = depthwise_conv(F.linear(normalised, to_u), self.dwconv.weight, self.dwconv.bias)
            v = F.linear(band.without_border(normalised), to_v)
            torch.add(band.of(x), self.fc2(norm_gate(v, band.without_border(u))), out=band.of(y))
        return y


def _normalise(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return norm_gate(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)


class SerpentBlock(nn.Module):
    """A scan and two feed-forwards: x = x + scan(x), x = x + ffn1(x), x = x + ffn2(x).

    Args:
        dim: channels C.
        d_state, expand, mixer, stride: of the scan, see :class:`StridedScan` and :class:`WaveletScan`.
        ffn_expand: of each :class:`GatedFeedForward`.
    """

    def __init__(self, dim: int, *, d_state: int, expand: float, ffn_expand: float, mixer: Mixer, stride: int) -> None:
        super().__init__()
        if mixer == "strided":
            self.scan = StridedScan(dim, d_state=d_state, expand=expand, stride=stride)
        else:
            self.scan = WaveletScan(dim, d_state=d_state, expand=expand)
        self.ffn1 = GatedFeedForward(dim, ffn_expand)
        self.ffn2 = GatedFeedForward(dim, ffn_expand)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), same shape."""
        return self.ffn2.add_to(self.ffn1.add_to(self.scan.add_to(x)))


class _Band(NamedTuple):
    """Rows `top` to `bottom` of the `height` rows of features (1, H, W, C)."""

    top: int
    bottom: int
    height: int

    def of(self, x: Tensor) -> Tensor:
        """These rows of x (1, H, W, C), or of tokens (1, H / s, W / s, C)."""
        s = self.height // x.shape[1]
        return x[:, self.top // s : self.bottom // s]

    def with_border(self, x: Tensor) -> Tensor:
        """The same and one row more above and below, where there is one."""
        return x[:, max(self.top - 1, 0) : self.bottom + 1]

    def without_border(self, x: Tensor) -> Tensor:
        """These rows, of what was made of :meth:`with_border`."""
        first = min(self.top, 1)
        return x[:, first : first + self.bottom - self.top]


def _bands(x: Tensor, multiple: int = 1) -> list[_Band]:
    """The bands of rows, multiples of so many, in which features x (B, H, W, C) are worked on; most often one.

    On a CPU, a large picture's products and what comes between them are done band by band: its widest features are
    never there as a whole, which halves peak memory and spares most new pages of memory. For inference, of one
    picture, eagerly.
    """
    height, width = x.shape[1:3]
    if x.device.type != "cpu" or not in_place() or len(x) > 1 or height * width < _LARGE:
        return [_Band(0, height, height)]
    rows = max(_BAND // width // multiple, 1) * multiple
    return [_Band(top, min(top + rows, height), height) for top in range(0, height, rows)]


def on_pixels(conv: nn.Module, x: Tensor) -> Tensor:
    """A module of images on features (B, H, W, C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class Serpent(nn.Module):
    """Restores images (B, in_channels, H, W) of any size to (B, in_channels, scale H, scale W).

    Patch embedding, levels of Serpent blocks down to 1 / 2^(levels - 1) of the tokens and up again with sums as skips,
    refinement at the top, and a residual that is added to the (bicubically enlarged) input.

    Args:
        in_channels: 3 for RGB, 1 for gray.
        dims: channels of each level, the finest first.
        depths: blocks of each level on the way down; all but the last level have as many on the way up.
        refinement: blocks after these, at the finest level.
        patch_size: a token of the finest level is patch_size x patch_size pixels.
        d_state: states per channel of each level.
        expand: channels inside a scan per channel of the level.
        ffn_expand: the same of the feed-forward.
        mixer: form of the multi-scale core.
        strides: of the scans of each level in a "strided" core; those of a "wavelet" core are 2.
        scale: of the output.
        sigma_input: whether forward takes the noise level.

    Attributes:
        config: these arguments, JSON-able.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        refinement: int = 0,
        patch_size: int = 1,
        d_state: Sequence[int],
        expand: float = 1.0,
        ffn_expand: float = 2.0,
        mixer: Mixer = "strided",
        strides: Sequence[int],
        scale: int = 1,
        sigma_input: bool = False,
    ) -> None:
        levels = {name: list(v) for name, v in dict(dims=dims, depths=depths, d_state=d_state, strides=strides).items()}
        if len({len(v) for v in levels.values()}) > 1 or not dims:
            raise ValueError(f"dims, depths, d_state and strides need one entry for each level, got {levels}")
        if min(depths) < 1:
            raise ValueError(f"every level needs a block, got depths {list(depths)}")
        if mixer not in ("strided", "wavelet"):
            raise ValueError(f"mixer must be 'strided' or 'wavelet', got {mixer!r}")
        if mixer == "wavelet" and set(strides) != {2}:
            raise ValueError(f"the strides of a wavelet core are 2, got {list(strides)}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, got {in_channels}")
        for dim in dims:
            if (expand * dim) % 1 or (ffn_expand * dim) % 1:
                raise ValueError(f"expand {expand} and ffn_expand {ffn_expand} must give whole channels for {dim}")
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, **levels, refinement=refinement, patch_size=patch_size, expand=expand,
            ffn_expand=ffn_expand, mixer=mixer, scale=scale, sigma_input=sigma_input,
        )  # fmt: skip
        self.patch_size, self.scale = patch_size, scale
        self.multiple = patch_size * math.lcm(*(2**i * s for i, s in enumerate(strides)))
        self.register_buffer("strides", torch.tensor(list(strides)))  # no shape tells them

        def blocks(level: int, depth: int) -> nn.Sequential:
            options = dict(d_state=d_state[level], stride=strides[level])
            options |= dict(expand=expand, ffn_expand=ffn_expand, mixer=mixer)
            return nn.Sequential(*(SerpentBlock(dims[level], **options) for _ in range(depth)))

        top = range(len(dims) - 1)
        self.embed = nn.Conv2d(in_channels * patch_size**2, dims[0], 3, padding=1)
        self.sigma = nn.Parameter(torch.randn(dims[0])) if sigma_input else None
        self.encoder = nn.ModuleList(blocks(i, depths[i]) for i in range(len(dims)))
        self.downs = nn.ModuleList(nn.Conv2d(dims[i], dims[i + 1], 2, 2) for i in top)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(dims[i + 1], dims[i], 2, 2) for i in top)
        self.decoder = nn.ModuleList(blocks(i, depths[i]) for i in top)
        self.refinement = blocks(0, refinement)
        self.head = nn.Conv2d(dims[0], in_channels * (patch_size * scale) ** 2, 3, padding=1)
        nn.init.trunc_normal_(self.head.weight, std=1e-4)  # an untrained network nearly returns its input
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        """Restore x (B, in_channels, H, W), in [0, 1] but not clipped, to (B, in_channels, scale H, scale W).

        sigma (B,): standard deviation of the noise, in the units of x, for networks with `sigma_input`; None where it
        is unknown. Raises ValueError if it is given to others.
        """
        if sigma is not None and self.sigma is None:
            raise ValueError("sigma was given to a network built without sigma_input")
        height, width = x.shape[-2:]
        y = F.pixel_unshuffle(pad_to_multiple(x, self.multiple), self.patch_size)
        y = on_pixels(self.embed, y.permute(0, 2, 3, 1))
        if sigma is not None:
            y = y + (sigma[:, None] * self.sigma).to(y.dtype)[:, None, None]
        skips = []
        for level, down in zip(self.encoder, self.downs, strict=False):
            skips.append(level(y))
            y = on_pixels(down, skips[-1])
        y = self.encoder[-1](y)
        for i in reversed(range(len(self.ups))):
            y = self.decoder[i](on_pixels(self.ups[i], y) + skips.pop())
        y = F.pixel_shuffle(on_images(self.head, self.refinement(y)), self.patch_size * self.scale)
        return y[..., : self.scale * height, : self.scale * width].to(x.dtype) + enlarge(x, self.scale)


def on_images(conv: nn.Module, x: Tensor) -> Tensor:
    """A module of images on features (B, H, W, C), to an image."""
    return conv(x.permute(0, 3, 1, 2))


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend x (B, C, H, W) below and to the right to multiples: reflected, or repeated where it is too small."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    if not bottom and not right:
        return x
    mode = "reflect" if bottom < x.shape[-2] and right < x.shape[-1] else "replicate"
    return F.pad(x, (0, right, 0, bottom), mode=mode)


def enlarge(x: Tensor, scale: int) -> Tensor:
    """x (B, C, H, W) enlarged bicubically to (B, C, scale H, scale W)."""
    return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the :class:`Serpent` whose state dict this is, from its names and shapes alone."""
    if "embed.weight" not in state or "encoder.0.0.ffn1.fc1.weight" not in state:
        raise ValueError("not the state dict of a Serpent: it has no embed.weight and no encoder.0.0.ffn1.fc1.weight")

    def count(pattern: str) -> int:
        """1 + the largest number that the group of the pattern takes."""
        return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)

    levels = count(r"encoder\.(\d+)\.")
    dims = [state[f"encoder.{i}.0.scan.norm.weight"].shape[0] for i in range(levels)]
    rows = [state[f"encoder.{i}.0.scan.x_proj_weight"].shape[1] for i in range(levels)]
    inputs, outputs = state["embed.weight"].shape[1], state["head.weight"].shape[0]
    d_inner = state["encoder.0.0.scan.out_norm.weight"].shape[0]
    in_channels = 1 if math.isqrt(inputs) ** 2 == inputs else 3
    return dict(
        in_channels=in_channels,
        dims=dims,
        depths=[count(rf"encoder\.{i}\.(\d+)\.") for i in range(levels)],
        refinement=count(r"refinement\.(\d+)\."),
        patch_size=math.isqrt(inputs // in_channels),
        d_state=[(n - math.ceil(dim / 16)) // 2 for n, dim in zip(rows, dims, strict=True)],
        expand=d_inner / dims[0],
        ffn_expand=state["encoder.0.0.ffn1.fc2.weight"].shape[1] / dims[0],
        mixer="strided" if state["encoder.0.0.scan.x_proj_weight"].shape[2] == d_inner else "wavelet",
        strides=state["strides"].tolist(),
        scale=math.isqrt(outputs // inputs),
        sigma_input="sigma" in state,
    )


def serpent_t(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> Serpent:
    """About 0.25 M parameters."""
    return Serpent(
        in_channels, dims=(32, 64), depths=(1, 2), refinement=1, d_state=(1, 1), strides=(2, 1),
        scale=scale, sigma_input=sigma_input,
    )  # fmt: skip


def serpent_s(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> Serpent:
    """Under 1 M parameters."""
    return Serpent(
        in_channels, dims=(64, 64, 96), depths=(1, 2, 2), refinement=1, d_state=(1, 1, 1), strides=(2, 2, 1),
        scale=scale, sigma_input=sigma_input,
    )  # fmt: skip


def serpent_b(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> Serpent:
    """About 4 M parameters."""
    return Serpent(
        in_channels, dims=(64, 96, 160), depths=(2, 4, 5), refinement=2, d_state=(1, 1, 1), strides=(2, 2, 1),
        scale=scale, sigma_input=sigma_input,
    )  # fmt: skip


def serpent_l(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> Serpent:
    """About 12 M parameters."""
    return Serpent(
        in_channels, dims=(96, 160, 256), depths=(4, 5, 5), refinement=2, d_state=(1, 1, 1), strides=(2, 2, 1),
        scale=scale, sigma_input=sigma_input,
    )  # fmt: skip


def serpent_debug(in_channels: int = 3, scale: int = 1, sigma_input: bool = False) -> Serpent:
    """Seconds on a CPU, for tests."""
    return Serpent(
        in_channels, dims=(8, 16), depths=(1, 1), refinement=1, d_state=(2, 1), strides=(2, 1),
        scale=scale, sigma_input=sigma_input,
    )  # fmt: skip
