"""DiM: a diffusion transformer whose attention is a bidirectional state-space mixer, for images and video.

After Mo and Tian, "Scaling Diffusion Mamba with Bidirectional SSMs for Efficient Image and Video Generation", arXiv
2405.15881: patches with positions, bidirectional state-space blocks, conditioning on noise level and class. Its tables
and sizes were not available to us. Choices made here: the mixer is Vim's (arXiv 2401.09417) or a bidirectional Mamba-2,
under adaLN-zero; the class enters there too, not as a token; no variance is predicted; layers take rows and columns in
turn, or other orders (ZigMa, arXiv 2403.13802), for rows alone mix neighbours above each other badly (numbers are in
configs/dim/README.md). ``dit.py`` is its twin with attention. Sizes are DiT's (arXiv 2212.09748):

- ``dim_s`` to ``dim_xl``: its widths and depths, blocks of a mixer alone (iso-depth; about half of its parameters)
- ``dim_s_2x`` to ``dim_xl_2x``: the same blocks, twice the depth (iso-parameter)
- ``dim_s_mlp`` to ``dim_xl_mlp``: its blocks with their MLPs, at its depth, where a mixer as large as its attention
  takes the attention's place (iso-depth and iso-parameter: the mixer alone differs)

Images are (B, C, H, W), videos (B, C, T, H, W); tokens (B, L, D), L = H W / p^2 or T times that: frames are not joined.

Under autocast h, to which blocks add, is bf16 as the patches' projection is, here and in the twin; half the traffic of
fp32. With drawn weights of width 192, 28 blocks are 1.2 % of the output's norm away from fp32, 56 of a mixer alone
1.3 %, and 0.4 % with h in fp32 (on a CPU).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambavision.layers import BiMamba2Mixer, BiMambaMixer, patch_grid, patchify, sincos_positions, unpatchify
from mambavision.layers.adaln import Condition, FinalLayer, Modulation, modulated_norm
from mambavision.layers.embeddings import Size
from mambavision.ops import ScanOrder, scan_order

Mixer = Literal["mamba", "ssd"]
"""Vim's two selective scans, each with parameters of its own, or Mamba-2's in both directions in one pass."""
Positions = Literal["learned", "sincos"]
LayerOrder = ScanOrder | Literal["frame_row", "frame_col", "frame_serpentine", "frame_serpentine_col", "pixel_time"]
"""How a layer's sequences run, always in both directions: one sequence along the named order over all tokens; or, in a
video, one for each frame (``frame_``) or one for each position (``pixel_time``)."""
Cycle = Literal["raster", "cross", "serpentine", "zigzag", "hilbert", "factorised"]

CYCLES: dict[Cycle, tuple[LayerOrder, ...]] = {  # layer i takes entry i modulo the length
    "raster": ("row",),  # of a video: flattened space-time, frame after frame
    "cross": ("row", "col"),
    "serpentine": ("serpentine", "serpentine_col"),
    "zigzag": (  # ZigMa's eight: rows and columns from each of the four corners (of a grid with even sides)
        "serpentine", "serpentine_col", "serpentine_mirror", "serpentine_col_reverse",
        "serpentine_reverse", "serpentine_col_mirror", "serpentine_mirror_reverse", "serpentine_col_mirror_reverse",
    ),
    "hilbert": ("hilbert",),
    "factorised": ("frame_row", "frame_col", "pixel_time"),  # space, space, time
}  # fmt: skip
_FRAME_ORDERS: dict[str, ScanOrder] = {
    "frame_row": "row",
    "frame_col": "col",
    "frame_serpentine": "serpentine",
    "frame_serpentine_col": "serpentine_col",
}


def layer_sequences(order: LayerOrder, grid: Size) -> tuple[Tensor, int]:
    """The tokens of a grid in the order in which a layer takes them, (L,) int64, and into how many sequences they fall.

    Raises ValueError for an order that the grid does not have.
    """
    if order == "pixel_time":
        return scan_order("time", grid), grid[-2] * grid[-1]
    if order in _FRAME_ORDERS:
        if len(grid) == 2:
            raise ValueError(f"order {order!r} needs a video, grid (T, H, W); got {tuple(grid)}")
        frames, height, width = grid
        frame = scan_order(_FRAME_ORDERS[order], (height, width))
        return (torch.arange(frames, device="cpu")[:, None] * (height * width) + frame).flatten(), frames
    return scan_order(order, grid), 1


class _Reorder(torch.autograd.Function):
    """Tokens x (B, L, D) in another order (L,); its inverse (L,) brings gradients back.

    The gradient of ``x[:, order]`` would be added up by atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.saved_tensors[0]), None, None


class DiMBlock(nn.Module):
    """x + gate * mixer(modulated norm(x)), then the same with an MLP if there is one: x at the start of training.

    Shifts, scales and gates come from the condition.

    Args:
        d_model: channels D.
        mixer: of tokens (B, L, D).
        mlp_ratio: channels inside the MLP per channel; 0 is a block without.
    """

    def __init__(self, d_model: int, mixer: nn.Module, mlp_ratio: float = 0.0) -> None:
        super().__init__()
        hidden = int(mlp_ratio * d_model)
        self.modulation = Modulation(d_model, 6 if hidden else 3)
        self.mixer = mixer
        self.fc1 = nn.Linear(d_model, hidden) if hidden else None
        self.fc2 = nn.Linear(hidden, d_model) if hidden else None

    def forward(self, x: Tensor, c: Tensor, orders: Tensor | None = None, sequences: int = 1) -> Tensor:
        """Tokens x (B, L, D), c (B, D); same shape.

        Args:
            x: tokens.
            c: condition.
            orders: (2, L) int64, the order in which the mixer takes the tokens, and its inverse; None is x's. Inside
                the block, torch.compile makes them part of the loads of the norm and of the residual.
            sequences: into how many sequences, one after the other, the mixer's tokens fall.
        """
        shift, scale, gate, *of_mlp = self.modulation(c)
        y = modulated_norm(x, shift, scale)
        if orders is not None:
            y = _Reorder.apply(y, orders[0], orders[1])
        y = self.mixer(y.unflatten(1, (sequences, -1)).flatten(0, 1)).view_as(x)
        if orders is not None:
            y = _Reorder.apply(y, orders[1], orders[0])
        x = x + gate * y
        if self.fc1 is None:
            return x
        shift, scale, gate = of_mlp
        return x + gate * self.fc2(F.gelu(self.fc1(modulated_norm(x, shift, scale)), approximate="tanh"))


class DiM(nn.Module):
    """Predict noise, velocity or whatever it is trained for from noisy images or videos, the noise level and a class.

    Args:
        input_size: (H, W) of images or (T, H, W) of videos, in pixels or latents.
        patch_size: p, side of a patch of a frame.
        in_channels: C of input and output.
        num_classes: without the null class; 0 is a network without classes.
        d_model: channels of a token.
        depth: blocks.
        mixer: see :data:`Mixer`.
        orders: a name in :data:`CYCLES`, or a cycle of :data:`LayerOrder`.
        positions: learned ones, or fixed sines and cosines.
        d_state: states per channel; None is 16 for "mamba" and 64 for "ssd".
        expand: channels inside a mixer per channel.
        headdim: channels that share a decay, for "ssd".
        mlp_ratio: channels inside each block's MLP per channel; 0 is a network without.
        gradient_checkpointing: keep a block's input only, and compute the block again in the backward pass.

    Attributes:
        config: these arguments but the last, JSON-able.

    Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        input_size: Sequence[int],
        *,
        patch_size: int = 2,
        in_channels: int = 4,
        num_classes: int = 0,
        d_model: int,
        depth: int,
        mixer: Mixer = "ssd",
        orders: Cycle | Sequence[LayerOrder] = "cross",
        positions: Positions = "sincos",
        d_state: int | None = None,
        expand: float = 2.0,
        headdim: int = 64,
        mlp_ratio: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        if mixer not in get_args(Mixer):
            raise ValueError(f"mixer must be one of {', '.join(get_args(Mixer))}, got {mixer!r}")
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {positions!r}")
        cycle = CYCLES.get(orders, (orders,)) if isinstance(orders, str) else tuple(orders)
        if not cycle:
            raise ValueError("orders is empty: give at least one")
        input_size = tuple(input_size)
        grid = patch_grid(input_size, patch_size)
        d_state = d_state or (64 if mixer == "ssd" else 16)
        super().__init__()
        self.config: dict[str, Any] = dict(
            input_size=list(input_size), patch_size=patch_size, in_channels=in_channels, num_classes=num_classes,
            d_model=d_model, depth=depth, mixer=mixer, orders=orders if isinstance(orders, str) else list(orders),
            positions=positions, d_state=d_state, expand=expand, headdim=headdim, mlp_ratio=mlp_ratio,
        )  # fmt: skip
        self.input_size, self.patch_size, self.num_classes = input_size, patch_size, num_classes
        self.in_channels = self.out_channels = in_channels
        self.gradient_checkpointing = gradient_checkpointing

        def new_mixer() -> nn.Module:
            if mixer == "mamba":
                return BiMambaMixer(d_model, d_state=d_state, expand=expand)
            return BiMamba2Mixer(d_model, d_state=d_state, expand=expand, headdim=headdim)

        self.embed = nn.Linear(in_channels * patch_size**2, d_model)
        table = sincos_positions(d_model, grid)
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty_like(table).normal_(std=0.02))
        else:
            self.register_buffer("positions", table, persistent=False)
        self.condition = Condition(d_model, num_classes)
        self.blocks = nn.ModuleList(DiMBlock(d_model, new_mixer(), mlp_ratio) for _ in range(depth))
        self.final = FinalLayer(d_model, in_channels * patch_size**2)
        for layer in (self.embed, *(layer for block in self.blocks for layer in (block.fc1, block.fc2) if layer)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._lay_out([cycle[i % len(cycle)] for i in range(depth)], grid)

    def _lay_out(self, orders: Sequence[LayerOrder], grid: Size) -> None:
        """Make the index tables of the layers' orders, one for each order that is not the picture's own."""
        self.sequences, self.tables = [], []  # of each layer
        names: dict[LayerOrder, str | None] = {}
        own = torch.arange(len(self.positions), device="cpu")
        for order in orders:
            index, sequences = layer_sequences(order, grid)
            if order not in names:
                names[order] = None if torch.equal(index, own) else f"order_{len(names)}"
                if names[order] is not None:
                    table = torch.stack([index, torch.argsort(index)]).to(self.positions.device)
                    self.register_buffer(names[order], table, persistent=False)
            self.sequences.append(sequences)
            self.tables.append(names[order])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict from x (B, C, H, W) or (B, C, T, H, W); same shape and dtype.

        Args:
            x: noisy images or videos of ``input_size``.
            t: (B,) noise level on the scale 0..1000.
            labels: (B,) int64 in 0..num_classes, the last one the null class; None is the null class for all. Not
                checked, as a GPU would have to be waited for: others are an IndexError on a CPU, a CUDA error on a GPU.

        Raises ValueError for another size, or labels for a network without classes.
        """
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            size = (self.in_channels, *self.input_size)
            raise ValueError(f"this network takes inputs (B, {', '.join(map(str, size))}), got {tuple(x.shape)}")
        c = self.condition(t, labels)
        h = self.embed(patchify(x, self.patch_size).to(self.embed.weight.dtype))
        h = h + self.positions.to(h.dtype)
        for block, table, sequences in zip(self.blocks, self.tables, self.sequences, strict=False):
            orders = None if table is None else getattr(self, table)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, c, orders, sequences, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, c, orders, sequences)
        return unpatchify(self.final(h, c), self.patch_size, self.input_size).to(x.dtype)


def dim_s(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-S's width and depth, some 18 M parameters in its blocks; options are those of :class:`DiM`."""
    return DiM(input_size, **{"d_model": 384, "depth": 12} | options)


def dim_b(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-B's width and depth, some 70 M parameters."""
    return DiM(input_size, **{"d_model": 768, "depth": 12} | options)


def dim_l(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-L's width and depth, some 240 M parameters."""
    return DiM(input_size, **{"d_model": 1024, "depth": 24} | options)


def dim_xl(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-XL's width and depth, some 350 M parameters."""
    return DiM(input_size, **{"d_model": 1152, "depth": 28} | options)


def dim_s_2x(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-S's width and twice its depth: about its parameters."""
    return DiM(input_size, **{"d_model": 384, "depth": 24} | options)


def dim_b_2x(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-B's width and twice its depth: about its parameters."""
    return DiM(input_size, **{"d_model": 768, "depth": 24} | options)


def dim_l_2x(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-L's width and twice its depth: about its parameters."""
    return DiM(input_size, **{"d_model": 1024, "depth": 48} | options)


def dim_xl_2x(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-XL's width and twice its depth: about its parameters."""
    return DiM(input_size, **{"d_model": 1152, "depth": 56} | options)


def dim_s_mlp(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-S with another mixer: its width, depth, MLPs and about its parameters."""
    return DiM(input_size, **{"d_model": 384, "depth": 12, "expand": 4 / 3, "mlp_ratio": 4} | options)


def dim_b_mlp(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-B with another mixer: its width, depth, MLPs and about its parameters."""
    return DiM(input_size, **{"d_model": 768, "depth": 12, "expand": 4 / 3, "mlp_ratio": 4} | options)


def dim_l_mlp(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-L with another mixer: its width, depth, MLPs and about its parameters."""
    return DiM(input_size, **{"d_model": 1024, "depth": 24, "expand": 21 / 16, "mlp_ratio": 4} | options)  # 21 heads


def dim_xl_mlp(input_size: Sequence[int], **options: Any) -> DiM:
    """DiT-XL with another mixer: its width, depth, MLPs and about its parameters."""
    return DiM(input_size, **{"d_model": 1152, "depth": 28, "expand": 4 / 3, "mlp_ratio": 4} | options)


def dim_debug(input_size: Sequence[int], **options: Any) -> DiM:
    """Seconds on a CPU, for tests."""
    return DiM(input_size, **{"d_model": 32, "depth": 2, "d_state": 8, "headdim": 16} | options)
