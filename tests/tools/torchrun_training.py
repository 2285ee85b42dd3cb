"""Train the debug config for one epoch without randomness, alone or under torchrun; each rank saves what it saw.

torchrun --nproc-per-node 2 torchrun_training.py DATA_ROOT WORK_DIR BATCH_SIZE_PER_PROCESS
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_rank, is_distributed
from mmengine.hooks import Hook
from torch import nn

from mambavision.detection import cli

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "mamba_yolo" / "mamba_yolo_debug.py"


@HOOKS.register_module(force=True)
class FixedStatistics(Hook):
    """Keep BatchNorm in eval mode, as its statistics are of one process' share of the batch, and record the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for module in runner.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs["loss"].detach()))


def train(data_root: str, work_dir: str, batch_size: int, launcher: str) -> dict:
    """Losses of this rank and the final weights."""
    args = SimpleNamespace(
        config=str(CONFIG), data_root=data_root, work_dir=work_dir, launcher=launcher, train_json="train.json",
        val_json="val.json", train_images="train", val_images="val",
        cfg_options={"train_dataloader.batch_size": batch_size, "train_cfg.max_epochs": 1},
    )  # fmt: skip
    cfg = cli.load_config(args)
    cfg.train_dataloader.dataset.pipeline = [
        dict(type="LoadPhoto", with_boxes=True),
        dict(type="LetterBox", size=96),
        dict(type="PackDetInputs"),
    ]
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.custom_hooks = [dict(type="WarmupLinearDecayHook", warmup_min_iters=1), dict(type="FixedStatistics")]
    cfg.default_hooks.checkpoint.save_best = None
    runner = cli.train(cfg, seed=0)
    model = runner.model.module if is_distributed() else runner.model
    recorder = next(hook for hook in runner.hooks if isinstance(hook, FixedStatistics))
    return {"losses": recorder.losses, "weights": {name: value.clone() for name, value in model.state_dict().items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = train(sys.argv[1], sys.argv[2], int(sys.argv[3]), "pytorch")
    torch.save(seen, Path(sys.argv[2]) / f"rank{get_rank()}.pt")
