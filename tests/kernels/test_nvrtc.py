"""Compiling, caching and loading kernels: what needs no GPU. The driver here keeps one thread's context and no more."""

import contextlib

import pytest
import torch

from mambavision.kernels import nvrtc

SOURCE, NAME = 'extern "C" __global__ void one(int *p) { *p = 1; }', "one"
OPTIONS = ("--gpu-architecture=sm_90",)
DEVICE, CONTEXT = 3, 77

if torch.version.cuda is None:
    pytest.skip("this torch is built without CUDA", allow_module_level=True)


class Driver:
    """Modules load where a context is current and the image is a whole ELF file of ours."""

    def __init__(self, context: int | None, result: int = 0):
        self.context, self.result, self.images, self.asked, self.launched = context, result, [], [], []

    def cuDeviceGet(self, out, device):
        out._obj.value = 10 * device
        return 0

    def cuDevicePrimaryCtxRetain(self, out, handle):
        out._obj.value = CONTEXT if handle.value == 10 * DEVICE else 0
        return 0

    def cuCtxSetCurrent(self, context):
        self.context = context.value
        return 0

    def cuCtxGetCurrent(self, out):
        out._obj.value = self.context
        return 0

    def cuModuleLoadData(self, out, image):
        self.images.append(image)
        if self.context is None:
            return 201
        return self.result or (0 if image.startswith(b"\x7fELF") else 200)

    def cuModuleGetFunction(self, out, module, name):
        out._obj.value = 5
        return 0 if name == NAME.encode() else 500

    def cuFuncSetAttribute(self, function, attribute, value):
        self.asked.append((function.value, attribute, value))
        return 0

    def cuLaunchKernelEx(self, configuration, function, arguments, more):
        laid = nvrtc._Configuration.from_address(configuration)
        self.launched.append((function.value, *(getattr(laid, name) for name, _ in laid._fields_[:8]), arguments[0]))
        return 0

    def cuGetErrorName(self, result, out):
        out._obj.value = b"ERROR_%d" % result
        return 0


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def use(*args, **kwargs) -> Driver:
        driver = Driver(*args, **kwargs)
        monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
        return driver

    return use


def test_a_thread_without_a_context_is_given_the_devices(driver):
    used = driver(None)
    assert nvrtc._load(b"\x7fELF", NAME, DEVICE).value == 5
    assert used.context == CONTEXT and len(used.images) == 1


def test_a_context_in_place_is_left_alone(driver):
    used = driver(1)
    nvrtc._load(b"\x7fELF", NAME, DEVICE)
    assert used.context == 1 and len(used.images) == 1


def test_other_errors_are_named_and_not_tried_again(driver):
    used = driver(1, result=2)
    with pytest.raises(RuntimeError, match="loading a kernel failed: ERROR_2"):
        nvrtc._load(b"\x7fELF", NAME, DEVICE)
    assert len(used.images) == 1


@pytest.mark.parametrize("damage", ["cut", "emptied", "refused"])
def test_a_damaged_cubin_is_compiled_again(driver, damage):
    used = driver(1)
    nvrtc._built(SOURCE, NAME, OPTIONS, DEVICE)
    path = nvrtc._cache_file(SOURCE, OPTIONS)
    whole = path.read_bytes()
    if damage == "refused":
        nvrtc._write(path, b"not a cubin")
    else:
        path.write_bytes(whole[:-100] if damage == "cut" else b"")
    used.images.clear()
    assert nvrtc._built(SOURCE, NAME, OPTIONS, DEVICE).value == 5
    assert used.images == [b"not a cubin"] * (damage == "refused") + [whole[32:]]
    assert path.read_bytes() == whole and len(list(path.parent.iterdir())) == 1


def test_a_cached_cubin_is_not_compiled_again(driver, monkeypatch):
    driver(1)
    nvrtc._built(SOURCE, NAME, OPTIONS, DEVICE)
    monkeypatch.setattr(nvrtc, "_nvrtc", None)
    assert nvrtc._built(SOURCE, NAME, OPTIONS, DEVICE).value == 5


def test_kernels_that_differ_in_shared_memory_are_loaded_once(driver, monkeypatch, tmp_path):
    used, source = driver(1), tmp_path / "one.cu"
    source.write_text(SOURCE)
    monkeypatch.setattr(nvrtc, "_architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    sizes = (0, 70_000, 60_000, 80_000)
    kernels = [nvrtc.kernel((source,), NAME, (), DEVICE, shared) for shared in sizes]
    assert len(used.images) == 1 and used.asked == [(5, 8, 70_000), (5, 8, 80_000)]
    monkeypatch.setattr(nvrtc, "_launcher", lambda: used.cuLaunchKernelEx)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: DEVICE)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 11 * device)
    for kernel in kernels:
        nvrtc.launch(kernel, 12, 64, b"argument", DEVICE)
    assert used.launched == [(5, 12, 1, 1, 64, 1, 1, shared, 11 * DEVICE, b"argument") for shared in sizes]


def test_an_error_is_found_in_the_source_it_is_in(driver, monkeypatch, tmp_path):
    driver(1)
    sources = tmp_path / "first.cuh", tmp_path / "second.cu"
    sources[0].write_text("#define TWO 2\n")
    sources[1].write_text(f"{SOURCE}\n__device__ int f() {{ return TWO; }}\n__device__ int g() {{ return THREE; }}\n")
    monkeypatch.setattr(nvrtc, "_architecture", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match=r"second\.cu\(3\)(.|\n)*1 error"):
        nvrtc.kernel(sources, NAME, (), DEVICE)


def test_a_source_that_does_not_compile_is_reported_with_the_log():
    with pytest.raises(RuntimeError, match=r"sm_90(.|\n)*expected an? "):
        nvrtc._cubin("int f( {", OPTIONS)


def test_an_architecture_that_this_nvrtc_does_not_know_is_a_reason():
    assert nvrtc._unknown(90) is None
    assert "not sm_990" in nvrtc._unknown(990)
