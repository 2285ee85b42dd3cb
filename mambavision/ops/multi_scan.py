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
    batch, length, channels, K, N = sizes(x, A)
    token = (K, channels) if dt_weight is None else (K, delta.shape[-1])
    expected = {
        "B": (B, (batch, length, K, N)),
        "C": (C, (batch, length, K, N)),
        "D": (D, (K, channels)),
        "delta_bias": (delta_bias, (K, channels)),
        "initial_state": (initial_state, (batch, K, channels, N)),
        "delta": (delta, (batch, length, *token)),
        "dt_weight": (dt_weight, (K, channels, token[1])),
    }
    order = checked(orders, grid, x, K, expected)
    if dt_weight is not None:
        delta = low_rank_delta(delta, dt_weight)

    arguments = (x.unsqueeze(2), delta, A, B, C, D, delta_bias, initial_state, order, delta_softplus, merge)
    y, state = scan(*arguments, backend, want_state=return_last_state)
    return (y, state) if return_last_state else y


def sizes(x: Tensor, A: Tensor) -> tuple[int, int, int, int, int]:
    """batch, L, D, K and N."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, L, D) with L at least 1, got {tuple(x.shape)}")
    if A.dim() != 3 or A.shape[1] != x.shape[2]:
        raise ValueError(f"A must be (K, {x.shape[2]}, N), got {tuple(A.shape)}")
    return *x.shape, A.shape[0], A.shape[2]


def checked(
    orders: Preset | Sequence[ScanOrder | ArrayLike | Tensor] | OrderTable,
    grid: Grid,
    x: Tensor,
    K: int,
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]],
) -> Tensor:
    """The table of K orders over the tokens of x; raises ValueError where a tensor has not its expected shape."""
    tokens = 1
    for size in grid:
        tokens *= size
    if tokens != x.shape[1]:
        raise ValueError(f"grid {tuple(grid)} has {tokens} tokens, x has {x.shape[1]}")
    table = orders if isinstance(orders, OrderTable) else order_table(orders, grid, x.device)
    for name, (v, shape) in ({"orders": (table.index, (K, tokens))} | expected).items():
        if v is not None and tuple(v.size()) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(v.shape)}")
    return table.index


def low_rank_delta(dt: Tensor, weight: Tensor) -> Tensor:
    """(batch, L, K, D) from dt (batch, L, K, R) and weight (K, D, R): a product for each scan, and no copy of dt."""
    batch, length, K, _ = dt.shape
    delta = torch.bmm(dt.flatten(0, 1).transpose(0, 1), weight.to(dt.dtype).mT)  # (K, batch L, D)
    return delta.view(K, batch, length, weight.shape[1]).permute(1, 2, 0, 3)
