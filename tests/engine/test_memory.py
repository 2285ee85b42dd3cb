import pytest
import torch

from mambavision.engine import memory
from mambavision.engine.memory import free_memory, is_out_of_memory, peak_memory


def test_free_memory_is_within_a_containers_limit(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"}

    class File:
        def __init__(self, *parts):
            self.path = "/".join(parts)

        def read_text(self):
            if self.path not in files:
                raise FileNotFoundError(self.path)
            return files[self.path]

    assert free_memory("cpu") > 2**20
    monkeypatch.setattr(memory, "Path", File)
    assert free_memory("cpu") == 4000 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert free_memory("cpu") == 4000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "5000\n"
    assert free_memory("cpu") == 4000


def test_running_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_peak_of_a_call(monkeypatch):
    def hungry():
        torch.ones(50_000_000, dtype=torch.uint8)
        torch.ones(80_000_000, dtype=torch.uint8)

    taken = peak_memory(hungry, "cpu")
    assert taken is None or 75e6 < taken < 110e6

    class NoLinux:
        def __init__(self, *parts):
            pass

        def write_text(self, text):
            raise FileNotFoundError

    monkeypatch.setattr(memory, "Path", NoLinux)
    assert peak_memory(hungry, "cpu") is None


@pytest.mark.gpu
def test_peak_of_a_call_on_a_gpu():
    kept = torch.ones(10_000_000, device="cuda")
    assert 2e8 <= peak_memory(lambda: torch.ones(50_000_000, device="cuda"), "cuda") < 2.1e8
    del kept
