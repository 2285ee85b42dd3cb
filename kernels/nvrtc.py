"""Compile CUDA C++ at first use with NVRTC, which torch's wheels ship: no nvcc, no build step. Cached on disk."""

import ctypes
import functools
import hashlib
import os
import pathlib
import sys
import tempfile

import torch


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = torch.version.cuda.split(".")[0]
    if sys.platform == "win32":
        named, pattern = f"nvrtc64_{major}0_0.dll", f"lib/nvrtc64_{major}*_0.dll"
        places = [pathlib.Path(torch.__file__).parent]
    else:
        named, pattern = f"libnvrtc.so.{major}", f"nvidia/*/lib/libnvrtc.so.{major}*"
        places = [pathlib.Path(p) for p in sys.path if p.endswith("-packages")]
    shipped = [str(f) for place in places for f in sorted(place.glob(pattern))]
    for candidate in (*shipped, named):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise OSError(f"{named} was not found beside torch or on the library path")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@functools.cache
def unavailable() -> str | None:
    """Why kernels cannot be compiled or launched here, or None if they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        _nvrtc(), _driver()
    except OSError as error:
        return str(error)
    return None


def _cubin(source: str, options: tuple[str, ...]) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"scan.cu", 0, None, None)
    try:
        flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile a kernel with {' '.join(options)}:\n{log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _cached_cubin(source: str, options: tuple[str, ...]) -> bytes:
    key = hashlib.sha256("\n".join([source, *options, torch.version.cuda]).encode()).hexdigest()[:32]
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(root) / "mambavision" / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = _cubin(source, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
            f.write(cubin)
        os.replace(f.name, path)
    except OSError:  # a read-only home costs a compilation in every process, nothing else
        pass
    return cubin


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown CUDA error').decode()}")


@functools.cache
def kernel(source: pathlib.Path, name: str, defines: tuple[str, ...], device: int) -> ctypes.c_void_p:
    """Handle of a kernel of a source file, compiled for a device with macros "NAME=value"."""
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    options = (f"--gpu-architecture=sm_{capability}", "--std=c++17", *(f"-D{d}" for d in defines))
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    cubin = _cached_cubin(source.read_text(), options)
    with torch.cuda.device(device):
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "loading a kernel")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding kernel {name}")
    return function


_Argument = ctypes.c_char_p * 1


@functools.cache
def _launcher():
    launch = _driver().cuLaunchKernel
    launch.argtypes = (ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return launch


def launch(function: ctypes.c_void_p, blocks: int, threads: int, argument: bytes, device: int) -> None:
    """Launch on torch's current stream of a device with one argument, passed by value."""
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return launch(function, blocks, threads, argument, device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    result = _launcher()(function, blocks, 1, 1, threads, 1, 1, 0, stream, _Argument(argument), None)
    if result:
        _check(result, "launching a kernel")
