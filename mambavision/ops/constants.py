"""Tensors made once and kept: they outlive the mode in which they were first asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept_tensors() -> Iterator[None]:
    """Tensors made within belong neither to ``torch.inference_mode`` nor to a transform of ``torch.func``.

    A kept one that does fails later: an inference tensor at gradients, a transform's in compiled graphs.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield
