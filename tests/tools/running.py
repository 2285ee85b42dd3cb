"""Running the tools in tests: in this process, or with the environment of another."""

import csv
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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


def run_here(name: str, *args: object) -> None:
    """Run a tool in this process, for fixtures of modules: what it prints is not looked at.

    Raises:
        AssertionError: If it fails.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        forget_runs()
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, f"{name} ended with {stop.code}"


def start_tool(name: str, *args: object, **environment: object) -> subprocess.Popen:
    """Start a tool in a process of its own: one forked off pytest would lack the threads that libraries rely on."""
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
    given = {key: str(value) for key, value in environment.items()}
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **given})


def start_ranks(name: str, *args: object, number: int = 2) -> list[subprocess.Popen]:
    """Start processes of a tool as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torchrun = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=number)
    return [start_tool(name, *args, **torchrun, RANK=rank, LOCAL_RANK=rank) for rank in range(number)]


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def losses(work: Path) -> list[float]:
    """The training losses of a work directory."""
    return [float(row["loss"]) for row in rows(work / "loss_curve.csv") if row["loss"]]


def refusal(result: tuple[int, str, str]) -> str:
    """The one line with which a call was refused."""
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, (code, err)
    return lines[0]
