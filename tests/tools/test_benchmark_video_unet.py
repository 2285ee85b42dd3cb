import csv
import importlib.util

import cv2
import pytest

from tests.conftest import REPOSITORY
from tests.tools.running import refusal, run_tool

TOOL = REPOSITORY / "tools" / "benchmark_video_unet.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_video_unet", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_exponents_are_those_of_powers(tool):
    frames = [16, 64, 100, 400]
    assert tool.exponent(frames, [n**1.5 for n in frames]) == pytest.approx(1.5)
    assert tool.exponent(frames, [9e9, 64, 100, 400]) == pytest.approx(1)  # the shortest does not count


def test_the_share_of_a_squared_term(tool):
    frames = [16, 32, 64, 128]
    assert tool.squared_share(frames, [9e9, *(3 * n for n in frames[1:])]) == pytest.approx(0, abs=1e-9)
    share = tool.squared_share(frames, [2 * n + 0.03 * n**2 for n in frames])
    assert share == pytest.approx(0.03 * 128 / (2 + 0.03 * 128))


def test_a_run_on_a_cpu(tmp_path, monkeypatch, capfd):
    options = ["--out-dir", tmp_path, "--size", "debug", "--side", 4, "--frames", 4, 2]
    options += ["--temporal", "bi_s6", "attention", "--batch", 1, "--budget", 0.01, "--device", "cpu"]
    code, out, err = run_tool(monkeypatch, capfd, "benchmark_video_unet", *options)
    assert code == 0, err
    with open(tmp_path / "frames.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * 2 and {row["frames"] for row in rows} == {"2", "4"}
    for row in rows:
        assert float(row["clips_per_s"]) == pytest.approx(1e3 / float(row["ms"]), rel=1e-3)
    assert "| U-Net, training step: clips/s | 2 | 4 | exponent | squared |" in out
    assert cv2.imread(str(tmp_path / "frames.png")).std() > 10
    before = (tmp_path / "frames.csv").read_text().splitlines(keepends=True)
    assert run_tool(monkeypatch, capfd, "benchmark_video_unet", *options)[0] == 0
    assert (tmp_path / "frames.csv").read_text() == "".join(before)  # not measured again
    gone = before.pop(1)
    (tmp_path / "frames.csv").write_text("".join(before))
    assert run_tool(monkeypatch, capfd, "benchmark_video_unet", *options)[0] == 0
    after = (tmp_path / "frames.csv").read_text().splitlines(keepends=True)
    assert after[:-1] == before and after[-1].split(",")[:6] == gone.split(",")[:6]  # that call alone
    (tmp_path / "frames.csv").write_text("".join(line.replace("cpu,", "another,") for line in before))
    other = run_tool(monkeypatch, capfd, "benchmark_video_unet", *options)
    assert "holds measurements of another, this is cpu: name another --out-dir" in refusal(other)


def test_no_frames_is_refused(tmp_path, monkeypatch, capfd):
    options = ["--out-dir", tmp_path, "--frames", 0, "--device", "cpu"]
    assert "must be at least 1" in refusal(run_tool(monkeypatch, capfd, "benchmark_video_unet", *options))
