import json
from pathlib import Path

import pytest

from tests.tools.running import ROOT, refusal

DEBUG = "configs/mamba_yolo/mamba_yolo_debug.py"
pytestmark = pytest.mark.usefixtures("in_the_repository")


def test_runs_with_metrics_are_summarised_not_repeated(tmp_path, tool):
    for seed, ap in ((0, 0.25), (3, 0.75)):
        folder = tmp_path / f"mamba_yolo_debug_seed{seed}"
        folder.mkdir()
        (folder / "test.json").write_text(json.dumps({"coco/bbox_mAP": ap}))
    code, out, err = tool("compare", DEBUG, "--seeds", 0, 3, "--out", tmp_path)
    assert code == 0, err
    row = next(line for line in out.splitlines() if "coco/bbox_mAP" in line)
    assert [cell.strip() for cell in row.split("│")[3:7]] == ["0.2500", "0.7500", "0.5000", "0.5000"]
    assert "holds a run of amp None, not bf16: name another --out" in refusal(
        tool("compare", DEBUG, "--seeds", 0, 3, "--out", tmp_path, "--amp", "bf16")
    )


def test_runs_of_one_name_are_refused(tmp_path, tool):
    copy = tmp_path / Path(DEBUG).name
    copy.write_text("")
    assert "have one name, by which runs are told apart" in refusal(tool("compare", DEBUG, copy, "--out", tmp_path))


def test_a_failed_run_names_its_log(tmp_path, tool, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["--seeds", 0, "--out", tmp_path, "--cfg-options", "train_cfg.no_such_key=1"]
    assert refusal(tool("compare", DEBUG, *options)).endswith("train.out")
