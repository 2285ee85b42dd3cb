"""A tiny mmengine Runner trains, resumes, logs, and survives being killed at any write of a checkpoint."""

import csv
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.logging import MessageHub

from mambavision.engine import hooks
from mambavision.engine.checkpoint import load
from mambavision.engine.hooks import AtomicLocalBackend, DeferredRuntimeInfoHook, LossCurveHook, ResumedRunHook
from tests.engine.tiny_training import build

REPOSITORY = Path(__file__).resolve().parents[2]


class InterruptInEpoch3(Hook):
    """What Ctrl-C does in the middle of the third epoch."""

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        if runner.iter == 9:
            raise KeyboardInterrupt


def final(folder: Path, epoch: int) -> dict:
    return load(folder / f"epoch_{epoch}.pth")


def assert_same_training(ours: dict, theirs: dict) -> None:
    for part in ("state_dict", "ema_state_dict"):
        for name, tensor in theirs[part].items():
            torch.testing.assert_close(ours[part][name], tensor, msg=name)
    assert ours["param_schedulers"] == theirs["param_schedulers"]
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]


def test_resumed_training_equals_uninterrupted(tmp_path: Path):
    build(tmp_path / "whole", 3).train()
    runner = build(tmp_path / "cut", 3)
    runner.register_hook(InterruptInEpoch3())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert (tmp_path / "cut/last_checkpoint").read_text() == str(tmp_path / "cut/epoch_2.pth")
    resumed = build(tmp_path / "cut", 3, resume=True)
    resumed.train()
    assert resumed.epoch == 3
    assert_same_training(final(tmp_path / "cut", 3), final(tmp_path / "whole", 3))
    losses = final(tmp_path / "cut", 3)["message_hub"]["log_scalars"]["train/loss"]
    assert len(losses.data[0]) == 12  # 4 batches an epoch, the first 8 from before


@pytest.mark.parametrize("epochs", [1, 2])
def test_only_a_run_that_is_over_says_that_nothing_is_left(tmp_path: Path, monkeypatch, epochs):
    build(tmp_path, 1).train()
    resumed, said = build(tmp_path, epochs, resume=True), []
    resumed.register_hook(ResumedRunHook())
    monkeypatch.setattr(resumed.logger, "warning", said.append)
    resumed.train()
    assert ["train_cfg.max_epochs=N" in message for message in said] == [True] * (epochs == 1)


def test_outdated_checkpoints_are_deleted_but_not_the_best(tmp_path: Path):
    build(tmp_path, 4, max_keep_ckpts=2, save_best="acc").train()
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["best_acc_epoch_4.pth", "epoch_3.pth", "epoch_4.pth"]


def test_kill_at_every_write_leaves_a_loadable_latest(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, REPOSITORY / "tests/engine/tiny_training.py", tmp_path, "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines() if line.startswith(("killed", "ended"))]
    assert len(steps) > 15 and steps[0] == ["killed", "0"] and steps[-1][0] == "ended"
    for folder in sorted(tmp_path.glob("killed_at_*")):
        assert_same_training(final(folder, 2), final(tmp_path / "warm_up", 2))
        assert (folder / "last_checkpoint").read_text() == str(folder / "epoch_2.pth")


@pytest.mark.parametrize("backend, left", [(AtomicLocalBackend, b"old" * 1000), (LocalBackend, b"new" * 333 + b"n")])
def test_full_disk_keeps_the_old_file(tmp_path: Path, backend: type[LocalBackend], left: bytes):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old" * 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            backend().put(b"new" * 1000, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == left


def logged(folder: Path, epochs: int, hook: DeferredRuntimeInfoHook | None, **options) -> dict:
    """All scalars of a training whose RuntimeInfoHook is `hook`."""
    runner = build(folder, epochs, **options)
    if hook:
        runner._hooks[[type(h).__name__ for h in runner.hooks].index("RuntimeInfoHook")] = hook
    runner.train()
    return {name: history.data[0].tolist() for name, history in runner.message_hub.log_scalars.items()}


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_losses_read_later_are_the_same(tmp_path: Path, interval: int):
    expected = logged(tmp_path / "plain", 3, None)
    found = logged(tmp_path / "deferred", 3, DeferredRuntimeInfoHook(interval=interval))
    for name in ("train/loss", "train/lr", "val/acc"):
        assert found[name] == pytest.approx(expected[name]), name
    checkpoint = final(tmp_path / "deferred", 2)["message_hub"]["log_scalars"]
    assert len(checkpoint["train/loss"].data[0]) == 8  # those before it, also where they were not yet read
    resumed = logged(tmp_path / "deferred", 4, DeferredRuntimeInfoHook(interval=interval), resume=True)
    assert len(resumed["train/loss"]) == 16


def test_loss_curve_goes_on_in_the_same_table_after_a_resume(tmp_path: Path):
    for epochs, resume in ((2, False), (4, True)):
        runner = build(tmp_path, epochs, resume=resume)
        runner.register_hook(LossCurveHook(interval=1))
        runner.train()
    with open(tmp_path / "loss_curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if row["loss"]]
    assert [int(row["iter"]) for row in steps] == list(range(1, 17))
    assert [int(row["epoch"]) for row in steps] == [1 + i // 4 for i in range(16)]
    assert all(float(row["loss"]) > 0 for row in steps)
    assert [float(row["acc"]) for row in rows if row["acc"]] == [0.1, 0.5, 0.2, 0.9]
    assert (tmp_path / "loss_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_checkpoint_before_the_first_validation_has_its_rows(tmp_path: Path):
    runner = build(tmp_path, 2)
    hook = LossCurveHook(interval=1)
    runner.register_hook(hook)
    runner.train()
    (tmp_path / "loss_curve.csv").unlink()
    runner.save_checkpoint(str(tmp_path), "again.pth", by_epoch=False)
    with open(tmp_path / "loss_curve.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(hook.rows) > 8


@pytest.mark.parametrize("hook", [DeferredRuntimeInfoHook, LossCurveHook])
def test_bad_intervals_are_refused(hook: type[Hook]):
    with pytest.raises(ValueError, match="interval=0"):
        hook(interval=0)


def test_wall_time_sets_the_rate_and_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now)
    now, group, hub, said = 100.0, {"lr": 0.1}, MessageHub("wall time"), []
    runner = SimpleNamespace(
        iter=0,
        message_hub=hub,
        optim_wrapper=SimpleNamespace(param_groups=[group]),
        train_loop=SimpleNamespace(),
        logger=SimpleNamespace(warning=said.append),
    )
    rates = []
    for seconds in (4, 8):  # two sessions, the second of another 4 seconds
        hook = hooks.WallTimeHook(seconds, warmup=2, final_lr_ratio=0.0)
        hook.before_train(runner)
        runner.train_loop._max_iters = 10**9
        while runner.iter < runner.train_loop._max_iters:
            hook.before_train_iter(runner, 0)
            rates.append(group["lr"])
            runner.iter += 1
            now += 1.0
            hook.after_train_iter(runner, 0)
            assert hub.get_info("eta") == max(0, seconds - hub.get_info("train_seconds") - 1)
        now += 1000.0  # between the sessions
    hook.before_train(runner)  # once more: no time is left
    assert runner.train_loop._max_iters == runner.iter == 10 and "of 8 s of training, the run has 8" in said[0]
    parts = [0, 1 / 4, 2 / 4, 3 / 4, 1, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1]
    expected = [0.1 * (1 + math.cos(math.pi * part)) / 2 for part in parts]
    assert rates == pytest.approx([expected[0] / 2, *expected[1:]])
