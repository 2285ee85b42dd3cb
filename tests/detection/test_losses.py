import math

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS

import mambavision.detection  # noqa: F401  (makes mmdet importable)
from mambavision.detection.losses import (
    CompleteIoULoss,
    SideMeanDistributionFocalLoss,
    SoftTargetBCELoss,
    complete_iou,
    distribution_focal_loss,
    global_normalizer,
)
from tests.parity import load


def ciou_by_hand(box: list[float], target: list[float]) -> float:
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box, target
    inter = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
    iou = inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)
    diagonal = (max(x2, u2) - min(x1, u1)) ** 2 + (max(y2, v2) - min(y1, v1)) ** 2
    distance = ((u1 + u2 - x1 - x2) / 2) ** 2 + ((v1 + v2 - y1 - y2) / 2) ** 2
    v = 4 / math.pi**2 * (math.atan((u2 - u1) / (v2 - v1)) - math.atan((x2 - x1) / (y2 - y1))) ** 2
    return iou - distance / diagonal - (v * v / (v - iou + 1) if v else 0)


def test_complete_iou_of_the_published_code():
    fixture = load("myolo_tal")
    boxes, targets = (torch.from_numpy(fixture.arrays[key]) for key in ("ciou_boxes1", "ciou_boxes2"))
    fixture.check("out_ciou", complete_iou(boxes, targets).unsqueeze(-1), tol=1e-6)


def test_complete_iou_formula_and_broadcasting():
    a = torch.tensor([[0.0, 0, 10, 4], [3, 3, 9, 20], [30, 30, 40, 44]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2, 12, 8], [0, 0, 10, 4]], dtype=torch.float64)
    pairs = complete_iou(a[:, None], b[None])
    expected = [[ciou_by_hand(p, q) for q in b.tolist()] for p in a.tolist()]
    torch.testing.assert_close(pairs, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_aspect_weight_is_a_constant_and_not_gated_by_the_iou():
    box = torch.tensor([[0.0, 0.0, 3.0, 9.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[2.0, 5.0, 12.0, 11.0]], dtype=torch.float64)
    (grad,) = torch.autograd.grad(complete_iou(box, target).sum(), box)

    x1, y1, x2, y2 = box.unbind(-1)
    w, h, inter = x2 - x1, y2 - y1, (x2 - 2) * (y2 - 5)
    iou = inter / (w * h + 10 * 6 - inter)
    v = 4 / math.pi**2 * (math.atan(10 / 6) - torch.atan(w / h)) ** 2
    distance = ((14 - x1 - x2) ** 2 + (16 - y1 - y2) ** 2) / 4
    value = iou - distance / ((12 - x1) ** 2 + (11 - y1) ** 2) - v * (v / (v - iou + 1)).detach()
    assert iou.item() < 0.5
    (expected,) = torch.autograd.grad(value.sum(), box)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def test_focal_loss_is_the_mean_over_sides_with_clamped_targets():
    logits = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0.0, 3.25, 14.99, 40.0], [-2.0, 1.0, 7.5, 14.5]] + [[2.0] * 4] * 3)
    expected = []
    for sides, distances in zip(logits, target.clamp(0, 14.99), strict=True):
        total = 0.0
        for side, t in zip(sides, distances.tolist(), strict=True):
            j = int(t)
            p = side.softmax(0)
            total -= (j + 1 - t) * p[j].log() + (t - j) * p[j + 1].log()
        expected.append(total / 4)
    torch.testing.assert_close(distribution_focal_loss(logits, target), torch.stack(expected))


def test_focal_loss_is_least_at_the_target():
    logits = torch.full((1, 4, 16), -30.0)
    logits[..., 3], logits[..., 4] = math.log(0.75), math.log(0.25)
    best = distribution_focal_loss(logits, torch.full((1, 4), 3.25))
    torch.testing.assert_close(best, torch.tensor([-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]))
    assert distribution_focal_loss(logits, torch.full((1, 4), 3.6)) > best


def test_registered_losses_weigh_sum_and_divide():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2]])
    ciou = MODELS.build({"type": "CompleteIoULoss", "loss_weight": 2.0})
    assert isinstance(ciou, CompleteIoULoss)
    weight = torch.tensor([0.0, 0.5])
    expected = 2 * 0.5 * (1 - complete_iou(boxes, boxes.flip(0)))[1] / 4
    torch.testing.assert_close(ciou(boxes, boxes.flip(0), weight=weight, avg_factor=4), expected)

    logits = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
    dfl = MODELS.build({"type": "SideMeanDistributionFocalLoss"})
    assert isinstance(dfl, SideMeanDistributionFocalLoss)
    torch.testing.assert_close(dfl(logits, boxes), 1.5 * distribution_focal_loss(logits, boxes).mean())

    bce = MODELS.build({"type": "SoftTargetBCELoss"})
    assert isinstance(bce, SoftTargetBCELoss)
    target = torch.rand(2, 4)
    expected = 0.5 * F.binary_cross_entropy(boxes.sigmoid(), target, reduction="sum") / 3
    torch.testing.assert_close(bce(boxes, target, avg_factor=torch.tensor(3.0)), expected)


@pytest.mark.parametrize(("score_sum", "divisor"), [(12.0, 12.0 / 8), (0.25, 1.0 / 8), (0.0, 1.0 / 8)])
def test_one_process_divides_by_the_scores_and_multiplies_by_the_batch(score_sum, divisor):
    assert global_normalizer(torch.tensor(score_sum), 8).item() == divisor
