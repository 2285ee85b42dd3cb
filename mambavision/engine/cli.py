"""What all command lines share: errors in one line, and choosing a device."""

import sys
from collections.abc import Callable
from typing import NoReturn

import torch


def run(main: Callable[[], None], *, interrupted: str = "") -> None:
    """Call a tool's main; wrong input or too little memory becomes one line on stderr and exit code 2.

    After Ctrl-C the code is 130; ``interrupted`` is said then.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        fail(error)
    except KeyboardInterrupt:
        if interrupted:
            print(f"\n{interrupted}", file=sys.stderr, flush=True)
        sys.exit(130)


def fail(error: BaseException) -> NoReturn:
    """Print an error's message as one line on stderr and exit with code 2."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "in DataLoader worker process" in lines[0]:  # the worker's traceback, the message last
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    print(f"error: {lines[0]}", file=sys.stderr, flush=True)
    sys.exit(2)


def choose_device(device: str | None) -> torch.device:
    """The device of a name, or cuda where there is one and else the CPU.

    Raises:
        ValueError: If the device is not cpu or cuda, or is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} cannot be used: pass --device cpu, cuda or cuda:N")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return chosen
