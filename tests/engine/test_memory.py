import pytest
import torch

from mambavision.engine import memory
from mambavision.engine.memory import free_memory, is_out_of_memory, measure_peak


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


def test_the_peak_of_a_call_is_measured():
    def call(megabytes):
        torch.ones(megabytes, 2**18).add_(1)  # freed at the end

    for _ in range(2):  # the second time the process may hold what the first has freed
        peak = measure_peak(lambda: call(300), "cpu")
        assert peak is None or 300 * 2**20 <= peak + 2**22 and peak < 400 * 2**20
    small = measure_peak(lambda: call(10), "cpu")
    assert small is None or small < 100 * 2**20  # not the peaks before


@pytest.mark.gpu
def test_the_peak_of_a_call_on_a_gpu_is_measured():
    kept = torch.ones(2**20, device="cuda")
    assert measure_peak(lambda: (kept + 1).sum(), "cuda") == pytest.approx(4 * 2**20, rel=0.01)
