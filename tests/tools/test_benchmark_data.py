import re

import pytest

from tests.tools.running import ROOT, refusal, run_tool


@pytest.fixture
def benchmark(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    config = "configs/mamba_yolo/mamba_yolo_debug.py"
    return lambda *arguments: run_tool(monkeypatch, capfd, "benchmark_data", config, *arguments)


def test_prints_a_rate(benchmark):
    code, text, err = benchmark("--data-root", "demo/cells", "--count", "12")
    assert code == 0, err
    assert int(re.search(r"12 pictures: (\d+) a second", text)[1]) > 5


def test_missing_data_is_one_line(benchmark):
    assert refusal(benchmark("--data-root", "demo/nowhere")).startswith("error: demo/nowhere/train.json")
