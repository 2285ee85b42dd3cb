import json
import os
import subprocess
import sys

from tests.conftest import REPOSITORY

DEBUG = "configs/mamba_yolo/mamba_yolo_debug.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def compare(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/compare.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


def test_runs_with_metrics_are_summarised_not_repeated(tmp_path):
    for seed, ap in ((0, 0.25), (3, 0.75)):
        folder = tmp_path / f"mamba_yolo_debug_seed{seed}"
        folder.mkdir()
        (folder / "test.json").write_text(json.dumps({"coco/bbox_mAP": ap}))
    done = compare(DEBUG, "--seeds", 0, 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "coco/bbox_mAP" in line)
    assert [cell.strip() for cell in row.split("│")[3:7]] == ["0.2500", "0.7500", "0.5000", "0.5000"]


def test_a_failed_run_names_its_log(tmp_path):
    done = compare(DEBUG, "--seeds", 0, "--out", tmp_path, "--cfg-options", "train_cfg.no_such_key=1")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("train.out")
