import pytest
import torch

from mambavision.engine.memory import free_memory, is_out_of_memory


def test_free_memory_is_what_could_be_allocated():
    before = free_memory("cpu")
    assert 2**28 < before < 2**45
    held = torch.ones(2**28, dtype=torch.uint8)
    assert free_memory("cpu") < before - 2**27, len(held)


def test_running_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
