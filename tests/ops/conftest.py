"""The oracle of the operator tests: the recurrence written from the equations, in float64, on autograd."""

import pytest
import torch
from torch import Tensor

from mambavision.ops import selective_scan


def _per_channel(mat: Tensor, dim: int) -> Tensor:
    """(D, N), (B, N, L) or (B, G, N, L) -> broadcastable to (B, D, N, L)."""
    if mat.ndim == 2:
        return mat[None, :, :, None]
    if mat.ndim == 3:
        mat = mat[:, None]
    return mat.repeat_interleave(dim // mat.shape[1], dim=1)


def _oracle(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, initial_state=None
) -> tuple[Tensor, Tensor]:
    """y (B, D, L) and the last state (B, D, N), both float64."""
    u, delta, A, B, C = (value.double() for value in (u, delta, A, B, C))
    batch, dim, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias.double()[:, None]
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    B = _per_channel(B, dim).expand(batch, dim, -1, length)
    C = _per_channel(C, dim).expand(batch, dim, -1, length)
    h = u.new_zeros(batch, dim, A.shape[1]) if initial_state is None else initial_state.double()
    ys = []
    for t in range(length):
        dt = delta[:, :, t, None]
        h = torch.exp(dt * A) * h + dt * B[..., t] * u[:, :, t, None]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D.double()[:, None] * u
    if z is not None:
        y = y * z.double() * torch.sigmoid(z.double())
    return y, h


def _multi_oracle(
    x, delta, A, B, C, D=None, *, perms, delta_bias=None, delta_softplus=True, dt_weight=None, initial_state=None
) -> tuple[Tensor, Tensor]:
    """Every scan explicitly permuted there and back: y (B, L, K, D) in token order, last states (B, K, D, N)."""
    if dt_weight is not None:
        delta = torch.einsum("blkr,kdr->blkd", delta.double(), dt_weight.double())
    ys, states = [], []
    for k, perm in enumerate(perms):
        perm = torch.as_tensor(perm).long()
        y, state = _oracle(
            x[:, perm].transpose(1, 2),
            delta[:, perm, k].transpose(1, 2),
            A[k],
            B[:, perm, k].transpose(1, 2),
            C[:, perm, k].transpose(1, 2),
            None if D is None else D[k],
            None,
            None if delta_bias is None else delta_bias[k],
            delta_softplus,
            None if initial_state is None else initial_state[:, k],
        )
        ys.append(y.transpose(1, 2)[:, torch.argsort(perm)])
        states.append(state)
    return torch.stack(ys, dim=2), torch.stack(states, dim=1)


def _rel(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, in float64; NaN when anything is NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.fixture(scope="session")
def scan_oracle():
    return _oracle


@pytest.fixture(scope="session")
def multi_oracle():
    return _multi_oracle


@pytest.fixture(scope="session")
def rel():
    return _rel


@pytest.fixture(scope="session")
def c_library_not_built() -> str:
    """The reason, where this install has no C library; an empty string where it has, even a broken one."""
    one = torch.ones(1, 1, 1)
    try:
        selective_scan(one, one, -torch.ones(1, 1), one, one, backend="cpu")
    except RuntimeError as error:
        return str(error) if "not built" in str(error) else ""
    return ""


@pytest.fixture(autouse=True)
def _skip_without_the_c_library(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("backend") == "cpu":
        reason = request.getfixturevalue("c_library_not_built")
        if reason:
            pytest.skip(reason)
