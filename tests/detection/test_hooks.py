import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

import mambavision.detection  # noqa: F401 (registers the hooks)
from mambavision.detection.transforms import HSVGain, LetterBox, LoadPhoto, MosaicAffine, RandomScaleTranslate


class Regression(BaseModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x, mode="tensor"):
        return {"loss": self.net(x).square().mean()}


class Ones(Dataset):
    """Eight samples; `pipeline` is a real pipeline that the loss does not look at."""

    def __init__(self):
        self.pipeline = Compose([MosaicAffine(64, scale=(1.0, 1.0)), HSVGain()])

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.ones(1, 2, 2) * len(self.pipeline.transforms)}


def run(tmp_path, hooks, *, epochs=4, dataset=None, workers=0, **kwargs):
    optim = dict(
        type="OptimWrapper",
        constructor="MambaYOLOOptimWrapperConstructor",
        optimizer=dict(type="SGD", lr=0.01, momentum=0.937, weight_decay=5e-4),
        paramwise_cfg=dict(batch_size_per_gpu=4),
    )
    runner = Runner(
        model=Regression(),
        work_dir=str(tmp_path / "work"),
        train_dataloader=dict(
            batch_size=4,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dataset or Ones(),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=kwargs.pop("optim_wrapper", optim),
        custom_hooks=hooks,
        default_scope="mmdet",
        default_hooks=dict(checkpoint=dict(type="AtomicCheckpointHook", interval=1)),
        log_level="ERROR",
        experiment_name=f"hooks_{tmp_path.name}",
        **kwargs,
    )
    runner.train()
    return runner


class Recorder(mambavision.detection.hooks.Hook):
    priority = "LOWEST"

    def __init__(self):
        self.seen, self.inputs = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        groups = {group["kind"]: group for group in runner.optim_wrapper.optimizer.param_groups}
        logged = runner.message_hub.get_scalar("train/base_lr").current()
        self.seen.append((groups["weight"]["lr"], groups["bias"]["lr"], groups["norm"]["momentum"], logged))
        self.inputs.append(float(data_batch["x"].mean()))


def expected(epochs, epoch_length, warmup):
    rows = []
    for i in range(epochs * epoch_length):
        lr = 0.01 * ((1 - (i // epoch_length) / epochs) * 0.99 + 0.01)
        part = min(i / warmup, 1)
        rows.append((lr * part, 0.1 + (lr - 0.1) * part, 0.8 + 0.137 * part, lr * part))
    return rows


def test_rates_follow_the_published_schedule(tmp_path):
    recorder = Recorder()
    run(tmp_path, [dict(type="WarmupLinearDecayHook", warmup_epochs=1.5, warmup_min_iters=1), recorder])
    np.testing.assert_allclose(recorder.seen, expected(4, 2, 3), rtol=1e-12)


def test_warmup_has_a_least_length(tmp_path):
    recorder = Recorder()
    run(tmp_path, [dict(type="WarmupLinearDecayHook", warmup_epochs=1), recorder], epochs=2)
    np.testing.assert_allclose(recorder.seen, expected(2, 2, 100), rtol=1e-12)


def test_rate_is_constant_before_its_decay(tmp_path):
    recorder = Recorder()
    run(tmp_path, [dict(type="WarmupLinearDecayHook", warmup_epochs=0, warmup_min_iters=0, decay_part=0.4), recorder],
        epochs=5)  # fmt: skip
    rates = [row[0] / 0.01 for row in recorder.seen[::2]]
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 1 - 0.99 / 2], rtol=1e-12)
    with pytest.raises(ValueError, match="decay_part=0"):
        mambavision.detection.hooks.WarmupLinearDecayHook(decay_part=0)


def test_rate_falls_within_an_epoch_on_request(tmp_path):
    recorder = Recorder()
    hook = dict(type="WarmupLinearDecayHook", warmup_epochs=0, warmup_min_iters=0, decay_part=0.5, by_epoch=False)
    run(tmp_path, [hook, recorder], epochs=2)
    np.testing.assert_allclose([row[0] / 0.01 for row in recorder.seen], [1, 1, 1, 1 - 0.99 / 2], rtol=1e-12)


def test_rates_go_on_after_a_resume(tmp_path):
    hook = dict(type="WarmupLinearDecayHook", warmup_epochs=3, warmup_min_iters=1)
    run(tmp_path, [hook])
    (tmp_path / "work" / "last_checkpoint").write_text(str(tmp_path / "work" / "epoch_2.pth"))
    recorder = Recorder()
    runner = run(tmp_path, [hook, recorder], resume=True)
    np.testing.assert_allclose(recorder.seen, expected(4, 2, 6)[4:], rtol=1e-12)
    assert runner.iter == 8


def test_schedule_refuses_other_optimisers(tmp_path):
    with pytest.raises(ValueError, match="MambaYOLOOptimWrapperConstructor"):
        run(
            tmp_path,
            [dict(type="WarmupLinearDecayHook")],
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1)),
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_mosaic_closes_in_every_dataset_and_worker(tmp_path, workers):
    recorder = Recorder()
    hook = dict(type="CloseMosaicHook", last_epochs=2)
    runner = run(tmp_path, [hook, recorder], dataset=ConcatDataset([Ones(), Ones()]), workers=workers, epochs=3)
    assert recorder.inputs == [2.0] * 4 + [4.0] * 8  # pipelines of 2 and then 4 steps, 4 iterations an epoch
    for dataset in runner.train_dataloader.dataset.datasets:
        load, letterbox, affine, _ = dataset.pipeline.transforms
        assert isinstance(load, LoadPhoto) and load.with_boxes
        assert isinstance(letterbox, LetterBox) and letterbox.size == (64, 64)
        assert isinstance(affine, RandomScaleTranslate) and affine.scale == (1.0, 1.0)
        assert not any(isinstance(step, MosaicAffine) for step in dataset.pipeline.transforms)
