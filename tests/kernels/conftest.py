"""Fixtures that run the kernels in CUDA C++ on CPU tensors, and the same tests on a GPU."""

from collections.abc import Iterator

import pytest

from mambavision.kernels import cuda, nvrtc
from mambavision.ops import dispatch
from tests.kernels.emulated import Emulator, why_not


@pytest.fixture
def emulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Host code of the CUDA kernels takes CPU tensors, and ``backend="cuda"`` too, as on a GPU of one processor.

    Compiled kernels are kept in pytest's cache folder, if it has one.
    """
    if why_not():
        pytest.skip(why_not())
    if hasattr(request.config, "cache"):
        folder = request.config.cache.mkdir("emulated")
    else:
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
    emulator = Emulator(folder)
    unavailable = dispatch.unavailable

    def available(backend, device, *rest):
        return None if (backend, device) == ("cuda", "cpu") else unavailable(backend, device, *rest)

    monkeypatch.setattr(nvrtc, "kernel", lambda *args: emulator.kernel(*args))
    monkeypatch.setattr(nvrtc, "launch", lambda *args: emulator.launch(*args))
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "processors", lambda device: emulator.processors)
    monkeypatch.setattr(nvrtc, "shared_memory", lambda device: emulator.shared)
    monkeypatch.setattr(dispatch, "unavailable", available)
    _forget()
    yield emulator
    _forget()


def _forget() -> None:
    """Plans that were made for a machine with other processors."""
    for cached in (cuda.scans_of, dispatch._planned):
        cached.cache_clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> str:
    """Where tensors are: on the CPU, kernels emulated, or on a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("emulator")
    return request.param
