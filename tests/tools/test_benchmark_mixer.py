import importlib.util
from functools import partial

import pytest
import torch

from mambavision.ops import selective_scan
from tests.conftest import REPOSITORY
from tests.tools.running import run_tool

TOOL = REPOSITORY / "tools" / "benchmark_mixer.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_mixer", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong_scan(*args, **kwargs):
    return 1.1 * selective_scan(*args, **kwargs)


def test_both_pipelines_agree_and_a_wrong_one_is_seen(tool):
    runs = {"ours": tool.ours}
    for einsum in (False, True):
        runs[f"einsum {einsum}"] = partial(tool.materialised, scan=selective_scan, einsum=einsum)
    shape = tool.Core(2, 5, 6, 8, 4, 2)
    assert tool.disagreement(runs, shape, "cpu") is None
    runs["wrong"] = partial(tool.materialised, scan=wrong_scan, einsum=True)
    assert tool.disagreement(runs, shape, "cpu").startswith("wrong: y is off by 1.0e-01")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capfd):
    code, _, err = run_tool(monkeypatch, capfd, "benchmark_mixer", "core")
    assert code == 2 and "needs an NVIDIA GPU" in err
