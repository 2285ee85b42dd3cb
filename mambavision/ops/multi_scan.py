"""Several selective scans over one grid of tokens, each in its own order, merged in image coordinates."""

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mambavision.ops.dispatch import Backend, scan
from mambavision.ops.orders import Grid, OrderTable, Preset, ScanOrder, order_table


def multi_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    orders: Preset | Sequence[ScanOrder | ArrayLike | Tensor] | OrderTable,
    grid: Grid,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    dt_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    merge: bool = True,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan channels-last tokens along K orders; tokens are addressed by index tables, never permuted.

    With i_t = order_k[t] and delta = softplus(delta + delta_bias) where asked, for every scan k::

        h_t = exp(delta_i A_k) h_{t-1} + delta_i B_i x_i        y_k[i_t] = C_i . h_t + D_k x_i        y = sum_k y_k

    Projections are per token and commute with a permutation: compute delta, B and C once, in image order.

    Args:
        x: (batch, L, D) tokens in image order, L = H W or T H W.
        delta: (batch, L, K, D); or, with ``dt_weight`` (K, D, R), its low-rank form (batch, L, K, R).
        A: (K, D, N), negative reals, used in float32.
        B, C: (batch, L, K, N).
        D, delta_bias: (K, D).
        orders: a preset ("unidirectional", "bidirectional", "cross"), K names and permutations, or an
            :class:`OrderTable` made once by :func:`order_table` (permutations are checked at every call otherwise).
        grid: (H, W) or (T, H, W).
        initial_state: (batch, K, D, N); zeros if not given.
        merge: sum over the K scans.

    Returns:
        y (batch, L, D), or (batch, L, K, D) without ``merge``, in x's dtype; with ``return_last_state`` also the last
        states (batch, K, D, N).

    Raises:
        ValueError: shapes that do not fit, or an order that is no permutation of the grid.
        RuntimeError: the backend asked for cannot run the call.

    Source: VMamba, arXiv 2401.10166, section 4.2 (cross-scan); the recurrence is Mamba's, arXiv 2312.00752.
    """
    if dt_weight is not None:
        delta = low_rank_delta(*_checked_low_rank(x, delta, A, dt_weight))
    tensors = (x, delta, A, B, C, D, delta_bias, initial_state, order_index(orders, grid, x))
    y, state = scan(*tensors, delta_softplus, merge, backend, want_state=return_last_state, check=(_check,))
    return (y, state) if return_last_state else y


def _check(shapes: Sequence[torch.Size | None]) -> None:
    x, delta, A, B, C, D, delta_bias, initial_state, order, _ = shapes
    batch, length, channels, K, N = sizes(x, A)
    check_shapes(
        orders=(order, (K, length)),
        B=(B, (batch, length, K, N)),
        C=(C, (batch, length, K, N)),
        D=(D, (K, channels)),
        delta_bias=(delta_bias, (K, channels)),
        initial_state=(initial_state, (batch, K, channels, N)),
        delta=(delta, (batch, length, K, channels)),
    )


def _checked_low_rank(x: Tensor, delta: Tensor, A: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, channels, K, _ = sizes(x.shape, A.shape)
    R = delta.shape[-1]
    check_shapes(delta=(delta.shape, (batch, length, K, R)), dt_weight=(dt_weight.shape, (K, channels, R)))
    return delta, dt_weight


def sizes(x: torch.Size, A: torch.Size) -> tuple[int, int, int, int, int]:
    """batch, L, D, K and N from the shapes of x and A."""
    if len(x) != 3 or x[1] == 0:
        raise ValueError(f"x must be (batch, L, D) with L at least 1, got {tuple(x)}")
    if len(A) != 3 or A[1] != x[2]:
        raise ValueError(f"A must be (K, {x[2]}, N), got {tuple(A)}")
    return *x, A[0], A[2]


def check_shapes(**expected: tuple[torch.Size | None, tuple[int, ...]]) -> None:
    """Raises ValueError for a shape that is there and not as expected."""
    for name, (shape, wanted) in expected.items():
        if shape is not None and tuple(shape) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(shape)}")


def order_index(
    orders: Preset | Sequence[ScanOrder | ArrayLike | Tensor] | OrderTable, grid: Grid, x: Tensor
) -> Tensor:
    """The table of orders over the tokens of x; raises ValueError where the grid has not as many."""
    tokens = 1
    for size in grid:
        tokens *= size
    if x.dim() == 3 and tokens != x.shape[1]:
        raise ValueError(f"grid {tuple(grid)} has {tokens} tokens, x has {x.shape[1]}")
    table = orders if isinstance(orders, OrderTable) else order_table(orders, grid, x.device)
    return table.index


def low_rank_delta(dt: Tensor, weight: Tensor) -> Tensor:
    """(batch, L, K, D) from dt (batch, L, K, R) and weight (K, D, R): a product for each scan, and no copy of dt."""
    batch, length, K, _ = dt.shape
    delta = torch.bmm(dt.flatten(0, 1).transpose(0, 1), weight.to(dt.dtype).mT)  # (K, batch L, D)
    return delta.view(K, batch, length, weight.shape[1]).permute(1, 2, 0, 3)
