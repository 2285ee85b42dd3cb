import platform
import subprocess
import sys

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_kept_memory_is_not_paged_in_anew():
    script = """
import resource, torch
from mambavision.engine.memory import give_freed_memory_back, keep_freed_memory
def pages(count=2**26):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(count, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = [pages(), pages()]
keep_freed_memory()
found += [pages(2**27), pages()]
give_freed_memory_back()
print(*found, pages())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fresh, again, kept, free, back = map(int, run.stdout.split())
    if min(fresh, again) < 1000:
        pytest.skip("this system counts no pages")
    assert kept > 1000 and free < 100 and back > 1000


@pytest.mark.gpu
def test_the_peak_of_a_call_on_a_gpu_is_measured():
    kept = torch.ones(2**20, device="cuda")
    assert measure_peak(lambda: (kept + 1).sum(), "cuda") == pytest.approx(4 * 2**20, rel=0.01)
