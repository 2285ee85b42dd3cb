"""Running the tools in tests: in this process, or with the environment of another."""

import os
import runpy
import sys
from pathlib import Path

from tests.tools.toy_data import forget_runs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_tool(monkeypatch, capfd, name: str, *args: object) -> tuple[int, str, str]:
    """Run a tool as `python tools/NAME.py ARGS` would; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    forget_runs()
    capfd.readouterr()
    code = 0
    try:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


def fork_tool(name: str, *args: object, **environment: object) -> int:
    """Start a tool in a copy of this process, which has all imports behind it; returns the process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ.update({key: str(value) for key, value in environment.items()})
            sys.argv = [name, *map(str, args)]
            forget_runs()
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
            status = 0
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    """Wait for a process of `fork_tool`: 0, 1 for an exception, -9 for a kill."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refusal(result: tuple[int, str, str]) -> str:
    """The one line with which a call was refused."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    return lines[0]
