"""Several selective scans over one grid of tokens, each in its own order, merged in image coordinates."""

from collections.abc import Sequence

from numpy.typing import ArrayLike
from torch import Tensor

from mambavision.ops.dispatch import Backend, scan
from mambavision.ops.low_rank import low_rank_scan
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
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, L, D) with L at least 1, got {tuple(x.shape)}")
    batch, length, channels = x.shape
    if A.dim() != 3 or A.shape[1] != channels:
        raise ValueError(f"A must be (K, {channels}, N), got {tuple(A.shape)}")
    K, _, N = A.shape
    tokens = 1
    for size in grid:
        tokens *= size
    if tokens != length:
        raise ValueError(f"grid {tuple(grid)} has {tokens} tokens, x has {length}")
    table = orders if isinstance(orders, OrderTable) else order_table(orders, grid, x.device)
    expected = {
        "orders": (table.index, (K, length)),
        "B": (B, (batch, length, K, N)),
        "C": (C, (batch, length, K, N)),
        "D": (D, (K, channels)),
        "delta_bias": (delta_bias, (K, channels)),
        "initial_state": (initial_state, (batch, K, channels, N)),
    }
    if dt_weight is None:
        expected["delta"] = (delta, (batch, length, K, channels))
    else:
        R = delta.shape[-1]
        expected["delta"] = (delta, (batch, length, K, R))
        expected["dt_weight"] = (dt_weight, (K, channels, R))
    for name, (v, shape) in expected.items():
        if v is not None and tuple(v.size()) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(v.shape)}")
    options = (D, delta_bias, initial_state, table.index, delta_softplus, merge, backend)
    if dt_weight is None:
        y, state = scan(x[:, :, None], delta, A, B, C, *options)
    else:
        y, state = low_rank_scan(x[:, :, None], delta, dt_weight, A, B, C, *options)
    return (y, state) if return_last_state else y
