"""mmdet and mmcv's operators on mmcv-lite."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision

from mambavision.engine import openmmlab

openmmlab.install()

from mmcv.ops import SigmoidFocalLoss, batched_nms, nms, nms_match, point_sample, roi_align, soft_nms  # noqa: E402

needs_stand_in = pytest.mark.skipif(not openmmlab.has_stand_in(), reason="a compiled mmcv is installed")


def random_boxes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat((corner, corner + 5 + torch.rand(count, 2, generator=generator) * 40), 1), torch.rand(
        count, generator=generator
    )


def overlaps(boxes: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """IoU with box sides x2 - x1 + offset, written out."""
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    inner = (high - low + offset).clamp(min=0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2] + offset).prod(-1)
    return inner / (area[:, None] + area[None] - inner)


def greedy(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    iou, kept = overlaps(boxes, offset), []
    for index in scores.argsort(descending=True).tolist():
        if all(iou[index, other] <= threshold for other in kept):
            kept.append(index)
    return kept


def test_mmdet_imports_and_install_is_idempotent():
    import mmdet.datasets  # noqa: F401
    import mmdet.evaluation  # noqa: F401
    import mmdet.models  # noqa: F401

    before = sys.modules["mmcv._ext"]
    openmmlab.install()
    assert sys.modules["mmcv._ext"] is before


@pytest.mark.parametrize("threshold", [0.3, 0.65])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_nms_equals_torchvision(count: int, threshold: float):
    boxes, scores = random_boxes(count)
    dets, kept = nms(boxes, scores, threshold)
    expected = torchvision.ops.nms(boxes, scores, threshold)
    assert torch.equal(kept, expected)
    assert torch.equal(dets, torch.cat((boxes, scores[:, None]), 1)[expected])


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_equals_the_definition(offset: int):
    boxes, scores = random_boxes(120, seed=1)
    boxes = boxes.round()
    assert nms(boxes, scores, 0.5, offset=offset)[1].tolist() == greedy(boxes, scores, 0.5, offset)


def test_nms_limits_and_half_precision():
    boxes, scores = random_boxes(80)
    _, kept = nms(boxes, scores, 0.5, score_threshold=0.4, max_num=7)
    confident = (scores > 0.4).nonzero().squeeze(1)
    assert torch.equal(kept, confident[torchvision.ops.nms(boxes[confident], scores[confident], 0.5)][:7])
    half = boxes.bfloat16()
    assert torch.equal(nms(half, scores, 0.5)[1], torchvision.ops.nms(half.float(), scores, 0.5))
    assert isinstance(nms(boxes.numpy(), scores.numpy(), 0.5)[0], np.ndarray)


@pytest.mark.parametrize("split_thr", [10000, 100])
def test_batched_nms_equals_torchvision(split_thr: int):
    boxes, scores = random_boxes(300)
    classes = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(2))
    dets, kept = batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.5, split_thr=split_thr))
    expected = torchvision.ops.batched_nms(boxes, scores, classes, 0.5)
    assert torch.equal(kept, expected)
    assert torch.allclose(dets, torch.cat((boxes, scores[:, None]), 1)[expected])


def test_soft_nms_naive_is_nms():
    boxes, scores = random_boxes(100)
    _, kept = soft_nms(boxes, scores, 0.5, method="naive", min_score=1e-6)
    assert kept.tolist() == greedy(boxes, scores, 0.5, 0)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_decays_by_overlap(method: str):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30]])  # IoU of the first two: 0.8
    dets, kept = soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5, sigma=0.5, method=method)
    decay = 0.2 if method == "linear" else float(np.exp(-(0.8**2) / 0.5))
    assert kept.tolist() == [0, 2, 1]
    assert torch.allclose(dets[:, 4], torch.tensor([0.9, 0.7, 0.8 * decay]))


def test_nms_match_groups_each_box_once():
    boxes, scores = random_boxes(60)
    groups = [group.tolist() for group in nms_match(torch.cat((boxes, scores[:, None]), 1), 0.5)]
    assert sorted(sum(groups, [])) == list(range(60))
    assert [group[0] for group in groups] == greedy(boxes, scores, 0.5, 0)
    iou = overlaps(boxes)
    assert all(iou[group[0], other] >= 0.5 for group in groups for other in group[1:])


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_and_gradient_equal_torchvision(aligned: bool):
    image = torch.randn(2, 3, 20, 24, requires_grad=True)
    rois = torch.tensor([[0.0, 2, 3, 30, 25], [1, 0, 0, 10, 40]])
    ours = roi_align(image, rois, (4, 5), 0.5, 2, "avg", aligned)
    theirs = torchvision.ops.roi_align(image, rois, (4, 5), 0.5, 2, aligned)
    assert torch.equal(ours, theirs)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), image)[0] for out in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_focal_loss_and_gradient_follow_the_formula(weighted: bool):
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    target = torch.arange(12) % 5  # 4 is background
    weight = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64) if weighted else None
    positive = torch.nn.functional.one_hot(target, 5)[:, :4].bool()
    p = logits.sigmoid()
    expected = torch.where(positive, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
    if weighted:
        expected = expected * weight[target.clamp(max=3), None]
    ours = SigmoidFocalLoss(2.0, 0.25, weight, "sum")(logits, target)
    assert torch.allclose(ours, expected.sum())
    assert torch.allclose(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, expected.sum())))


@needs_stand_in
def test_other_operators_say_their_name():
    from mmcv.ops import DeformConv2d

    with pytest.raises(NotImplementedError, match="'deform_conv_forward' needs a compiled mmcv"):
        DeformConv2d(3, 4, 3, padding=1)(torch.randn(1, 3, 8, 8), torch.zeros(1, 18, 8, 8))
    assert point_sample(torch.ones(1, 2, 4, 4), torch.rand(1, 5, 2)).shape == (1, 2, 5)  # needs no operator


@needs_stand_in
def test_a_compiled_mmcv_is_left_alone():
    code = """
import sys, types
sys.modules["mmcv._ext"] = real = types.ModuleType("mmcv._ext")
from mambavision.engine import openmmlab
openmmlab.install()
assert sys.modules["mmcv._ext"] is real and not openmmlab.has_stand_in()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mmdet_configs_are_found_by_package(tmp_path):
    from mmengine.config import Config

    path = tmp_path / "config.py"
    path.write_text('_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"\n')
    assert Config.fromfile(path).model.type == "RTMDet"
