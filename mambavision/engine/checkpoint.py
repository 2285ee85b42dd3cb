"""Loading `.pth` checkpoints without running code from them."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch


class CheckpointError(ValueError):
    """A file that is no whole checkpoint."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that names code outside the allow-list; none of it has run."""


def allow_mmengine_globals() -> None:
    """Let `torch.load(weights_only=True)` read what mmengine 0.10 saves beside tensors, and nothing that runs code.

    Allowed are numpy arrays and scalars of plain numbers, and mmengine's `HistoryBuffer` (logged losses). mmengine's
    own loader of local files, with which Runner loads and resumes, becomes `load`. May be called often.
    """
    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import CheckpointLoader

    array, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # as numpy 2 and numpy 1 write them
        allowed += [(array, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    allowed.append((_history_statistic, "builtins.getattr"))  # how a HistoryBuffer names its own methods
    torch.serialization.add_safe_globals(allowed)
    CheckpointLoader.register_scheme(prefixes="", loader=_load_from_local, force=True)


def _history_statistic(owner: type, name: str) -> Any:
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"GLOBAL builtins.getattr({owner!r}, {name!r})")
    return getattr(owner, name)


def load(path: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Load a `.pth` checkpoint: tensors, plain values, and what `allow_mmengine_globals` lists.

    Args:
        path: A file that `torch.save` or mmengine wrote.
        map_location: As in `torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeCheckpointError: If the file names a class or function outside the allow-list. It is not called.
        CheckpointError: If the file is truncated or no checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    allow_mmengine_globals()
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # damaged bytes fail anywhere in the parser, with any exception
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            raise UnsafeCheckpointError(
                f"{path}: refused, it asks to use {unsafe[1]}, which could run code; ask its author for plain tensors"
            ) from None
        if "CUDA" in str(error):  # whole, but for a device that is not there or is full
            raise
        raise CheckpointError(f"{path}: not a whole checkpoint (truncated, or another format)") from error


def _load_from_local(filename: str, map_location: Any = None) -> Any:
    return load(filename, map_location)  # mmengine logs the loader's name from its tenth letter on
