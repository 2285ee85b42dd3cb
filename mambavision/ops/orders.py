"""Scan orders: in which sequence a grid's tokens are visited. An order is an index table, never a copy of tokens."""

import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mambavision.ops.compile import constant_result, register
from mambavision.ops.constants import kept_tensors

ScanOrder = Literal[
    "row", "row_reverse", "col", "col_reverse", "serpentine", "serpentine_reverse",
    "serpentine_col", "serpentine_col_reverse", "serpentine_mirror", "serpentine_mirror_reverse",
    "serpentine_col_mirror", "serpentine_col_mirror_reverse", "zigzag", "zigzag_reverse", "hilbert", "hilbert_reverse",
    "window", "window_reverse", "time", "time_reverse",
]  # fmt: skip
Preset = Literal["unidirectional", "bidirectional", "cross"]
Grid = tuple[int, int] | tuple[int, int, int]

PRESETS: dict[str, tuple[ScanOrder, ...]] = {
    "unidirectional": ("row",),
    "bidirectional": ("row", "row_reverse"),
    "cross": ("row", "col", "row_reverse", "col_reverse"),
}
WINDOW = 8
ORDERS = get_args(ScanOrder)
_tables: dict[tuple[tuple[ScanOrder, ...], Grid, str], Tensor] = {}


class OrderTable(NamedTuple):
    """K checked scan orders: ``index`` is int32 (K, L); index[k, t] is the token of scan k at step t."""

    index: Tensor


def _row(tokens: NDArray) -> NDArray:
    return tokens


def _col(tokens: NDArray) -> NDArray:
    return tokens.swapaxes(-1, -2)


def _time(tokens: NDArray) -> NDArray:
    return np.moveaxis(tokens, 0, -1)


def _serpentine(tokens: NDArray) -> NDArray:
    lines = tokens.reshape(-1, tokens.shape[-1]).copy()  # every second line is walked backwards
    lines[1::2] = lines[1::2, ::-1].copy()
    return lines


def _serpentine_col(tokens: NDArray) -> NDArray:
    return _serpentine(_col(tokens))


def _serpentine_mirror(tokens: NDArray) -> NDArray:
    return _serpentine(tokens[..., ::-1])


def _serpentine_col_mirror(tokens: NDArray) -> NDArray:
    return _serpentine_col(tokens[..., ::-1, :])


def _by_key(key: Callable[[NDArray, NDArray], tuple[NDArray, ...]]) -> Callable[[NDArray], NDArray]:
    """Order each frame's tokens by keys of their (row, column), most significant key first."""

    def visit(tokens: NDArray) -> NDArray:
        row, col = np.indices(tokens.shape[-2:]).reshape(2, -1)
        frames = tokens.reshape(-1, row.size)
        return frames[:, np.lexsort(key(row, col)[::-1])]

    return visit


def _zigzag_key(row: NDArray, col: NDArray) -> tuple[NDArray, ...]:
    diagonal = row + col
    return diagonal, np.where(diagonal % 2, row, col)


def _hilbert_key(row: NDArray, col: NDArray) -> tuple[NDArray, ...]:
    """Position on the Hilbert curve of the smallest enclosing power-of-two square, from the largest quadrant down."""
    x, y, position = col.copy(), row.copy(), np.zeros_like(row)
    side = 1 << int(max(row.max(), col.max())).bit_length()
    while side := side >> 1:
        right, down = (x & side) > 0, (y & side) > 0
        position += side * side * ((3 * right) ^ down)
        flip = ~down & right
        x, y = np.where(flip, side - 1 - (x & (side - 1)), x), np.where(flip, side - 1 - (y & (side - 1)), y)
        x, y = np.where(~down, y, x), np.where(~down, x, y)
    return (position,)


def _window_key(row: NDArray, col: NDArray) -> tuple[NDArray, ...]:
    return row // WINDOW, col // WINDOW, row, col


_VISITS: dict[str, Callable[[NDArray], NDArray]] = {
    "row": _row,
    "col": _col,
    "time": _time,
    "serpentine": _serpentine,
    "serpentine_col": _serpentine_col,
    "serpentine_mirror": _serpentine_mirror,
    "serpentine_col_mirror": _serpentine_col_mirror,
    "zigzag": _by_key(_zigzag_key),
    "hilbert": _by_key(_hilbert_key),
    "window": _by_key(_window_key),
}
_REVERSED = {f"{name}_reverse": visit for name, visit in _VISITS.items()}


@constant_result
def scan_order(name: ScanOrder, grid: Grid) -> Tensor:
    """Index table of one named order: an int64 tensor (L,), entry t is the token visited at step t.

    Tokens are numbered row-major over ``grid``, (H, W) or (T, H, W). Each name has a ``_reverse`` twin.

    - row, col: line by line, column by column (in a video, frame after frame)
    - serpentine, serpentine_col: the same with every second line backwards, so that neighbours stay neighbours;
      from the top left corner, with _mirror from the top right one (serpentine) and the bottom left one (_col)
    - zigzag: along anti-diagonals, as JPEG does
    - hilbert: the Hilbert curve of the smallest enclosing power-of-two square, tokens outside the grid left out
    - window: 8x8 windows in row order, row order inside
    - time: all frames of one position, then the next position (videos only)

    Raises ValueError for an unknown name or grid, or for ``time`` on a grid without frames.
    """
    if name not in ORDERS:
        raise ValueError(f"unknown scan order {name!r}: use one of {', '.join(ORDERS)}, or a permutation")
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise ValueError(f"grid must be (H, W) or (T, H, W) with positive sizes, got {tuple(grid)}")
    if name.startswith("time") and len(grid) == 2:
        raise ValueError(f"order {name!r} needs a grid (T, H, W), got {tuple(grid)}")
    tokens = np.arange(np.prod(grid)).reshape(grid)
    if name in _REVERSED:
        visited = _REVERSED[name](tokens).reshape(-1)[::-1]
    else:
        visited = _VISITS[name](tokens).reshape(-1)
    return torch.from_numpy(visited.copy())


def order_table(
    orders: Preset | Sequence[ScanOrder | ArrayLike | Tensor], grid: Grid, device: torch.device | str = "cpu"
) -> OrderTable:
    """Check K orders over a grid and put them in one table; named ones are remembered.

    Args:
        orders: a preset, or K order names and permutations of range(L).
        grid: (H, W) or (T, H, W), L tokens.

    Raises ValueError for a permutation of the wrong length or one that does not visit each token once.
    """
    orders = PRESETS.get(orders, (orders,)) if isinstance(orders, str) else orders
    if len(orders) == 0:
        raise ValueError("orders is empty: give at least one scan order")
    if all(isinstance(order, str) for order in orders):
        if torch.compiler.is_compiling():
            named = [ORDERS.index(name) for name in orders]
            return OrderTable(torch.ops.mambavision.order_table(named, grid, torch.device(device)))
        return OrderTable(_named_table(tuple(orders), tuple([operator.index(size) for size in grid]), str(device)))
    length = int(np.prod(grid))
    rows = [scan_order(o, grid) if isinstance(o, str) else _permutation(o, length) for o in orders]
    return OrderTable(torch.stack(rows).to(device=device, dtype=torch.int32))


def _named_table(orders: tuple[ScanOrder, ...], grid: Grid, device: str) -> Tensor:
    key = orders, grid, device
    if key not in _tables:
        with kept_tensors():
            table = torch.stack([scan_order(name, grid) for name in orders]).to(device=device, dtype=torch.int32)
        if type(table) is not Tensor:  # a fake one, of a FakeTensorMode
            return table
        _tables[key] = table
    return _tables[key]


# A compiled graph asks for its tables when it runs: Dynamo takes one constant tensor of a name, a network has a grid a
# level. The copy is because Inductor may write over what an operator returned once it is read.
def _table_in_graph(orders: Sequence[int], grid: Sequence[int], device: torch.device) -> Tensor:
    return _named_table(tuple([ORDERS[order] for order in orders]), tuple(grid), str(device)).clone()


def _table_in_graph_like(orders: Sequence[int], grid: Sequence[int], device: torch.device) -> Tensor:
    length = 1
    for size in grid:
        length *= size
    return torch.empty(len(orders), length, dtype=torch.int32, device=device)


register(_table_in_graph, "order_table", fake=_table_in_graph_like)


def _permutation(order: ArrayLike | Tensor, length: int) -> Tensor:
    index = torch.as_tensor(order).detach().cpu()
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"a scan order must hold integers, got {str(index.dtype).removeprefix('torch.')}")
    if index.shape != (length,):
        raise ValueError(f"a scan order over {length} tokens must have shape ({length},), got {tuple(index.shape)}")
    index = index.long()
    if not torch.equal(index.sort().values, torch.arange(length)):
        raise ValueError(f"a scan order must visit each of the {length} tokens exactly once; this one does not")
    return index
