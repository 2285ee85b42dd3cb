"""How much memory there is to use and a call takes, and telling that it ran out."""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

GROWING_SEGMENTS = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def free_memory(device: str | torch.device) -> int:
    """Bytes that this process could still allocate on a device.

    Of a GPU: what the driver calls free, and what torch holds unused. Of the CPU: what Linux calls available, less
    where a control group (a container's limit) allows less; elsewhere the unused pages.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _available()
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(free, 0)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_peak(call: Callable[[], object], device: str | torch.device) -> int | None:
    """Make a call and return the most bytes it held on a device beyond what was there, what it returns included.

    Of the CPU these are what Linux calls resident bytes of the process; None on other systems.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        give_freed_memory_back()  # what the process holds and uses anew would not be seen
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _resident("VmRSS")
    except OSError:  # not Linux
        before = None
    call()
    return None if before is None else _resident("VmHWM") - before


def segments_grow() -> bool:
    """Whether the environment asks torch's allocator on GPUs for segments that grow, between which no gaps are left."""
    asked = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    return any("expandable_segments:true" in settings.replace(" ", "").lower() for settings in asked)


def keep_freed_memory() -> None:
    """Let the process keep the CPU memory that it frees, so that the next large tensors are not paged in page by page.

    Inference on a CPU may take half the time, and hold half as much memory again. With glibc; else nothing changes.
    :func:`give_freed_memory_back` returns what is unused.
    """
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        _call_libc("mallopt", parameter, value)


def give_freed_memory_back() -> None:
    """Return to the system the CPU memory that this process has freed. With glibc; elsewhere nothing happens."""
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        getattr(ctypes.CDLL(None), name)(*arguments)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in said)
