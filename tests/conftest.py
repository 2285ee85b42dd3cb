"""Fixtures of all tests: the shared folder, thread count, NaN in fresh memory, and which tests need a GPU."""

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

torch.set_num_threads(1)  # tensors here are tiny: on a busy machine a second thread makes them 50 times slower


def shared(*parts: str) -> Path:
    """Path inside the `shared` folder beside the checkout; skips the test where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not here: it lies beside the project's own checkout only")
    return path


@pytest.fixture
def shared_dir() -> Path:
    """The `shared` folder beside the checkout."""
    return shared()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill `torch.empty` and `empty_like` with NaN for kernels and ops, so that an unwritten output shows."""
    if request.path.parent.name not in ("kernels", "ops"):
        return

    def poisoned(allocate):
        def filled(*args, **kwargs) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
