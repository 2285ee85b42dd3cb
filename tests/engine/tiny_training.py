"""Training of two numbers, killed at each step of its file writing: `python tiny_training.py FOLDER EPOCHS`."""

import os
import signal
import sys
from pathlib import Path

import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mambavision.engine import hooks  # noqa: F401
from mambavision.engine.checkpoint import allow_mmengine_globals, load

SCORES = (0.1, 0.5, 0.2, 0.9)  # of the epochs


class Line(BaseModel):
    """y = weight x + bias under a mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str = "tensor") -> dict | list:
        out = self.linear(x)
        return {"loss": (out - y).square().mean()} if mode == "loss" else list(out)


class ScoreOfEpoch(BaseMetric):
    """The epoch's number in `SCORES`."""

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        return {"acc": SCORES[self.runner.epoch - 1]}


def build(work_dir: Path, epochs: int, *, resume: bool = False, **checkpoint_options) -> Runner:
    """Runner of four batches an epoch, which saves each epoch with `AtomicCheckpointHook`."""
    allow_mmengine_globals()
    torch.manual_seed(0)
    data = [(torch.tensor([i / 8]), torch.tensor([i / 4 - 1])) for i in range(8)]
    loader = dict(
        batch_size=2,
        collate_fn=dict(type="default_collate"),
        sampler=dict(type="DefaultSampler", shuffle=False),
        dataset=data,
    )
    metric = ScoreOfEpoch()
    metric.runner = Runner(
        Line(),
        str(work_dir),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        val_evaluator=Evaluator(metric),
        optim_wrapper=dict(optimizer=dict(type="Adam", lr=0.1)),
        param_scheduler=dict(type="ExponentialLR", gamma=0.9),
        default_hooks=dict(checkpoint=dict(type="AtomicCheckpointHook", interval=1, **checkpoint_options)),
        custom_hooks=[dict(type="EMAHook")],
        resume=resume,
        log_level="ERROR",
        experiment_name=f"{work_dir}_{epochs}_{resume}".replace("/", "_"),
        default_scope="mmengine",
        randomness=dict(seed=0),
    )
    return metric.runner


def kill_at(step: int) -> None:
    """Kill this process with signal 9 before the `step`-th opening, renaming or deletion of a checkpoint file."""
    count = 0

    def watch(event: str, args: tuple) -> None:
        nonlocal count
        writes = event in ("os.rename", "os.remove") or (event == "open" and args[1] and "w" in args[1])
        if writes and str(args[0]).endswith((".pth", "last_checkpoint", ".unfinished")):
            count += 1
            if count > step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def in_child(function, *args, **kwargs) -> int:
    """Exit status of a forked process that ran `function`: 0, 1 for an exception, -9 for a kill."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args, **kwargs)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_and_die(folder: Path, epochs: int, step: int) -> None:
    """Train until the `step`-th write."""
    kill_at(step)
    build(folder, epochs, max_keep_ckpts=1, save_best="acc").train()


def main(root: Path, epochs: int) -> None:
    """Kill a training at every write in turn; after each, its latest checkpoint must load, and training go on."""
    torch.set_num_threads(1)
    build(root / "warm_up", epochs, save_best="acc").train()  # imports all that the forked processes need
    for step in range(200):
        folder = root / f"killed_at_{step}"
        killed = in_child(train_and_die, folder, epochs, step)
        last = folder / "last_checkpoint"
        if last.exists():
            latest = load(last.read_text())
            best = latest["message_hub"]["runtime_info"].get("best_ckpt")
            assert best is None or "state_dict" in load(best), best
        assert in_child(resume, folder, epochs) == 0
        print("killed" if killed else "ended", step, flush=True)
        if killed == 0:
            return
    raise AssertionError(f"{step} writes did not end the training")


def resume(folder: Path, epochs: int) -> None:
    """Go on with a killed training to its end."""
    build(folder, epochs, resume=True, max_keep_ckpts=1, save_best="acc").train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
