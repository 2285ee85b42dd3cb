import csv
import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from mambavision.detection import build_mamba_yolo
from mambavision.detection import cli as detection_cli
from mambavision.detection.weights import from_checkpoint, save_weights
from mambavision.engine import cli
from mambavision.engine.photos import DatasetError
from tests.tools.running import ENVIRONMENT, ROOT, refusal
from tests.tools.torchrun_training import CONFIG, train
from tests.tools.toy_data import CLASSES, make_coco, make_video, make_voc


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data") / "photos")


def data_options(data, **changes):
    options = {"train_json": "train.json", "val_json": "val.json", "train_images": "train", "val_images": "val"}
    options.update(changes)
    return ["--data-root", data] + [
        item for name, value in options.items() for item in (f"--{name.replace('_', '-')}", value)
    ]


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """Work directory of a run that kill -9 ended in the middle of its third epoch."""
    folder = tmp_path_factory.mktemp("killed")
    work, config = folder / "work", folder / "killed.py"
    config.write_text(
        f'_base_ = "{CONFIG}"\n'
        'custom_imports = dict(imports=["mambavision.detection", "tests.tools.kill_hook"])\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="KillHook", iteration=7)]\n'
    )
    command = [sys.executable, ROOT / "tools/train.py", config, "--work-dir", work, "--seed", 0, *data_options(data)]
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "epoch_2.pth").exists() and not (work / "epoch_3.pth").exists()
    return work


def curve(work):
    with open(work / "loss_curve.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture
def trained(killed, data, tool):
    """The killed run, resumed to its end; further calls find it ended."""
    if not (killed / "epoch_3.pth").exists():
        code, _, err = tool("train", CONFIG, "--work-dir", killed, "--resume", *data_options(data))
        assert code == 0, err
    return killed


def test_killed_run_resumes_on_the_same_schedule(trained):
    steps = [row for row in curve(trained) if "lr" in row]
    assert [row["iter"] for row in steps] == list(range(1, 10))
    lr = [0.01 * ((1 - (i // 3) / 3) * 0.99 + 0.01) * min(i / 3, 1) for i in range(9)]
    np.testing.assert_allclose([row["lr"] for row in steps], lr)
    assert all(np.isfinite(row["loss"]) for row in steps)
    assert len([row for row in curve(trained) if "coco/bbox_mAP" in row]) == 3
    checkpoint = torch.load(trained / "epoch_3.pth", weights_only=True)
    assert (checkpoint["meta"]["epoch"], checkpoint["meta"]["iter"]) == (3, 9)
    assert len(checkpoint["optimizer"]["state"]) > 100
    assert not [path for path in trained.iterdir() if path.name.startswith(".")]


def test_checkpoints_carry_averaged_weights_as_state_dict(trained):
    checkpoint = torch.load(trained / "epoch_3.pth", weights_only=True)
    from mmengine.config import Config

    cfg = Config.fromfile(CONFIG)
    cfg.model.bbox_head.num_classes = len(CLASSES)
    detector = from_checkpoint(cfg, trained / "epoch_3.pth")
    assert detector.dataset_meta["classes"] == CLASSES
    steps = checkpoint["ema_state_dict"]["steps"]
    assert steps == 9
    name = "bbox_head.cls_towers.0.2.bias"
    averaged, raw = checkpoint["state_dict"][name], checkpoint["ema_state_dict"][f"module.{name}"]
    assert not torch.equal(averaged, raw)
    assert torch.equal(detector.state_dict()[name], averaged)
    # the bias warm-up moves the raw weights far from the start, the average follows slowly
    start = build_mamba_yolo("debug", classes=CLASSES).state_dict()[name]
    assert (averaged - start).abs().sum() < (raw - start).abs().sum()


def test_evaluation_prints_a_table_and_writes_json(trained, data, tool, tmp_path):
    out = tmp_path / "new" / "metrics.json"
    line = refusal(tool("test", CONFIG, "gone.pth", "--out", tmp_path))  # before the evaluation
    assert f"--out {tmp_path}: this is a folder, a file is wanted" in line
    options = data_options(data)
    code, text, err = tool(
        "test", CONFIG, trained / "epoch_3.pth", "--work-dir", tmp_path / "work", "--out", out, *options
    )
    assert code == 0, err
    assert "coco/bbox_mAP_50" in text
    metrics = json.loads(out.read_text())
    validated = [row for row in curve(trained) if "coco/bbox_mAP" in row][-1]
    assert metrics["coco/bbox_mAP"] == pytest.approx(validated["coco/bbox_mAP"], abs=1e-3)  # the averaged weights


def finds_nothing(folder):
    """A config whose detector never finds a box."""
    config = folder / "nothing.py"
    config.write_text(f'_base_ = "{CONFIG}"\nmodel = dict(test_cfg=dict(score_thr=1.0))\n')
    return config


def test_evaluation_without_detections_is_zero(data, tool, tmp_path, weights):
    out = tmp_path / "metrics.json"
    arguments = [finds_nothing(tmp_path), weights, "--work-dir", tmp_path / "work", "--out", out]
    arguments += [*data_options(data), "--cfg-options", "test_evaluator.classwise=True"]
    code, text, err = tool("test", *arguments)
    assert code == 0, err
    metrics = json.loads(out.read_text())
    assert metrics["coco/bbox_mAP"] == metrics["coco/bbox_mAP_50"] == metrics["coco/red_precision"] == 0
    assert metrics["coco/bbox_mAP_l"] == -1  # there is no large object to find
    assert "coco/bbox_mAP_50" in text


@pytest.mark.parametrize("indicator", ["auto", "coco/bbox_mAP"])
def test_validation_without_detections_still_chooses_a_best_checkpoint(data, tool, tmp_path, indicator):
    work = tmp_path / "work"
    options = ["--cfg-options", "train_cfg.max_epochs=1", f"default_hooks.checkpoint.save_best={indicator}"]
    code, _, err = tool("train", finds_nothing(tmp_path), "--work-dir", work, *data_options(data), *options)
    assert code == 0, err
    assert [row["coco/bbox_mAP"] for row in curve(work) if "coco/bbox_mAP" in row] == [0]
    assert list(work.rglob("best_coco_bbox_mAP_epoch_1.pth"))


def test_loaders_without_workers_keep_none(data, tmp_path):
    root = ROOT / "configs/mamba_yolo"
    for name in ("mamba_yolo_t_custom", "mamba_yolo_t_1xb32_voc0712", "mamba_yolo_t_tinyimagenet"):
        args = SimpleNamespace(
            config=str(root / f"{name}.py"), work_dir=str(tmp_path / "work"), data_root=None, train_json=None,
            val_json=None, launcher="none", cfg_options={"train_dataloader.num_workers": 0},
        )  # fmt: skip
        cfg = detection_cli.load_config(args)
        assert not cfg.train_dataloader.persistent_workers and cfg.val_dataloader.persistent_workers
        args.cfg_options = {"val_dataloader.num_workers": 0, "test_dataloader.num_workers": 0}
        cfg = detection_cli.load_config(args)
        assert cfg.train_dataloader.persistent_workers
        assert not cfg.val_dataloader.persistent_workers and not cfg.test_dataloader.persistent_workers


def test_training_without_workers(data, tool, tmp_path):
    options = ["train_dataloader.persistent_workers=True", "val_dataloader.persistent_workers=True"]
    options = [*data_options(data), "--cfg-options", "train_cfg.max_epochs=1", *options]
    code, _, err = tool("train", CONFIG, "--work-dir", tmp_path / "work", *options)
    assert code == 0, err


def test_voc_trains_and_evaluates(tool, tmp_path):
    root = make_voc(tmp_path / "VOCdevkit")
    config = tmp_path / "voc_debug.py"
    config.write_text(f'_base_ = "{ROOT}/configs/mamba_yolo/mamba_yolo_t_1xb32_voc0712.py"\n' + VOC_DEBUG)
    arguments = [config, "--data-root", root, "--work-dir", tmp_path / "work"]
    code, _, err = tool("train", *arguments)
    assert code == 0, err
    assert [row for row in curve(tmp_path / "work") if "pascal_voc/mAP" in row]
    out = tmp_path / "voc.json"
    code, text, err = tool("test", config, tmp_path / "work/epoch_1.pth", *arguments[1:], "--out", out)
    assert code == 0, err
    assert {"pascal_voc/mAP", "pascal_voc/AP50"} <= set(json.loads(out.read_text())) and "pascal_voc/mAP" in text


VOC_DEBUG = """
model = dict(backbone=dict(size="debug"), neck=dict(size="debug"), bbox_head=dict(in_channels=(16, 24, 32)))
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
test_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
for stage in (*_base_.train_dataloader.dataset.datasets, _base_.val_dataloader.dataset, _base_.test_dataloader.dataset):
    for step in stage.pipeline:
        if "size" in step:
            step.size = 96
train_dataloader["dataset"] = dict(datasets=_base_.train_dataloader.dataset.datasets)
val_dataloader["dataset"] = dict(pipeline=_base_.val_dataloader.dataset.pipeline)
test_dataloader["dataset"] = dict(pipeline=_base_.test_dataloader.dataset.pipeline)
train_cfg = dict(max_epochs=1, val_interval=1)
"""


def test_bfloat16_training_stays_finite(data, tool, tmp_path):
    options = [*data_options(data), "--cfg-options", "train_cfg.max_epochs=1"]
    code, _, err = tool("train", CONFIG, "--work-dir", tmp_path / "work", "--amp", "bf16", *options)
    assert code == 0, err
    assert all(np.isfinite(row["loss"]) for row in curve(tmp_path / "work") if "loss" in row)


def test_training_starts_from_published_weights(data, tool, tmp_path, weights):
    options = [*data_options(data), "--load-from", weights, "--cfg-options", "train_cfg.max_epochs=1"]
    options += ["optim_wrapper.optimizer.lr=0.0", "custom_hooks.0.warmup_bias_lr=0.0"]
    code, _, err = tool("train", CONFIG, "--work-dir", tmp_path / "work", *options)
    assert code == 0, err
    name = "bbox_head.reg_towers.0.0.conv.weight"
    trained = torch.load(tmp_path / "work" / "epoch_1.pth", weights_only=True)["state_dict"][name]
    expected = build_with_seed().state_dict()[name].half().float()
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-7)


def test_training_starts_from_weights_of_other_classes(data, tool, tmp_path):
    many = build_mamba_yolo("debug", classes=[f"thing {i}" for i in range(40)])  # their class towers are wider too
    save_weights(
        many, tmp_path / "many.safetensors", size="debug", variant="aaai", classes=many.dataset_meta["classes"],
        input_size=96,
    )  # fmt: skip
    torch.save({"state_dict": many.state_dict()}, tmp_path / "many.pth")
    for name in ("many.safetensors", "many.pth"):
        work = tmp_path / name.replace(".", "_")
        options = [*data_options(data), "--load-from", tmp_path / name, "--cfg-options", "train_cfg.max_epochs=1"]
        options += ["optim_wrapper.optimizer.lr=0.0", "custom_hooks.0.warmup_bias_lr=0.0"]
        code, _, err = tool("train", CONFIG, "--work-dir", work, "--resume", *options)  # nothing to resume: starts
        assert code == 0, err
        (log,) = work.rglob("*.log")
        assert f"no checkpoint in {work}: starting from the beginning" in log.read_text()
        (line,) = [line for line in log.read_text().splitlines() if "anew: " in line]
        assert "anew: bbox_head.cls_towers (" in line and line.endswith("not used: none")
        assert "size mismatch" not in log.read_text()
        trained = torch.load(work / "epoch_1.pth", weights_only=True)["state_dict"]
        for key, value in many.state_dict().items():
            if "cls_towers" not in key and "running" not in key and "num_batches" not in key:
                expected = value.half().float() if name.endswith("safetensors") else value
                torch.testing.assert_close(trained[key], expected, rtol=0, atol=1e-7, msg=key)
        assert trained["bbox_head.cls_towers.0.2.bias"].shape == (2,)


def test_training_refuses_weights_that_do_not_fit(trained, data, tool, tmp_path):
    (tmp_path / "cut.pth").write_bytes((trained / "epoch_3.pth").read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "w.txt").write_text("no weights")
    for name, message in (
        ("cut.pth", "not a whole checkpoint"),
        ("text.safetensors", "not a safetensors file"),
        ("foreign.pth", "none of its 1 tensors fits"),
        ("list.pth", "holds no state dict"),
        ("w.txt", "not a whole checkpoint"),
    ):
        work = tmp_path / "work"
        options = [*data_options(data), "--load-from", tmp_path / name]
        options += ["--cfg-options", "train_dataloader.num_workers=99"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            line = refusal(tool("train", CONFIG, "--work-dir", work, *options))
        assert message in line and name in line
        assert not [warning for warning in caught if "worker" in str(warning.message)]  # no loader was built
        assert not work.exists()
    options = [*data_options(data), "--cfg-options", "model.backbone.variant=released"]
    line = refusal(tool("train", CONFIG, "--work-dir", trained, "--resume", *options))
    assert "epoch_3.pth does not fit this network" in line and trained.exists()


def test_two_processes_train_like_one(data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += [ROOT / "tests/tools/torchrun_training.py", data, tmp_path / "two", 2]
    subprocess.run(list(map(str, command)), env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in (0, 1)]
    one = train(str(data), str(tmp_path / "one"), 4, "none")
    means = np.mean([rank["losses"] for rank in ranks], 0)
    np.testing.assert_allclose(means, one["losses"], rtol=1e-5)
    for name, value in one["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(ranks[1]["weights"][name], ranks[0]["weights"][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_config.py"], "no config at no_config.py"),
        (
            [CONFIG, "--data-root", "nowhere"],
            "name yours with --data-root and --train-json",
        ),
        ([CONFIG, "--amp", "fp16"], "bf16"),
        ([CONFIG, "--load-from", "gone.pth"], "no weights at gone.pth"),
        ([ROOT / "configs/_base_/default_runtime.py"], "lacks model, train_dataloader, test_dataloader, optim_wrapper"),
        ([CONFIG, "--cfg-options", "train_cfgs.max_epochs=1"], "has no train_cfgs; did you mean train_cfg?"),
        ([CONFIG, "--cfg-options", "bogus=1"], "bogus: the config has no bogus, nor does a run read one"),
        ([CONFIG, "--cfg-options", "model.bbox_head.bogus=1"], "unexpected keyword argument 'bogus'"),
        ([CONFIG, "--cfg-options", "model.neck.type=Nek"], "Nek is not in the"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is possible here")
def test_training_refuses_bad_arguments(tool, tmp_path, arguments, message):
    work = tmp_path / "runs" / "work"
    code, text, err = tool("train", *arguments, "--work-dir", work)
    assert message in refusal((code, text, err))
    assert "--data-root" not in message or not text  # before mmengine's log
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"), [("model", "KEY=VALUE pairs"), ('model=dict(a="b",c=1)', "named by dots")]
)
def test_options_that_cannot_be_read(tool, option, message):
    code, _, err = tool("train", CONFIG, "--cfg-options", option)
    assert code == 2 and message in err.splitlines()[-1]


def test_training_refuses_a_broken_config(tool, tmp_path):
    (tmp_path / "broken.py").write_text("model = dict(\n")
    assert "cannot read the config" in refusal(tool("train", tmp_path / "broken.py", "--work-dir", tmp_path / "work"))


def _change(path, key, value):
    content = json.loads(path.read_text())
    content["annotations"][0][key] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: "{", "not valid JSON"),
        (lambda path: json.dumps({"images": []}), "annotations"),
        (lambda path: json.dumps(_change(path, "category_id", 77)), "category id 77"),
    ],
)
def test_training_refuses_bad_annotations(data, tool, tmp_path, content, message):
    bad = tmp_path / "bad.json"
    bad.write_text(content(data / "train.json"))
    work = tmp_path / "work"
    assert message in refusal(tool("train", CONFIG, "--work-dir", work, *data_options(data, train_json=bad)))
    assert not work.exists()


def test_training_refuses_classes_that_do_not_fit(data, tool, tmp_path):
    options = [*data_options(data), "--cfg-options", "model.bbox_head.num_classes=7"]
    line = refusal(tool("train", CONFIG, "--work-dir", tmp_path / "work", *options))
    assert "has 2 classes (red, green), the network 7" in line
    assert not (tmp_path / "work").exists()


def test_training_on_background_alone(data, tool, tmp_path):
    content = json.loads((data / "train.json").read_text()) | {"annotations": []}
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(content))
    options = [*data_options(data, train_json=empty), "--cfg-options", "train_cfg.max_epochs=1"]
    code, _, err = tool("train", CONFIG, "--work-dir", tmp_path / "work", *options)
    assert code == 0, err
    losses = [row for row in curve(tmp_path / "work") if "loss" in row]
    assert all(row["loss_bbox"] == 0 and row["loss_cls"] > 0 for row in losses)


def build_with_seed():
    torch.manual_seed(3)
    return build_mamba_yolo("debug", classes=CLASSES).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A published file of random weights."""
    path = tmp_path_factory.mktemp("weights") / "debug.safetensors"
    save_weights(build_with_seed(), path, size="debug", variant="aaai", classes=CLASSES, input_size=96)
    return path


def detections(out):
    return json.loads((out / "detections.json").read_text())


def test_detect_a_photo(data, tool, tmp_path, weights):
    photo = data / "val" / "0.png"
    code, out, err = tool("detect", photo, "--out-dir", tmp_path, "--weights", weights, "--score-thr", "0")
    assert code == 0, err
    (image,) = detections(tmp_path)["images"]
    assert (image["file"], image["width"], image["height"]) == (str(photo), 96, 64)
    assert 0 < len(image["boxes"]) <= 300
    box = image["boxes"][0]
    assert box["class"] in CLASSES and 0 <= box["xyxy"][0] <= box["xyxy"][2] <= 96
    assert cv2.imread(str(tmp_path / "0.png")).shape == (64, 96, 3)
    (line,) = [line for line in out.splitlines() if "written to" in line]
    assert line.endswith(f"written to {tmp_path} (weights debug.safetensors, 2 classes)")


def test_detect_replaces_only_what_it_may(data, tool, tmp_path, weights):
    out, photo = tmp_path / "out", data / "val" / "0.png"
    out.mkdir()
    for name in ("0.png", "detections.json"):
        (out / name).write_text("mine")
        line = refusal(tool("detect", photo, "--out-dir", out, "--weights", weights))
        assert f"{out / name} exists already: name another --out-dir, or pass --overwrite" in line
        assert (out / name).read_text() == "mine"
        assert tool("detect", photo, "--out-dir", out, "--weights", weights, "--overwrite")[0] == 0
        assert (out / name).read_bytes() != b"mine"
        (out / "detections.json").unlink(missing_ok=True)
        (out / "0.png").unlink()


def test_detect_says_what_its_own_weights_are(data, tool, tmp_path):
    code, text, _ = tool("detect", "--help")
    assert code == 0 and "mamba_yolo_t_tinyimagenet.safetensors" in text and "200 classes" in " ".join(text.split())
    code, text, err = tool("detect", data / "val" / "0.png", "--out-dir", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    assert "(weights mamba_yolo_t_tinyimagenet.safetensors, 200 classes)" in text


def test_detect_a_folder_leaves_out_what_cannot_be_read(data, tool, tmp_path, weights):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    picture = cv2.imread(str(data / "val" / "0.png"))
    cv2.imwrite(str(folder / "a.jpg"), picture)
    cv2.imwrite(str(folder / "more" / "b.tiff"), picture.astype(np.uint16) * 257)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900])
    (folder / "notes.txt").write_text("not a photo")
    out = tmp_path / "out"
    line = refusal(tool("detect", folder, "--out-dir", out, "--weights", weights))
    assert "cut.jpg" in line and "truncated" in line
    found = detections(out)
    assert [Path(image["file"]).name for image in found["images"]] == ["a.jpg", "b.tiff"]
    assert len(found["errors"]) == 1
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == ["a.jpg", "b.tiff.png", "detections.json"]


def test_detect_a_video(tool, tmp_path, weights):
    clip = make_video(tmp_path / "clip.mp4")
    code, text, err = tool("detect", clip, "--out-dir", tmp_path / "out", "--weights", weights)
    assert code == 0, err
    assert len(detections(tmp_path / "out")["video"]["frames"]) == 5
    assert "(weights debug.safetensors, 2 classes)" in text
    line = refusal(tool("detect", clip, "--out-dir", tmp_path / "out", "--weights", weights))
    assert "exists already" in line
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and capture.read()[1].shape == (64, 96, 3)


def test_detect_with_a_config_and_checkpoint(trained, data, tool, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(f'_base_ = "{CONFIG}"\nmodel = dict(bbox_head=dict(num_classes=2))\n')
    options = ["--config", config, "--weights", trained / "epoch_3.pth", "--score-thr", 0]
    code, _, err = tool("detect", data / "val", "--out-dir", tmp_path / "out", *options)
    assert code == 0, err
    assert detections(tmp_path / "out")["classes"] == list(CLASSES)
    assert len(detections(tmp_path / "out")["images"]) == 4


def bad_inputs(folder):
    """Name of a bad input and a part of what is said about it."""
    (folder / "empty").mkdir()
    (folder / "text.jpg").write_text("this is no photo")
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video")
    whole = make_video(folder / "whole.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    return {
        "gone.jpg": "no such photo",
        "gone.mp4": "no such video",
        "empty": "no photos in this folder",
        "text.jpg": "not a photo",
        "zero.png": "empty file",
        "text.mp4": "not a video",
        "cut.mp4": "not a video",
    }


def test_detect_refuses_bad_inputs_and_writes_nothing(tool, tmp_path, weights):
    out = tmp_path / "out"
    for name, message in bad_inputs(tmp_path).items():
        line = refusal(tool("detect", tmp_path / name, "--out-dir", out, "--weights", weights))
        assert message in line and name in line, line
        assert not out.exists(), name


def test_detect_refuses_bad_options(data, tool, tmp_path, weights):
    photo, out = data / "val" / "0.png", tmp_path / "out"
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "x.pth").write_bytes(b"nothing")
    (tmp_path / "w.txt").write_text("nothing")
    for options, message in (
        (["--weights", "gone.safetensors"], "no weights at gone.safetensors"),
        (["--weights", tmp_path / "cut.safetensors"], "cut short"),
        (["--weights", tmp_path / "x.pth"], "--config"),
        (["--weights", tmp_path / "x.pth", "--config", CONFIG], "not a whole checkpoint"),
        (["--weights", tmp_path / "w.txt"], "weights end in .safetensors, or in .pth with their --config"),
        (["--weights", weights, "--device", "gpu"], "device 'gpu' cannot be used: pass --device cpu, cuda or cuda:N"),
        (["--weights", weights, "--device", "meta"], "device 'meta' cannot be used: pass --device cpu, cuda or cuda:N"),
        (["--weights", weights, "--device", "cuda:x"], "device 'cuda:x' cannot be used"),
        (["--weights", weights, "--score-thr", "1.5"], "1.5"),
        (["--weights", weights, "--config", CONFIG], "holds a detector and does not fit this network"),
        (["--weights", weights, "--config", ROOT / "configs/dim/dim_debug.py"], "for diffusion, not for detection"),
    ):
        assert message in refusal(tool("detect", photo, "--out-dir", out, *options))
        assert not out.exists()
    line = refusal(tool("detect", photo, "--out-dir", photo.parent, "--weights", weights))
    assert "would be overwritten" in line


def test_folders_that_are_files_are_refused_first(tool, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder in (file, file / "deeper" / "still"):
        message = f"{folder}: {file} is a file, a folder is wanted"
        assert f"--out-dir {message}" in refusal(tool("detect", "gone.jpg", "--out-dir", folder, "--weights", "gone"))
        assert f"--work-dir {message}" in refusal(tool("train", "gone.py", "--work-dir", folder))
        assert f"--work-dir {message}" in refusal(tool("test", "gone.py", "gone.pth", "--work-dir", folder))
        assert f"--work-dir {message}" in refusal(tool("train", CONFIG, "--cfg-options", f"work_dir={folder}"))
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


class _Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DatasetError("photo.jpg: truncated photo")


def test_errors_of_loader_workers_are_one_line_too(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: next(iter(torch.utils.data.DataLoader(_Broken(), num_workers=1))))
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: photo.jpg: truncated photo"
