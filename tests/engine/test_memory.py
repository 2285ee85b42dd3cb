import pytest
import torch

from mambavision.engine import memory
from mambavision.engine.memory import free_memory, is_out_of_memory


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
