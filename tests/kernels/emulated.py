"""Kernels in CUDA C++ on the CPU: their sources through g++ and emulator/, launched on CPU tensors.

:class:`Emulator` stands in for ``kernel`` and ``launch`` of ``mambavision.kernels.nvrtc``: host code runs as it is.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HEADERS = tuple(Path(__file__).with_name("emulator") / name for name in ("cuda.h", "intrinsics.h"))
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
FLAGS += ("-fvisibility=hidden", "-fno-gnu-unique", "-ftrivial-auto-var-init=pattern")
ASCENDING, DESCENDING, RANDOM = 0, 1, 2  # orders of a block's threads; RANDOM and above are seeds

ENTRY = """
extern "C" __attribute__((visibility("default")))
const char *emulate(unsigned blocks, unsigned threads, unsigned shared, int order, const void *argument) {{
    const auto call = [](const void *argument) {{ emulator::call({name}, argument); }};
    return emulator::run(call, blocks, threads, shared, order, argument);
}}
"""


def why_not() -> str:
    """Why nothing can be emulated here, or an empty string."""
    return "" if COMPILER else "no g++ on the path"


def guarded(v: Tensor, at_end: bool) -> Tensor:
    """The same dense tensor between two pages that no one may touch: an access outside is an error of the launch.

    ``at_end``: it ends (to 15 bytes) where the second page begins, else it begins where the first one ends.
    """
    page, size = mmap.PAGESIZE, v.numel() * v.itemsize
    if not size:
        return v
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for border in (address, address + page + inner):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(border), ctypes.c_size_t(page), 0) == 0
    start = page + (inner - size) // 16 * 16 * at_end
    flat = torch.frombuffer(memory, dtype=v.dtype, count=v.numel(), offset=start)
    return flat.as_strided(v.shape, v.stride()).copy_(v)


class Kernel:
    """A compiled kernel and the bytes of dynamic shared memory that a block of it gets."""

    def __init__(self, library: Path, name: str, shared: int):
        self.name, self.shared = name, shared
        self.emulate = ctypes.PyDLL(str(library)).emulate  # one at a time
        self.emulate.restype = ctypes.c_char_p
        self.emulate.argtypes = (*[ctypes.c_uint] * 3, ctypes.c_int, ctypes.c_char_p)


class Emulator:
    """``order``: in which a block's threads run; ``launches``: kernels' names, blocks and threads so far.

    Libraries are kept in ``folder``. ``architecture``: what kernels see in ``__CUDA_ARCH__``; ``processors``: what host
    code plans for.
    """

    def __init__(self, folder: Path, architecture: int = 900):
        self.folder, self.architecture = folder, architecture
        self.order, self.processors, self.shared, self.launches = ASCENDING, 1, 227 << 10, []
        self.kernel = functools.cache(self._kernel)

    def _kernel(self, sources, name: str, defines: tuple[str, ...], device: int, shared: int = 0) -> Kernel:
        macros = "".join(f"#define {d.replace('=', ' ', 1)}\n" for d in defines)
        lines = [h.read_text() for h in HEADERS] + [f"#define __CUDA_ARCH__ {self.architecture}\n", macros]
        lines += [f'#line 1 "{s}"\n{s.read_text()}\n' for s in sources if s.name != "intrinsics.cuh"]
        text = "".join(lines) + ENTRY.format(name=name)
        key = hashlib.sha256("\n".join([text, COMPILER, *FLAGS]).encode()).hexdigest()[:24]
        library = self.folder / f"{name}-{key}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as work:
                made = Path(work) / "kernel.so"
                command = [COMPILER, *FLAGS, "-x", "c++", "-", "-o", str(made)]
                done = subprocess.run(command, input=text, text=True, capture_output=True)
                if done.returncode:
                    raise RuntimeError(f"g++ could not compile {name} with {' '.join(defines)}:\n{done.stderr[-3000:]}")
                os.replace(made, library)
        return Kernel(library, name, shared)

    def launch(self, function: Kernel, blocks: int, threads: int, argument: bytes, device: int) -> None:
        """Runs all blocks, one after the other; raises RuntimeError for what a GPU would hang or go wrong on."""
        self.launches.append((function.name, blocks, threads))
        error = function.emulate(blocks, threads, function.shared, self.order, argument)
        if error is not None:
            raise RuntimeError(f"{function.name}: {error.decode()}")
