"""Checking output folders, and writing files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(path: str | Path, option: str) -> None:
    """Check that a folder is there or could be made; makes nothing.

    Args:
        path: The folder.
        option: Argument that names it, for the message.

    Raises:
        NotADirectoryError: If the path, or a folder above it, is a file.
    """
    for folder in (Path(path), *Path(path).parents):
        if folder.is_dir():
            return
        if os.path.lexists(folder):
            raise NotADirectoryError(f"{option} {path}: {folder} is a file, a folder is wanted; name another")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; rename it onto ``path`` on success, delete it on an error.

    The temporary name keeps the suffix, by which image and video writers choose a format.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
