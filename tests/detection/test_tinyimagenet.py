import mambavision.detection  # noqa: F401  makes mmdet importable

# isort: split
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, HOOKS
from mmengine.config import Config
from mmengine.hooks import Hook

from mambavision.detection import cli
from mambavision.detection.tinyimagenet import TinyImageNetMosaic, _partition
from mambavision.detection.tinyimagenet_pack import class_names, pack, read_entries, shard, unpack
from mambavision.engine.photos import DatasetError
from tests.tools.running import refusal, run_tool
from tests.tools.toy_data import forget_runs

CLASSES = {"n03": "crane, heavy lifter", "n01": "gold fish, Carassius", "n02": "crane, bird"}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder like tiny-imagenet-200 with 3 classes: gray photos, the object a flat square of the class's colour."""
    root = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    rng = np.random.default_rng(0)
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    (root / "words.txt").write_text("".join(f"{wnid}\t{words}\n" for wnid, words in CLASSES.items()))
    val_lines = []
    for number, wnid in enumerate(sorted(CLASSES)):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        lines = []
        for i in range(12):
            x1, y1 = rng.integers(0, 30, 2)
            x2, y2 = rng.integers(44, 64, 2)  # inclusive
            img = np.full((64, 64, 3), 60, np.uint8)
            img[y1 : y2 + 1, x1 : x2 + 1] = np.eye(3, dtype=np.uint8)[number] * 255
            # two kinds of JPEG headers
            options = [cv2.IMWRITE_JPEG_QUALITY, 98 - i % 2, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111]
            if i < 8:
                cv2.imwrite(str(folder / f"{wnid}_{i}.JPEG"), img, options)
                lines.append(f"{wnid}_{i}.JPEG\t{x1}\t{y1}\t{x2}\t{y2}\n")
            else:
                name = f"val_{number}_{i}.JPEG"
                cv2.imwrite(str(root / "val" / "images" / name), img, options)
                val_lines.append(f"{name}\t{wnid}\t{x1}\t{y1}\t{x2}\t{y2}\n")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(lines))
    (root / "val" / "val_annotations.txt").write_text("".join(val_lines))
    return root


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pack(source, out)
    return out


def test_names_are_first_synonyms_made_distinct(source):
    assert class_names(source) == ("gold fish", "crane, bird", "crane, heavy lifter")


def test_pack_holds_every_photo_with_its_box(source, packed):
    for split, count in (("train", 24), ("val", 12)):
        photos = np.load(packed / f"{split}_photos.npy", mmap_mode="r")
        boxes, labels = np.load(packed / f"{split}_boxes.npy"), np.load(packed / f"{split}_labels.npy")
        assert photos.shape == (count, 64, 64, 3) and photos.dtype == np.uint8 and boxes.dtype == np.int16
        for i, entry in enumerate(read_entries(source, split)):
            assert np.array_equal(photos[i], cv2.imread(str(entry.path)))
            assert tuple(boxes[i]) == entry.box and labels[i] == entry.label
            x1, y1, x2, y2 = entry.box
            assert np.abs(photos[i][y1:y2, x1:x2].astype(int) - 60).max(-1).min() > 20  # all of it the object
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64


def test_shards_are_small_and_lossless(source, packed, tmp_path):
    files = shard(source, tmp_path / "shards", max_bytes=8000)
    shards = [path for path in files if path.suffix == ".bin"]
    assert len(shards) > 2 and all(path.stat().st_size <= 8000 for path in shards)
    unpack(tmp_path / "shards", tmp_path / "out", workers=2)
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_tool(source, packed, tmp_path, monkeypatch, capfd):
    code, _, err = run_tool(monkeypatch, capfd, "tinyimagenet", "pack", source, tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "train_photos.npy").read_bytes() == (packed / "train_photos.npy").read_bytes()
    wrong = run_tool(monkeypatch, capfd, "tinyimagenet", "pack", tmp_path / "nowhere", tmp_path / "b")
    assert "no such file" in refusal(wrong)


@pytest.mark.parametrize("split", ["train", "val"])
def test_pictures_are_deterministic_and_differ(packed, split):
    make = lambda **options: TinyImageNetMosaic(root=packed, split=split, length=100, pipeline=[], **options)  # noqa: E731
    first, again, other = make(), make(), make(seed=1)
    for i in (0, 7, 99):
        assert all(np.array_equal(a, b) for a, b in zip(first.sample(i), again.sample(i), strict=True))
        assert not np.array_equal(first.sample(i)[0], other.sample(i)[0])
    assert not np.array_equal(first.sample(0)[0], first.sample(1)[0])


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [160, 320])
def test_boxes_lie_on_their_objects(packed, split, size):
    data = TinyImageNetMosaic(root=packed, split=split, length=10**6, size=size, pipeline=[])
    counts, sides = [], []
    for i in range(60):
        img, boxes, labels = data.sample(i)
        assert img.shape == (size, size, 3) and img.dtype == np.uint8
        assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4) and labels.dtype == np.int64
        assert (boxes >= 0).all() and (boxes <= size).all()
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            assert min(x2 - x1, y2 - y1) >= 6
            patch = img[round(y1) : round(y2), round(x1) : round(x2)].astype(int)
            matching = (patch.max(-1) - patch.min(-1) > 100) & (patch.argmax(-1) == label)
            assert matching.mean() > 0.4  # what hides an object takes at most half
        counts.append(len(boxes))
        sides += np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).tolist()
    assert 1 <= max(counts) <= 60 and np.mean(counts) > 4 and len(set(counts)) > 5
    assert min(sides) < 0.12 * size and max(sides) > 0.5 * size


def test_boxes_are_tight_where_nothing_hides_the_object(packed):
    """A little inside a box of a tiled picture is nothing but its colour, a little outside something else."""
    data = TinyImageNetMosaic(root=packed, split="train", length=100, pipeline=[])
    inside = outside = 0
    for i in range(100):
        img = np.full((320, 320, 3), 114, np.uint8)
        rng = np.random.default_rng(i)
        boxes, labels = data._tile(img, rng)
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            inner = img[int(y1) + 5 : int(y2) - 5, int(x1) + 5 : int(x2) - 5].reshape(-1, 3).astype(int)
            if len(inner):
                assert (inner[:, label] > 180).all() and (np.delete(inner, label, 1) < 90).all()
                inside += 1
            # to the right is gray ground, or the next cell, now and then with an object of the same class
            right = img[int(y1) + 5 : int(y2) - 5, min(int(x2) + 5, 319), label]
            outside += len(right) == 0 or right.mean() < 180
    assert inside > 300 and outside > 0.6 * inside


def test_partition_covers_the_canvas_once():
    for seed in range(20):
        covered = np.zeros((320, 300), int)
        for x, y, w, h in _partition(300, 320, 90.0, 48.0, np.random.default_rng(seed)):
            assert min(w, h) >= 47
            covered[y : y + h, x : x + w] += 1
        assert (covered == 1).all()


def test_in_a_pipeline_and_with_coco_metric(packed):
    keys = ("img_id", "img_shape", "ori_shape", "scale_factor", "instances")
    data = DATASETS.build(
        {
            "type": "TinyImageNetMosaic",
            "root": str(packed),
            "split": "val",
            "length": 6,
            "size": 160,
            "test_mode": True,
            "pipeline": [{"type": "HSVGain"}, {"type": "PackDetInputs", "meta_keys": keys}],
        }
    )
    assert len(data) == 6 and data.metainfo["classes"] == ("gold fish", "crane, bird", "crane, heavy lifter")
    metric = CocoMetric(metric="bbox")
    metric.dataset_meta = data.metainfo
    for i in range(len(data)):
        item = data[i]
        assert item["inputs"].shape == (3, 160, 160)
        truth = item["data_samples"].gt_instances
        found = {"bboxes": truth.bboxes.tensor, "labels": truth.labels, "scores": torch.ones(len(truth))}
        metric.process({}, [{**item["data_samples"].to_dict(), "pred_instances": found}])
    assert metric.evaluate(len(data))["coco/bbox_mAP"] == pytest.approx(1.0, abs=1e-3)


@HOOKS.register_module()
class SeenPictures(Hook):
    priority = "LOWEST"
    seen: ClassVar[list] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        rate = runner.optim_wrapper.param_groups[0]["lr"]
        self.seen.append((round(rate, 9), *[sample.img_id for sample in data_batch["data_samples"]]))


def test_sessions_of_pretraining_continue_each_other(packed, tmp_path):
    """The config in small: a session sees the pictures after the last one's, at one rate until the last half."""

    def session(max_epochs, *, resume):
        forget_runs()
        cfg = Config.fromfile(REPOSITORY / "configs/mamba_yolo/mamba_yolo_t_tinyimagenet.py")
        cfg.work_dir, cfg.launcher = str(tmp_path / "work"), "none"
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        debug = dict(size="debug")
        cfg.merge_from_dict(
            dict(
                model=dict(backbone=debug, neck=debug, bbox_head=dict(num_classes=3, in_channels=(16, 24, 32))),
                train_dataloader=dict(
                    batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(epoch_length=4),
                    dataset=dict(root=str(packed), size=64),
                ),
                default_hooks=dict(checkpoint=dict(save_best=None)),
            )
        )  # fmt: skip
        cfg.train_cfg.max_epochs = max_epochs
        cfg.custom_hooks[0].update(warmup_epochs=1, warmup_min_iters=0)
        cfg.custom_hooks.append(dict(type="SeenPictures"))
        SeenPictures.seen.clear()
        cli.train(cfg, resume=resume, seed=0)
        return list(SeenPictures.seen)

    def step(i, epochs):
        part_left = 1 - i / 2 / epochs
        return round(0.01 * (1 - 0.99 * max(0, 1 - part_left / 0.5)), 9), 2 * i, 2 * i + 1

    assert session(2, resume=False)[:3] == [(0.0, 0, 1), (0.005, 2, 3), (0.01, 4, 5)]
    second = session(5, resume=True)
    assert second == [step(i, 5) for i in range(4, 10)]
    assert second[1][0] == 0.01 > second[2][0]
    assert session(6, resume=True) == [step(10, 6), step(11, 6)]


def test_no_pack(tmp_path):
    with pytest.raises(DatasetError, match="not a Tiny-ImageNet pack") as error:
        TinyImageNetMosaic(root=tmp_path, length=1, pipeline=[])
    assert "\n" not in str(error.value)
