import re

import pytest

from tests.tools.running import refusal

CONFIG = "configs/mamba_yolo/mamba_yolo_debug.py"
pytestmark = pytest.mark.usefixtures("in_the_repository")


def test_prints_a_rate(tool):
    code, out, err = tool("benchmark_data", CONFIG, "--data-root", "demo/cells", "--count", 12)
    assert code == 0, err
    assert int(re.search(r"12 pictures: (\d+) a second", out)[1]) > 5


def test_missing_data_is_one_line(tool):
    line = refusal(tool("benchmark_data", CONFIG, "--data-root", "demo/nowhere"))
    assert line.startswith("error: demo/nowhere/train.json")
