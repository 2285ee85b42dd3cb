"""The selective scan with the arguments of mamba_ssm."""

from torch import Tensor

from mambavision.ops.dispatch import Backend, scan


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with an input-dependent linear recurrence; drop-in for ``mamba_ssm.selective_scan_fn``.

    Per channel, with delta = softplus(delta + delta_bias) where asked::

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = (C_t . h_t + D u_t) silu(z_t)

    Args:
        u, delta, z: (batch, D, L), float32, bfloat16 or float16 (float64 runs on ``reference`` and ``chunked``).
        A: (D, N), negative reals.
        B, C: (D, N), (batch, N, L) or (batch, G, N, L); group g serves channels [g D/G, (g+1) D/G).
        D, delta_bias: (D,).
        initial_state: h_0, (batch, D, N); zeros if not given.

    Returns:
        y (batch, D, L) in u's dtype; with ``return_last_state`` also h_L (batch, D, N) in float32. All inputs and both
        outputs are differentiable.

    Raises:
        ValueError: shapes that do not fit, or complex A.
        RuntimeError: the backend asked for cannot run the call.

    Source: Gu and Dao, "Mamba", arXiv 2312.00752, algorithm 2.
    """
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, D, L), got {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.is_complex():
        raise ValueError("complex A is not supported: use a real A (S4D-real)")
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be ({channels}, N), got {tuple(A.shape)}")
    N = A.shape[1]
    B, C = _grouped("B", B, u, N), _grouped("C", C, u, N)
    G = max(B.shape[1], C.shape[1])
    if B.shape[1] != C.shape[1]:
        if G != channels:
            raise ValueError(f"B has {B.shape[1]} groups, C has {C.shape[1]}: they must agree")
        B, C = (v.repeat_interleave(G // v.shape[1], 1) for v in (B, C))  # one of them is constant in time
    _check("delta", delta, (batch, channels, length))
    for name, v in (("D", D), ("delta_bias", delta_bias)):
        if v is not None:
            _check(name, v, (channels,))
    if z is not None:
        _check("z", z, (batch, channels, length))
    if initial_state is not None:
        _check("initial_state", initial_state, (batch, channels, N))
    if length == 0:
        raise ValueError("u has no tokens: L must be at least 1")

    def tokens(v: Tensor) -> Tensor:
        return v.reshape(batch, G, channels // G, length).permute(0, 3, 1, 2)  # (batch, L, G, D / G)

    def grouped(v: Tensor | None, *shape: int) -> Tensor | None:
        return None if v is None else v.reshape(*shape)

    y, state = scan(
        tokens(u),
        tokens(delta),
        A.reshape(G, channels // G, N),
        B.permute(0, 3, 1, 2),
        C.permute(0, 3, 1, 2),
        grouped(D, G, channels // G),
        grouped(delta_bias, G, channels // G),
        grouped(initial_state, batch, G, channels // G, N),
        None,
        delta_softplus,
        False,
        backend,
        z=None if z is None else tokens(z),
        want_state=return_last_state,
    )
    y = y.flatten(2).transpose(1, 2)
    return (y, state.flatten(1, 2)) if return_last_state else y


def _grouped(name: str, v: Tensor, u: Tensor, N: int) -> Tensor:
    """B or C as (batch, G, N, L)."""
    batch, channels, length = u.shape
    if v.dim() == 2 and v.shape == (channels, N):  # constant in time: one group a channel
        return v[None, :, :, None].expand(batch, channels, N, length)
    if v.shape == (batch, N, length):
        return v[:, None]
    if v.dim() == 4 and (v.shape[0], *v.shape[2:]) == (batch, N, length) and channels % v.shape[1] == 0:
        return v
    raise ValueError(
        f"{name} must be ({channels}, {N}), ({batch}, {N}, {length}) or ({batch}, G, {N}, {length}) with G dividing "
        f"{channels}, got {tuple(v.shape)}"
    )


def _check(name: str, v: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(v.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(v.shape)}")
