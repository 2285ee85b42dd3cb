"""Checking where output is to go, and writing files whole or not at all."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def shipped_weights() -> Path:
    """Folder of the weights that come along: of the checkout that this package lies in, as after `pip install -e .`.

    Of a package installed elsewhere, `weights` where the process was started, as in a checkout.
    """
    beside = Path(__file__).resolve().parents[2] / "weights"
    return beside if beside.is_dir() else Path("weights").resolve()


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


def check_file(path: str | Path, option: str) -> None:
    """Check that a file could be written, its folder made if need be; makes nothing. Arguments as of check_folder.

    Raises:
        NotADirectoryError: If a folder above the path is a file.
        IsADirectoryError: If the path is a folder.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{option} {path}: this is a folder, a file is wanted; name one")
    check_folder(Path(path).parent, option)


def check_free(paths: Iterable[Path]) -> None:
    """Raise FileExistsError if a file that is to be written is there already."""
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} exists already: name another --out-dir, or pass --overwrite")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; rename it onto ``path`` on success, delete it on an error.

    The folder is made if it is not there. The temporary name is short and keeps the suffix, by which image and video
    writers choose a format.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
