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


def unavailable() -> str | None:
    """Why kernels cannot be compiled or launched on the current device, or None if they can."""
    return _missing() or _unknown(_architecture(torch.cuda.current_device()))


@functools.cache
def _missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        _nvrtc(), _driver()
    except OSError as error:
        return str(error)
    return None if torch.cuda.is_available() else "torch sees no GPU"


@functools.cache
def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # a CUdevice_attribute


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block may have."""
    driver, handle, size = _driver(), ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
    asking = (driver.cuDeviceGetAttribute, ctypes.byref(size), _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, handle)
    _call(device, f"asking device {device} for its shared memory", *asking)
    return size.value


@functools.cache
def _unknown(architecture: int) -> str | None:
    """Why this NVRTC cannot compile for an architecture, 90 for sm_90, or None if it can."""
    nvrtc, count = _nvrtc(), ctypes.c_int()
    _compiler(nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "to count its architectures")
    known = (ctypes.c_int * count.value)()
    _compiler(nvrtc.nvrtcGetSupportedArchs(known), "to list its architectures")
    if architecture in known:
        return None
    return f"NVRTC of CUDA {torch.version.cuda} compiles for sm_{min(known)} to sm_{max(known)}, not sm_{architecture}"


def _compiler(result: int, what: str) -> None:
    if result:
        describe = _nvrtc().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC failed {what}: {describe(result).decode()}")


def _cubin(source: str, options: tuple[str, ...]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    _compiler(created, "to take a source")
    try:
        flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        size = ctypes.c_size_t()
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC could not compile a kernel with {' '.join(options)}:\n{log.value.decode()}")
        _compiler(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "to measure a cubin")
        cubin = ctypes.create_string_buffer(size.value)
        _compiler(nvrtc.nvrtcGetCUBIN(program, cubin), "to hand over a cubin")
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _cache_file(source: str, options: tuple[str, ...]) -> pathlib.Path:
    key = hashlib.sha256("\n".join([source, *options, torch.version.cuda]).encode()).hexdigest()[:32]
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "mambavision" / f"{key}.cubin"


def _read(path: pathlib.Path) -> bytes | None:
    """A cached cubin behind its SHA-256, or None if there is no whole one: the driver cannot tell where a file ends."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _write(path: pathlib.Path, cubin: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
            f.write(hashlib.sha256(cubin).digest() + cubin)
        os.replace(f.name, path)
    except OSError:  # a read-only home costs a compilation in every process, nothing else
        pass


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'unknown CUDA error').decode()}")


_INVALID_CONTEXT = 201


def _bind(device: int) -> None:
    """Make a device's primary context the thread's: autograd's threads may call us before the CUDA runtime does."""
    driver, handle, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"taking the context of device {device}")
    _check(driver.cuCtxSetCurrent(context), f"entering the context of device {device}")


def _call(device: int, what: str, function, *arguments) -> None:
    """Call the driver; in a thread without a context, once more with the device's."""
    result = function(*arguments)
    if result == _INVALID_CONTEXT:
        _bind(device)
        result = function(*arguments)
    _check(result, what)


class Kernel(ctypes.c_void_p):
    """A loaded kernel; ``shared``: the bytes of dynamic shared memory a block of it gets, of ``most`` asked for."""

    shared = most = 0


_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # a CUfunction_attribute


def _load(cubin: bytes, name: str, device: int) -> Kernel:
    driver, module, function, context = _driver(), ctypes.c_void_p(), Kernel(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "asking for a context")
    if not context:
        _bind(device)
    _call(device, "loading a kernel", driver.cuModuleLoadData, ctypes.byref(module), cubin)
    finding = (driver.cuModuleGetFunction, ctypes.byref(function), module, name.encode())
    _call(device, f"finding kernel {name}", *finding)
    return function


def _sharing(function: Kernel, name: str, device: int, shared: int) -> Kernel:
    """The same kernel with so many bytes of dynamic shared memory a block: over 48 KB are given to those that ask."""
    if shared > function.most:
        asking = (_driver().cuFuncSetAttribute, function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        _call(device, f"giving kernel {name} {shared} bytes of shared memory", *asking)
        function.most = shared
    handle = Kernel(function.value)
    handle.shared = shared
    return handle


def _built(source: str, name: str, options: tuple[str, ...], device: int) -> Kernel:
    path = _cache_file(source, options)
    cubin = _read(path)
    if cubin is not None:
        try:
            return _load(cubin, name, device)
        except RuntimeError:  # what this driver does not take is compiled again, which replaces the file
            pass
    cubin = _cubin(source, options)
    _write(path, cubin)
    return _load(cubin, name, device)


@functools.cache
def kernel(
    sources: tuple[pathlib.Path, ...], name: str, defines: tuple[str, ...], device: int, shared: int = 0
) -> Kernel:
    """Handle of a kernel, compiled for a device with macros "NAME=value" from source files put one behind the other.

    ``shared``: the bytes of dynamic shared memory that a block needs. Kernels that differ in nothing else are one.
    """
    loaded = _compiled(sources, name, defines, device)
    return _sharing(loaded, name, device, shared) if shared else loaded


@functools.cache
def _compiled(sources: tuple[pathlib.Path, ...], name: str, defines: tuple[str, ...], device: int) -> Kernel:
    architecture = f"sm_{_architecture(device)}{'a' * ('TENSOR_ASYNC=1' in defines)}"  # what sm_90 alone can
    options = (f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{d}" for d in defines))
    text = "".join(f'#line 1 "{source.name}"\n{source.read_text()}\n' for source in sources)
    with torch.cuda.device(device):
        return _built(text, name, options, device)


class _Configuration(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("blocks", "y", "z", "threads", "threads_y", "threads_z", "shared")),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)),
    ]


@functools.lru_cache(4096)
def _configuration(blocks: int, threads: int, shared: int, stream: int) -> tuple[int, _Configuration]:
    """Its address, and what has to live as long."""
    configuration = _Configuration(blocks, 1, 1, threads, 1, 1, shared, stream, None, 0)
    return ctypes.addressof(configuration), configuration


_Argument = ctypes.c_char_p * 1


@functools.cache
def _launcher():
    launch = _driver().cuLaunchKernelEx
    launch.argtypes = (ctypes.c_void_p,) * 4
    return launch


def launch(function: Kernel, blocks: int, threads: int, argument: bytes, device: int) -> None:
    """Launch on torch's current stream of a device with one argument, passed by value."""
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return launch(function, blocks, threads, argument, device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    configuration, _kept = _configuration(blocks, threads, function.shared, stream)
    _call(device, "launching a kernel", _launcher(), configuration, function, _Argument(argument), None)
