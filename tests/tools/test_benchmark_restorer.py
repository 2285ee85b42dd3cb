import csv
import math
import runpy
import sys
from pathlib import Path

import pytest

from tests.tools.running import refusal

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools/benchmark_restorer.py"), run_name="benchmark_restorer")


def test_exponent_is_fitted():
    assert TOOL["exponent"]((512, 1024, 2048), (3.0, 12.0, 48.0)) == pytest.approx(1)
    assert TOOL["exponent"]((512, 1024), (3.0, 48.0)) == pytest.approx(2)
    assert math.isnan(TOOL["exponent"]((512,), (3.0,)))


def test_figures_and_a_size_that_does_not_fit(tmp_path, monkeypatch, capsys):
    real = TOOL["measure"]

    def measure(call, device, seconds):
        if call.args[-1].shape[-1] == 24:
            raise TOOL["torch"].OutOfMemoryError
        return real(call, device, seconds)

    monkeypatch.setitem(TOOL["main"].__globals__, "measure", measure)
    path = tmp_path / "figures.csv"
    options = "--networks serpent_t dncnn --size 16 24 --channels 1 --seconds 0".split()
    monkeypatch.setattr(sys, "argv", ["benchmark_restorer", *options, "--csv", str(path)])
    TOOL["main"]()
    text = capsys.readouterr().out
    assert "out of memory" in text and "pixels^" not in text
    rows = list(csv.DictReader(path.open()))
    assert [(r["network"], r["side"]) for r in rows] == [(n, s) for n in ("serpent_t", "dncnn") for s in ("16", "24")]
    share = float(rows[0]["ms"]) / float(rows[2]["ms"])
    assert f"serpent_t / dncnn, restore 16: {share:.3f} of the time" in text and "restore 24:" not in text
    assert float(rows[0]["ms"]) > 0 and rows[1]["ms"] == "inf" and rows[2]["parameters"] == "556097"


def test_one_call_is_timed_where_asked():
    calls = []
    ms, _ = TOOL["measure"](lambda: calls.append(1), TOOL["torch"].device("cpu"), None)
    assert len(calls) == 1 and ms > 0
    TOOL["measure"](lambda: calls.append(1), TOOL["torch"].device("cpu"), 0)
    assert len(calls) == 1 + 1 + TOOL["FEWEST"]


@pytest.mark.parametrize("options", [("--size", 0), ("--train", 0), ("--seconds", -1)])
def test_figures_of_nothing_are_refused(tool, options):
    assert "--size takes 8 pixels or more" in refusal(tool("benchmark_restorer", *options))


@pytest.mark.parametrize("name, options", [("benchmark_restorer", []), ("benchmark_detector", ["any.py"])])
def test_a_device_that_is_none_is_refused(tool, name, options):
    assert "device 'gpu' cannot be used: pass --device cpu" in refusal(tool(name, *options, "--device", "gpu"))
