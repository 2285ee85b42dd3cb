from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

import mambavision.detection  # noqa: F401, gives mmcv-lite what mmdet imports
from tests.conftest import shared

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEAVES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.glob("*/*.py") if path.parent.name != "_base_")
DFL = 16  # frozen numbers that the published count includes
PUBLISHED = {
    "mamba_yolo_t_8xb64_300e_coco": 5_442_612,
    "mamba_yolo_b_8xb64_300e_coco": 19_168_164,
    "mamba_yolo_l_8xb64_300e_coco": 49_227_952,
    "mamba_yolo_t_released_8xb64_300e_coco": 6_131_704,
    "mamba_yolo_b_released_8xb64_300e_coco": 21_828_000,
    "mamba_yolo_l_released_8xb64_300e_coco": 57_631_024,
}


def build(cfg):
    init_default_scope("mmdet")
    with torch.device("meta"):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_config_builds_and_survives_a_dump(path, tmp_path):
    cfg = Config.fromfile(CONFIGS / path)
    model = build(cfg)
    if path.stem in PUBLISHED:
        assert sum(param.numel() for param in model.parameters()) == PUBLISHED[path.stem] - DFL
    assert path.stem.isidentifier()
    cfg.dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == cfg.to_dict()
    if "paramwise_cfg" in cfg.optim_wrapper and "batch_size_per_gpu" in cfg.optim_wrapper.paramwise_cfg:
        assert cfg.optim_wrapper.paramwise_cfg.batch_size_per_gpu == cfg.train_dataloader.batch_size


def test_published_configs_are_all_there():
    assert set(PUBLISHED) <= {path.stem for path in LEAVES}


def _comparable(model):
    """The parts of a model config that make its network, losses and assignment."""

    def clean(node):
        if isinstance(node, dict):
            dropped = ("init_cfg", "num_classes", "batch_augments", "_scope_")
            return {key: clean(value) for key, value in node.items() if key not in dropped}
        return list(map(clean, node)) if isinstance(node, list | tuple) else "BN" if node == "SyncBN" else node

    return clean(model.to_dict())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("rtmdet/rtmdet_tiny_bccd.py", "rtmdet/rtmdet_tiny_8xb32-300e_coco.py"),
        ("yolox/yolox_tiny_bccd.py", "yolox/yolox_tiny_8xb8-300e_coco.py"),
    ],
)
def test_baselines_are_mmdets_own(ours, theirs):
    shipped = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / theirs)
    own, reference = _comparable(Config.fromfile(CONFIGS / ours).model), _comparable(shipped.model)
    # mmdet tests YOLOX-tiny at score 0.01 in validation and says 0.001 for tests; all three use 0.001 here
    own["test_cfg"].pop("score_thr"), reference["test_cfg"].pop("score_thr")
    assert own == reference


def test_baselines_share_data_and_budget():
    ours, *baselines = (
        Config.fromfile(CONFIGS / path)
        for path in ("mamba_yolo/mamba_yolo_t_bccd.py", "rtmdet/rtmdet_tiny_bccd.py", "yolox/yolox_tiny_bccd.py")
    )
    for other in baselines:
        assert other.train_dataloader == ours.train_dataloader
        assert other.train_cfg == ours.train_cfg and other.val_evaluator == ours.val_evaluator
        assert other.test_dataloader.dataset.ann_file == ours.test_dataloader.dataset.ann_file
        closing = [hook for hook in other.custom_hooks if hook.type == "CloseMosaicHook"]
        assert closing == [hook for hook in ours.custom_hooks if hook.type == "CloseMosaicHook"]


@pytest.mark.parametrize(
    "path", ["mamba_yolo/mamba_yolo_t_bccd.py", "rtmdet/rtmdet_tiny_bccd.py", "yolox/yolox_tiny_bccd.py"]
)
def test_ground_truth_scores_one_on_the_small_data(path):
    cfg = Config.fromfile(CONFIGS / path)
    build(cfg)
    cfg.test_dataloader.dataset.data_root = str(shared("data", "bccd"))
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, "indices": 6})
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    for sample in dataset:
        truth = sample["data_samples"].gt_instances
        answer = sample["data_samples"].to_dict()
        answer["pred_instances"] = {
            "bboxes": truth.bboxes.tensor, "labels": truth.labels, "scores": torch.ones(len(truth))
        }  # fmt: skip
        metric.process({}, [answer])
    scores = metric.evaluate(size=len(dataset))
    assert len(dataset) == 6 and dataset.metainfo["classes"] == ("Platelets", "RBC", "WBC")
    assert scores["coco/bbox_mAP"] == pytest.approx(1.0)


def test_restorers_share_data_and_budget():
    ours, *baselines = (
        Config.fromfile(CONFIGS / name / f"{stem}_denoise_gray25.py")
        for name, stem in (
            ("serpent", "serpent_s"), ("dncnn", "dncnn"), ("conv_unet", "conv_unet"),
            ("window_transformer", "window_transformer"),
        )
    )  # fmt: skip
    for other in baselines:
        own = other.model.network
        assert own.type != ours.model.network.type and own.in_channels == 1
        for part in ("train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "optim_wrapper",
                     "param_scheduler", "custom_hooks"):  # fmt: skip
            assert other[part] == ours[part], part
        assert other.model.loss == ours.model.loss


DIFFUSION = (
    "dim/dim_s_2x", "dim/dim_s_2x_mamba", "dim/dim_s_mlp", "dim/dim_s", "dim/dim_t", "dim/dim_t_mlp", "dit/dit_s",
    "dit/dit_t",
)  # fmt: skip


def test_diffusion_networks_share_data_and_budget():
    ours, *others = (Config.fromfile(CONFIGS / f"{name}_cifar10.py") for name in DIFFUSION)
    for other in others:
        for part in set(ours) - {"model"}:
            assert other[part] == ours[part], part
        assert {**other.model, "network": None} == {**ours.model, "network": None}


@pytest.mark.parametrize("size", ["s", "t"])
def test_dim_and_its_twin_have_about_the_same_parameters(size):
    found = {
        name: sum(param.numel() for param in build(Config.fromfile(CONFIGS / f"{name}_cifar10.py")).parameters())
        for name in DIFFUSION
        if f"_{size}" in name and name != "dim/dim_s"  # half as deep as dim_s_2x
    }
    twin = found.pop(f"dit/dit_{size}")
    assert len(found) > 1 and all(0.88 < count / twin < 1.13 for count in found.values()), (found, twin)
