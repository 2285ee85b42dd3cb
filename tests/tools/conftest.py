"""Fixtures of the tests of tools."""

import pytest

from tests.tools.running import ROOT, run_tool


@pytest.fixture
def tool(monkeypatch, capfd):
    """A function that runs a tool in this process; returns exit code, stdout and stderr."""
    return lambda name, *args: run_tool(monkeypatch, capfd, name, *args)


@pytest.fixture
def in_the_repository(monkeypatch):
    """The working directory is the checkout's root: configs name their data relative to it."""
    monkeypatch.chdir(ROOT)
