"""tools/train.py and tools/test.py on diffusion configs: resume, processes, checkpoints, bad input."""

import json
import os
import re
import shutil
import signal

import cv2
import numpy as np
import pytest
import torch

from mambavision.diffusion import weights
from mambavision.diffusion.cli import load_pipeline
from mambavision.diffusion.diffusion import Diffusion
from mambavision.diffusion.latents import load_autoencoder
from mambavision.diffusion.objectives import RectifiedFlow
from mambavision.engine.checkpoint import load
from tests.diffusion.conftest import AUTOENCODER
from tests.tools.running import ROOT, losses, refusal, rows, run_here, start_ranks, start_tool

pytestmark = pytest.mark.usefixtures("in_the_repository")

CONFIG = ROOT / "configs/dim/dim_debug.py"
SEED = ("--seed", 3)
PHOTOS = """
model = dict(network=dict(input_size=(8, 8), num_classes=2))
train_dataloader = dict(dataset=dict(type="ClassFolder", root="{photos}", size=(8, 8)), batch_size=4)
held_out = dict(type="ClassFolder", root="{photos}", size=(8, 8))
val_dataloader = dict(dataset=dict(dataset=held_out))
test_dataloader = dict(dataset=dict(dataset=held_out))
"""
SMALL = """
_base_ = "{config}"
{imports}
train_cfg = dict(max_iters=12, val_interval=6)
default_hooks = dict(runtime_info=dict(interval={interval}), checkpoint=dict(interval=4))
"""


def small_config(folder, *, interval=4, imports="", more=""):
    """The debug config on eight small photos of two classes, one of them broken."""
    photos = folder / "photos"
    if not photos.exists():
        rng = np.random.default_rng(0)
        for i in range(8):
            path = photos / ("dark" if i % 2 else "light") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 60, (9, 9, 3), dtype=np.uint8) + np.uint8(0 if i % 2 else 190))
        path.write_bytes(path.read_bytes()[:50])
    return drawn_config(folder, CONFIG, interval=interval, imports=imports, more=PHOTOS.format(photos=photos) + more)


def drawn_config(folder, config=ROOT / "configs/video_unet/video_unet_debug.py", *, interval=4, imports="", more=""):
    """A debug config on its own data, in twelve steps."""
    path = folder / "small.py"
    path.write_text(SMALL.format(config=config, interval=interval, imports=imports) + more)
    return path


def train_whole(folder, config=small_config):
    """The work directory of a whole run is made beside its config; returns their folder."""
    run_here("train", config(folder, interval=1), "--work-dir", folder / "work", *SEED)
    return folder


def train_and_kill(folder, config=small_config):
    """The same of a run that is killed after its checkpoint of iteration 8."""
    killing = 'custom_imports = dict(imports=["mambavision.diffusion.register", "tests.tools.kill_hook"])'
    hook = 'custom_hooks = [*_base_.custom_hooks, dict(type="KillHook", iteration=9)]\n'
    path = config(folder, imports=killing, more=hook)
    assert start_tool("train", path, "--work-dir", folder / "work", *SEED).wait() == -signal.SIGKILL
    assert (folder / "work/last_checkpoint").read_text().endswith("iter_8.pth")
    config(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a config, and the work directory of its whole run."""
    os.chdir(ROOT)
    return train_whole(tmp_path_factory.mktemp("whole"))


def compare(ours, theirs, **tolerances):
    for part in ("state_dict", "ema_state_dict"):
        for name, value in theirs[part].items():
            torch.testing.assert_close(ours[part][name], value, msg=name, **tolerances)


def test_a_run_leaves_curves_and_averaged_weights(whole):
    work = whole / "work"
    assert len(losses(work)) == 12 and np.isfinite(losses(work)).all()
    measured = [row for row in rows(work / "loss_curve.csv") if row["held_out/loss"]]
    assert [row["iter"] for row in measured] == ["6", "12"]
    checkpoint = load(work / "iter_12.pth")
    averaged, raw = checkpoint["state_dict"], checkpoint["ema_state_dict"]
    assert raw["steps"] == 12 and not torch.equal(averaged["network.embed.weight"], raw["module.network.embed.weight"])
    assert checkpoint["meta"]["dataset_meta"] == {"classes": ["dark", "light"]}
    assert len(list(work.glob("best_held_out_loss_iter_*.pth"))) == 1
    log = next(work.glob("*/*.log")).read_text()
    assert "7 of 8 items are used; 1 cannot be: " in log and "7.png: truncated photo" in log
    said = [float(value) for value in re.findall(r"held_out/loss: ([0-9.]+)", log)]
    assert said == pytest.approx([float(row["held_out/loss"]) for row in measured], abs=6e-5)  # not their mean


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of a config, and the work directory of a run that was killed after its checkpoint of iteration 8."""
    os.chdir(ROOT)
    return train_and_kill(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("clips", [False, True], ids=["photos", "clips"])
def test_killed_run_resumes_with_the_same_losses(request, clips, tmp_path, tool):
    if clips:
        (tmp_path / "killed").mkdir()
        (tmp_path / "whole").mkdir()
        whole = train_whole(tmp_path / "whole", drawn_config)
        killed = train_and_kill(tmp_path / "killed", drawn_config)
    else:
        whole, killed = (request.getfixturevalue(name) for name in ("whole", "killed"))
    shutil.copytree(killed / "work", tmp_path / "work")
    # without --seed: it is the checkpoint's
    code, _, err = tool("train", killed / "small.py", "--work-dir", tmp_path / "work", "--resume")
    assert code == 0, err
    ours, theirs = (load(folder / "work/iter_12.pth") for folder in (tmp_path, whole))
    found, expected = (run["message_hub"]["log_scalars"]["train/loss"].data[0] for run in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    compare(ours, theirs)
    code, log, _ = tool("train", killed / "small.py", "--work-dir", tmp_path / "work", "--resume")
    assert code == 0
    assert "nothing is left to train; --cfg-options train_cfg.max_iters=N" in log


def test_two_processes_train_like_one(whole, tmp_path):
    config = small_config(tmp_path, interval=1)
    arguments = [config, "--launcher", "pytorch", "--work-dir", tmp_path / "work", *SEED]
    assert [rank.wait() for rank in start_ranks("train", *arguments)] == [0, 0]
    ours, theirs = (load(folder / "work/iter_12.pth") for folder in (tmp_path, whole))
    compare(ours, theirs, rtol=1e-3, atol=1e-4)
    found, expected = (rows(folder / "work/loss_curve.csv")[-1]["held_out/loss"] for folder in (tmp_path, whole))
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    np.testing.assert_allclose(losses(tmp_path / "work"), losses(whole / "work"), rtol=1e-3)


def test_weights_spread_over_four_processes_train_as_one_and_go_on_with_its_checkpoint(whole, killed, tmp_path):
    shutil.copytree(killed / "work", tmp_path / "work")
    arguments = ["--launcher", "pytorch", "--work-dir", tmp_path / "work", "--resume", "--fsdp"]
    assert [rank.wait() for rank in start_ranks("train", killed / "small.py", *arguments, number=4)] == [0] * 4
    ours, theirs = (load(folder / "work/iter_12.pth") for folder in (tmp_path, whole))
    compare(ours, theirs, rtol=1e-3, atol=1e-4)
    for found, expected in zip(*(run["optimizer"]["state"].values() for run in (ours, theirs)), strict=True):
        torch.testing.assert_close(found["exp_avg"], expected["exp_avg"], rtol=1e-3, atol=1e-5)


def test_evaluation_of_checkpoint_and_published_weights(whole, tmp_path, tool):
    config, checkpoint = whole / "small.py", whole / "work/iter_12.pth"
    code, text, err = tool("test", config, checkpoint, "--work-dir", tmp_path / "work", "--out", tmp_path / "a.json")
    assert code == 0, err
    measured = json.loads((tmp_path / "a.json").read_text())
    last = [row for row in rows(whole / "work/loss_curve.csv") if row["held_out/loss"]][-1]
    assert measured["held_out/loss"] == pytest.approx(float(last["held_out/loss"]), rel=1e-5)
    assert "held_out/loss" in text

    published = tmp_path / "w.safetensors"
    (tmp_path / "list.json").write_text("[1]")
    for wrong in (tmp_path / "list.json", checkpoint):
        line = refusal(tool("publish", checkpoint, published, "--config", config, "--metrics", wrong))
        assert f"--metrics {wrong}: not a JSON file that tools/test.py --out wrote" in line and not published.exists()
    arguments = ["--config", config, "--metrics", tmp_path / "a.json", "--data", "noise", "--cannot", "fly"]
    code, _, err = tool("publish", checkpoint, published, *arguments)
    assert code == 0, err
    net, objective, metadata = weights.load(published)
    averaged = load(checkpoint)["state_dict"]["network.embed.weight"]
    assert torch.equal(net.state_dict()["embed.weight"], averaged.half().float())
    assert isinstance(objective, RectifiedFlow) and objective.config()["times"] == "logit_normal"
    assert metadata["class_names"] == ["dark", "light"] and metadata["training_data"] == "noise"
    card = (tmp_path / "w.md").read_text()
    assert "3x8x8, 2 classes; RectifiedFlow (times logit_normal" in card and "iteration 12, seed 3" in card
    code, _, err = tool("test", config, published, "--work-dir", tmp_path / "work", "--out", tmp_path / "b.json")
    assert code == 0, err
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["held_out/loss"] == pytest.approx(measured["held_out/loss"], rel=1e-2)


def test_latents_from_photos_to_samples(tmp_path, tool):
    small_config(tmp_path)
    latents, work = tmp_path / "latents", tmp_path / "work"
    made = ["cache_latents", tmp_path / "photos", latents, "--autoencoder", AUTOENCODER, "--size", 16, "--classes"]
    code, text, err = tool(*made)
    assert code == 0 and f"{latents}: 14 items of 4 x 8 x 8" in text and "1 items were left out, first" in err, err
    config = tmp_path / "latents.py"
    config.write_text(
        f"_base_ = {str(CONFIG)!r}\n"
        "model = dict(network=dict(input_size=(8, 8), in_channels=4, num_classes=2))\n"
        f"held_out = dict(_delete_=True, type='LatentShards', root={str(latents)!r})\n"
        "train_dataloader = dict(dataset=held_out, batch_size=4)\n"
        "val_dataloader = dict(dataset=dict(dataset=held_out))\n"
        "test_dataloader = dict(dataset=dict(dataset=held_out))\n"
        "train_cfg = dict(max_iters=6, val_interval=3)\n"
    )
    code, _, err = tool("train", config, "--work-dir", work, *SEED, "--cfg-options", "model.class_dropout=0")
    assert code == 0 and len(losses(work)) == 6, err
    published, out = tmp_path / "w.safetensors", ("--out-dir", tmp_path / "out")
    assert tool("publish", work / "iter_6.pth", published, "--config", config)[0] == 0
    sample = ["sample", "--weights", published, "--num", 2, "--steps", 2, "--classes", "dark", *out]
    assert "trained on latents: give their autoencoder too" in refusal(tool(*sample))
    code, _, err = tool(*sample, "--autoencoder", AUTOENCODER)
    assert code == 0 and cv2.imread(str(tmp_path / "out/00001.png")).shape == (16, 16, 3), err
    other = load_autoencoder(AUTOENCODER)
    next(other.parameters()).data[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    by_checkpoint = ["sample", "--config", config, "--weights", work / "iter_6.pth", "--num", 1, "--steps", 1]
    by_published = ["sample", "--config", config, "--weights", published, "--num", 1, "--steps", 1, *out]
    for command in (sample, [*by_checkpoint, "--out-dir", tmp_path / "again"], by_published):
        line = refusal(tool(*command, "--overwrite", "--autoencoder", tmp_path / "other"))
        assert "was trained on latents of another autoencoder" in line
    by_checkpoint += ["--out-dir", tmp_path / "again", "--autoencoder", AUTOENCODER]
    assert tool(*by_checkpoint)[0] == 0
    for command in (by_checkpoint, [*sample, "--autoencoder", AUTOENCODER]):
        line = refusal(tool(*command, "--overwrite", "--guidance", 2))
        assert "guidance 2 needs a network that was trained without classes too" in line


def test_wall_time_ends_a_run(tmp_path, tool):
    work = tmp_path / "work"
    code, _, err = tool("train", small_config(tmp_path, interval=1), "--work-dir", work, *SEED, "--max-seconds", 1.0)
    assert code == 0, err
    last = load((work / "last_checkpoint").read_text())
    assert last["meta"]["iter"] == len(losses(work)) and last["message_hub"]["runtime_info"]["train_seconds"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-json", "x.json"], "--train-json is for detection; diffusion takes --data-root"),
        (["--data-root", "nowhere"], "nowhere: no such folder of data; name yours with --data-root"),
        (
            ["--cfg-options", "model.network.in_channels=1"],
            "has items of (3, 16, 16) (channels, size), the network takes",
        ),
        (["--cfg-options", "model.network.num_classes=7"], "has 0 classes, the network 7: change model.network.num_cl"),
        (["--cfg-options", "model.network.patch_size=3"], "16"),
        (["--cfg-options", "model.objective.times=late"], "times must be uniform or logit_normal, got 'late'"),
        (["--cfg-options", "model.class_dropout=2"], "class_dropout=2 must be in [0, 1]"),
        (["--cfg-options", "train_dataloader.batch_size=0"], "batch_size=0: a whole number of items, at least 1"),
        (["--cfg-options", "train_dataloader.keep=cloud"], "keep must be one of device, host, disk, got 'cloud'"),
        (["--cfg-options", "param_scheduler.7.end=3"], "--cfg-options do not fit the config: Index 7 exceeds"),
        (["--cfg-options", "train_cfg=3"], "--cfg-options train_cfg=3: the config has entries there, give train_cfg."),
        (["--cfg-options", "train_cfg.max_iters=4"], "CosineAnnealingLR begins at iteration 4, the run has 4"),
        (["--load-from", "gone.pth"], "no weights at gone.pth"),
        (["--fsdp"], "weights are spread over several processes: start with torchrun and --launcher pytorch"),
    ],
)
def test_training_refuses_bad_arguments(tool, tmp_path, options, message):
    assert message in refusal(tool("train", CONFIG, "--work-dir", tmp_path / "work", *options))
    assert not (tmp_path / "work").exists()


def test_a_data_root_for_a_config_that_draws_its_data_is_refused(tool, tmp_path):
    config = "configs/video_unet/video_unet_debug.py"
    line = refusal(tool("train", config, "--data-root", tmp_path, "--work-dir", tmp_path / "work"))
    assert line == f"error: {config} has no data_root that --data-root could replace; leave it out"


def test_an_empty_folder_and_another_networks_checkpoint_are_refused(whole, tool, tmp_path):
    (tmp_path / "photos").mkdir()
    found = refusal(tool("train", small_config(tmp_path), "--work-dir", tmp_path / "work"))
    assert f"{tmp_path / 'photos'}: no photos in this folder" in found and not (tmp_path / "work").exists()
    options = ["--work-dir", tmp_path / "work", "--cfg-options", "model.network.d_model=48"]
    assert "was trained with d_model 32, not 48" in refusal(
        tool("test", whole / "small.py", whole / "work/iter_12.pth", *options)
    )


def test_weights_are_read_as_they_were_trained(whole, tool, tmp_path):
    checkpoint, other = whole / "work/iter_12.pth", tmp_path / "other.py"
    other.write_text((whole / "small.py").read_text() + 'model["network"]["orders"] = "zigzag"\n')
    ours, published = whole / "small.py", tmp_path / "w.safetensors"
    said = "was trained with orders 'cross', not 'zigzag': name the config that it was trained by"
    assert said in refusal(tool("publish", checkpoint, published, "--config", other))
    assert not published.exists()
    code, _, err = tool("publish", checkpoint, published, "--config", ours)
    assert code == 0, err
    for weights_file in (checkpoint, published):
        where = ["--weights", weights_file, "--out-dir", tmp_path / "out", "--num", 1, "--steps", 1]
        assert said in refusal(tool("sample", "--config", other, *where))
        assert said in refusal(tool("test", other, weights_file, "--work-dir", tmp_path / "test"))
        objective = ["--cfg-options", "model.objective.times=uniform", "--work-dir", tmp_path / "test"]
        line = refusal(tool("test", ours, weights_file, *objective))
        assert "was trained with times 'logit_normal', not 'uniform'" in line
        assert not (tmp_path / "out").exists() and not (tmp_path / "test").exists()


def test_training_does_not_start_from_a_network_of_another_size(whole, tool, tmp_path):
    options = ["--load-from", whole / "work/iter_12.pth", "--cfg-options", "model.network.d_model=48"]
    line = refusal(tool("train", whole / "small.py", "--work-dir", tmp_path / "work", *options))
    assert "of its tensors fit this network" in line and "it is of another size" in line


def test_memory_that_runs_out_is_said_in_a_line(monkeypatch, tool, tmp_path):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Diffusion, "forward", full)
    line = refusal(tool("train", CONFIG, "--work-dir", tmp_path / "work"))
    assert "memory ran out in training" in line and "take smaller batches" in line


OTHERS = {
    "another objective": (
        'objective=dict(type="EpsilonPrediction", _delete_=True), network=dict(',
        "was trained with type 'Rectif",
    ),
    "other orders": ('network=dict(orders="hilbert", ', "was trained with orders"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_is_not_resumed_as_something_else(case, whole, tmp_path, tool):
    shutil.copytree(whole / "work", tmp_path / "work")
    change, message = OTHERS[case]
    config = small_config(tmp_path)
    config.write_text(config.read_text().replace("network=dict(", change))
    assert message in refusal(tool("train", config, "--work-dir", tmp_path / "work", "--resume"))


def test_rates_that_the_schedule_of_a_resumed_run_has_not_are_told(whole, tmp_path, tool):
    shutil.copytree(whole / "work", tmp_path / "work")
    arguments = ["train", whole / "small.py", "--work-dir", tmp_path / "work", "--resume"]
    code, log, err = tool(*arguments, "--cfg-options", "train_cfg.max_iters=14")
    assert code == 0, err
    assert "learning rate falls until 12 and stays there, the run ends at 14" in log
    timed = ["train", whole / "small.py", "--work-dir", tmp_path / "timed"]
    assert tool(*timed, "--max-seconds", 0.5)[0] == 0
    assert "resume it by that, or go on from its weights by --load-from" in refusal(tool(*timed, "--resume"))
    assert "--max-seconds nan: name how many seconds to train" in refusal(tool(*timed, "--max-seconds", "nan"))


def test_other_classes_to_validate_are_refused(whole, tmp_path, tool):
    photos = tmp_path / "photos"
    shutil.copytree(whole / "photos/dark", photos / "dark")
    shutil.copytree(whole / "photos/light", photos / "dawn")
    changed = ["--cfg-options", f"val_dataloader.dataset.dataset.root={photos}"]
    line = refusal(tool("train", whole / "small.py", "--work-dir", tmp_path / "work", *changed))
    assert "the validation set has other classes than what is trained on, it lacks 'light' and has 'dawn' bes" in line
    shutil.rmtree(photos / "dawn")
    line = refusal(tool("train", whole / "small.py", "--work-dir", tmp_path / "work", *changed))
    assert "it lacks 'light': it needs the same ones" in line
    changed = ["--cfg-options", f"test_dataloader.dataset.dataset.root={photos}"]
    line = refusal(tool("test", whole / "small.py", whole / "work/iter_12.pth", "--work-dir", tmp_path, *changed))
    assert "the test set has other classes" in line
    published = tmp_path / "w.safetensors"
    assert tool("publish", whole / "work/iter_12.pth", published, "--config", whole / "small.py")[0] == 0
    assert load_pipeline(published, config=whole / "small.py").class_names == ["dark", "light"]
    line = refusal(tool("test", whole / "small.py", published, "--work-dir", tmp_path, *changed))
    assert "the test set has other classes" in line


def test_a_run_is_not_resumed_with_other_classes(whole, tmp_path, tool):
    shutil.copytree(whole / "work", tmp_path / "work")
    shutil.copytree(whole / "photos/dark", tmp_path / "photos/night")  # its label would become light's
    shutil.copytree(whole / "photos/light", tmp_path / "photos/light")
    photos = tmp_path / "photos"
    renamed = [f"train_dataloader.dataset.root={photos}", f"val_dataloader.dataset.dataset.root={photos}"]
    command = ["train", whole / "small.py", "--work-dir", tmp_path / "work", "--resume", "--cfg-options", *renamed]
    line = refusal(tool(*command, "train_cfg.max_iters=14"))
    assert "the training set has other classes than what the checkpoint was trained on, it lacks 'dark'" in line


def test_an_earlier_run_is_not_written_over(whole, tmp_path, tool):
    shutil.copytree(whole / "work", tmp_path / "work")
    before = {path: path.read_bytes() for path in (tmp_path / "work").glob("*.*")}
    again = ["train", whole / "small.py", "--work-dir", tmp_path / "work"]
    line = refusal(tool(*again))
    assert "iter_12.pth is of an earlier run: --resume goes on with it, --overwrite replaces it, or name anoth" in line
    assert "no weights at gone" in refusal(tool(*again, "--overwrite", "--load-from", "gone"))
    assert {path: path.read_bytes() for path in (tmp_path / "work").glob("*.*")} == before
    code, _, err = tool(*again, "--overwrite", "--cfg-options", "train_cfg.max_iters=6", "param_scheduler.1.begin=4")
    left = sorted(path.name for path in (tmp_path / "work").glob("*.pth"))
    assert code == 0 and left == ["best_held_out_loss_iter_6.pth", "iter_6.pth"], err


def test_a_validation_that_was_interrupted_is_made_up_for(whole, tmp_path, tool):
    work = tmp_path / "work"
    shutil.copytree(whole / "work", work)
    best = sorted(path.name for path in work.glob("best_*"))
    for path in work.glob("best_*_12.pth"):
        path.unlink()
    lines = (work / "loss_curve.csv").read_text().splitlines()
    validated = [line for line in lines if line.startswith("12,") and line.split(",")[2] == ""]
    assert len(validated) == 1
    (work / "loss_curve.csv").write_text("\n".join(line for line in lines if line not in validated) + "\n")
    for _ in range(2):  # the second finds it there
        code, log, err = tool("train", whole / "small.py", "--work-dir", work, "--resume")
        assert code == 0 and "nothing is left to train" in log, err
        assert (work / "loss_curve.csv").read_text().splitlines() == lines
    assert sorted(path.name for path in work.glob("best_*")) == best


def test_a_rate_that_a_resumed_run_does_not_take_is_told(whole, tmp_path, tool):
    shutil.copytree(whole / "work", tmp_path / "work")
    command = ["train", whole / "small.py", "--work-dir", tmp_path / "work", "--resume", "--cfg-options"]
    code, log, err = tool(*command, "optim_wrapper.optimizer.lr=0.0123")
    assert code == 0 and "and stays so, the config's is 0.0123: for another one go on from its weights" in log, err


def test_training_that_diverges_stops(tmp_path, tool):
    config, work = small_config(tmp_path, interval=4), tmp_path / "work"
    line = refusal(tool("train", config, "--work-dir", work, *SEED, "--cfg-options", "optim_wrapper.optimizer.lr=1e30"))
    assert "is nan: training has diverged and stops, take a lower learning rate" in line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_cfg.max_iters=abc", "train_cfg.max_iters='abc': iterations are a whole number"),
        ("train_cfg.val_interval=0", "train_cfg.val_interval=0: iterations are a whole number"),
        ("optim_wrapper.optimizer.lr=abc", "the config cannot be built: "),
        ("optim_wrapper.optimizer.lr=-1", "Invalid learning rate: -1"),
        ("optim_wrapper.optimizer.type=Foo", "optim_wrapper.optimizer.type='Foo': no such optimizer"),
        ("custom_hooks.0.momentum=2", "momentum must be in range"),
        ("param_scheduler.0.end=0", "end should be larger than begin"),
        ("train_dataloader.batch_size=abc", "batch_size='abc': a whole number of items"),
    ],
)
def test_options_that_cannot_be_run_are_one_line(tmp_path, tool, option, message):
    line = refusal(tool("train", small_config(tmp_path), "--work-dir", tmp_path / "work", "--cfg-options", option))
    assert message in line and not (tmp_path / "work").exists()
