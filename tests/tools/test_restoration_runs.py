"""tools/train.py and tools/test.py on restoration configs: resume, processes, checkpoints, bad input."""

import json
import os
import signal
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mambavision.engine.checkpoint import load
from mambavision.restoration import weights
from tests.tools.running import ROOT, losses, refusal, rows, run_here, start_ranks, start_tool

pytestmark = pytest.mark.usefixtures("in_the_repository")

CONFIG = ROOT / "configs/serpent/serpent_debug.py"
SEED = ("--seed", 3)
SMALL = """
_base_ = "{config}"
{imports}
train_dataloader = dict(schedule=[(6, 16, 4), (6, 24, 2)])
train_cfg = dict(max_iters=12, val_interval=6)
sets = [
    dict(
        type="EvaluationSet",
        name=f"s{{sigma}}",
        photos=dict(type="CleanFolder", root="{photos}"),
        degradation=dict(type="GaussianNoise", sigma=(sigma, sigma)),
    )
    for sigma in (15, 50)
]
val_dataloader = dict(dataset=dict(sets=sets))
test_dataloader = dict(dataset=dict(sets=sets))
default_hooks = dict(runtime_info=dict(interval={interval}), checkpoint=dict(interval=4))
"""


def small_config(folder: Path, *, interval: int = 4, imports: str = "", more: str = "") -> Path:
    """The debug config on two small test sets of one photo."""
    photos = folder / "photos"
    if not photos.exists():
        photos.mkdir(parents=True)
        cv2.imwrite(str(photos / "a.png"), cv2.imread(str(ROOT / "demo/cells/val/smear_000.jpg"))[:24, :32])
    path = folder / "small.py"
    path.write_text(SMALL.format(config=CONFIG, photos=photos, interval=interval, imports=imports) + more)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a config, and the work directory of its whole run."""
    os.chdir(ROOT)
    folder = tmp_path_factory.mktemp("whole")
    run_here("train", small_config(folder, interval=1), "--work-dir", folder / "work", *SEED)
    return folder


def test_a_run_leaves_curves_measures_and_averaged_weights(whole):
    work = whole / "work"
    assert len(losses(work)) == 12 and np.isfinite(losses(work)).all()
    measured = rows(work / "val.csv")
    assert [row["set"] for row in measured] == ["s15", "s50"]
    last = [row for row in rows(work / "loss_curve.csv") if row["s15/PSNR"]][-1]
    assert float(last["s15/PSNR"]) == pytest.approx(float(measured[0]["PSNR"]), abs=1e-3)
    checkpoint = load(work / "iter_12.pth")
    averaged, raw = checkpoint["state_dict"], checkpoint["ema_state_dict"]
    assert raw["steps"] == 12 and not torch.equal(averaged["network.embed.weight"], raw["module.network.embed.weight"])
    assert [path.name for path in work.glob("best_*")] == ["best_s15_PSNR_iter_12.pth"]


def test_killed_run_resumes_with_the_same_losses(whole, tmp_path, tool):
    killing = 'custom_imports = dict(imports=["mambavision.restoration.register", "tests.tools.kill_hook"])'
    hook = 'custom_hooks = [*_base_.custom_hooks, dict(type="KillHook", iteration=9)]\n'
    config = small_config(tmp_path, imports=killing, more=hook)
    assert start_tool("train", config, "--work-dir", tmp_path / "work", *SEED).wait() == -signal.SIGKILL
    assert (tmp_path / "work/last_checkpoint").read_text().endswith("iter_8.pth")
    # without --seed: it is the checkpoint's
    code, _, err = tool("train", small_config(tmp_path), "--work-dir", tmp_path / "work", "--resume")
    assert code == 0, err
    ours, theirs = (load(folder / "work/iter_12.pth") for folder in (tmp_path, whole))
    found, expected = (run["message_hub"]["log_scalars"]["train/loss"].data[0] for run in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert losses(tmp_path / "work")[-1] == pytest.approx(losses(whole / "work")[-1], rel=1e-6)
    for part in ("state_dict", "ema_state_dict"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, msg=name)


def test_wall_time_ends_a_run_as_its_last_iteration_would(tmp_path, tool):
    work = tmp_path / "work"
    code, _, err = tool("train", small_config(tmp_path, interval=1), "--work-dir", work, *SEED, "--max-seconds", 1.0)
    assert code == 0, err
    steps = [row for row in rows(work / "loss_curve.csv") if row["loss"]]
    assert float(steps[-1]["lr"]) < 0.1 * max(float(row["lr"]) for row in steps)
    last = load((work / "last_checkpoint").read_text())
    assert last["meta"]["iter"] == len(steps) and last["message_hub"]["runtime_info"]["train_seconds"] >= 1
    assert float([row for row in rows(work / "loss_curve.csv") if row["s15/PSNR"]][-1]["iter"]) == len(steps)


def test_two_processes_train_like_one(whole, tmp_path):
    arguments = [small_config(tmp_path), "--launcher", "pytorch", "--work-dir", tmp_path / "work", *SEED]
    assert [rank.wait() for rank in start_ranks("train", *arguments)] == [0, 0]
    ours, theirs = (load(folder / "work/iter_12.pth") for folder in (tmp_path, whole))
    for name, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    found, expected = (rows(folder / "work/val.csv") for folder in (tmp_path, whole))
    assert [row["set"] for row in found] == [row["set"] for row in expected]
    assert [float(row["PSNR"]) for row in found] == pytest.approx([float(row["PSNR"]) for row in expected], abs=1e-3)


def test_evaluation_of_checkpoint_and_published_weights(whole, tmp_path, tool):
    config, checkpoint = whole / "small.py", whole / "work/iter_12.pth"
    code, text, err = tool("test", config, checkpoint, "--work-dir", tmp_path / "work", "--out", tmp_path / "a.json")
    assert code == 0, err
    measured = json.loads((tmp_path / "a.json").read_text())
    assert set(measured) == {f"{name}/{metric}" for name in ("s15", "s50") for metric in ("PSNR", "SSIM", "NMSE")}
    assert measured["s15/PSNR"] == pytest.approx(float(rows(whole / "work/val.csv")[0]["PSNR"]), abs=1e-3)
    assert [row["path"].rpartition("/")[2] for row in rows(tmp_path / "work/test.csv")] == ["a.png"] * 2
    assert "s15/PSNR" in text

    published = tmp_path / "w.safetensors"
    arguments = ["--config", config, "--metrics", tmp_path / "a.json", "--data", "drawn cells", "--cannot", "fly"]
    code, _, err = tool("publish", checkpoint, published, *arguments)
    assert code == 0, err
    net, metadata = weights.load(published)
    averaged = load(checkpoint)["state_dict"]["network.embed.weight"]
    assert torch.equal(net.state_dict()["embed.weight"], averaged.half().float())
    assert metadata["training_data"] == "drawn cells" and metadata["degradation"]["type"] == "GaussianNoise"
    card = (tmp_path / "w.md").read_text()
    assert f"| s15 | {measured['s15/PSNR']:.2f} |" in card and "iteration 12, seed 3" in card and "fly" in card
    code, _, err = tool("test", config, published, "--work-dir", tmp_path / "work", "--out", tmp_path / "b.json")
    assert code == 0, err
    assert json.loads((tmp_path / "b.json").read_text())["s15/PSNR"] == pytest.approx(measured["s15/PSNR"], abs=0.01)

    options = ["--load-from", published, "--cfg-options", "train_cfg.max_iters=5", "optim_wrapper.optimizer.lr=0.0"]
    code, _, err = tool("train", config, "--work-dir", tmp_path / "more", "--seed", 0, *options)
    assert code == 0, err
    started = load(tmp_path / "more/best_s15_PSNR_iter_5.pth")["state_dict"]
    assert torch.equal(started["network.embed.weight"], averaged.half().float())


def test_pairs_of_photos_train_and_are_tested(tmp_path, tool):
    photo = cv2.imread(str(ROOT / "demo/cells/val/smear_000.jpg"))[:40, :48]
    for part in ("train", "test"):
        for kind, picture in (("blur", cv2.GaussianBlur(photo, (5, 5), 2)), ("sharp", photo)):
            (tmp_path / part / kind).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / part / kind / "a.png"), picture)
    config, work = ROOT / "configs/serpent/serpent_s_motion_deblur.py", tmp_path / "work"
    options = ["--data-root", tmp_path, "--work-dir", work, "--cfg-options", "model.network.type=serpent_debug"]
    steps = ["train_dataloader.schedule=[(4,16,2)]", "train_cfg.max_iters=4", "train_cfg.val_interval=4"]
    ramp = ["param_scheduler.0.end=2", "param_scheduler.1.begin=2"]
    code, _, err = tool("train", config, *options, *steps, *ramp, "--seed", 0)
    assert code == 0, err
    code, _, err = tool("test", config, work / "iter_4.pth", *options, "--out", tmp_path / "a.json")
    assert code == 0, err
    blurred = -10 * np.log10(np.mean((cv2.GaussianBlur(photo, (5, 5), 2) / 255 - photo / 255) ** 2))
    assert json.loads((tmp_path / "a.json").read_text())["gopro/PSNR"] == pytest.approx(blurred, abs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-json", "x.json"], "--train-json is for detection; restoration takes --data-root"),
        (["--data-root", "nowhere"], "nowhere: no such folder of data; tools/prepare_restoration_data.py makes it"),
        (["--cfg-options", "model.network.in_channels=1"], "have 3 channels and scale 1, the network takes 1"),
        (["--cfg-options", "model.network.scale=2"], "has scale 2: change model.network"),
        (["--cfg-options", "train_dataloader.schedule=[(5,0,4)]"], "at least 1"),
        (["--cfg-options", "train_dataloader.bogus=1"], "bogus"),
        (["--cfg-options", "train_cfg.max_iters=4"], "CosineAnnealingLR begins at iteration 4, the run has 4"),
        (["--cfg-options", "task=sculpting"], None),
        (["--load-from", "gone.pth"], "no weights at gone.pth"),
    ],
)
def test_training_refuses_bad_arguments(tool, tmp_path, options, message):
    if message is None:  # the task is the file's
        (tmp_path / "other.py").write_text(f'_base_ = "{CONFIG}"\ntask = "sculpting"\n')
        line = refusal(tool("train", tmp_path / "other.py", "--work-dir", tmp_path / "work"))
        assert "task must be one of detection, restoration, diffusion, got 'sculpting'" in line
    else:
        assert message in refusal(tool("train", CONFIG, "--work-dir", tmp_path / "work", *options))
    assert not (tmp_path / "work").exists()


def test_config_describes_its_own_weights():
    for path in sorted((ROOT / "configs").glob("*/*.py")):
        cfg = Config.fromfile(path)
        if cfg.get("task") == "restoration" and path.stem != "serpent_debug":
            assert cfg.restores in get_args(weights.Task) and cfg.restores in path.stem, path
