import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/benchmark_data.py", "configs/mamba_yolo/mamba_yolo_debug.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_prints_a_rate():
    result = benchmark("--data-root", "demo/cells", "--count", "12")
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"12 pictures: (\d+) a second", result.stdout)[1]) > 5


def test_missing_data_is_one_line():
    result = benchmark("--data-root", "demo/nowhere")
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].startswith(
        "error: demo/nowhere/train.json"
    )
