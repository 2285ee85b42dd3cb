import pytest
import torch
from torch import Tensor

import mambavision.detection  # noqa: F401  (makes mmdet importable)
from mambavision.detection.assigner import GroundTruth, TaskAlignedCIoUAssigner, pad_ground_truth
from mambavision.detection.losses import complete_iou
from tests.parity import load

CASES = {"k10": (10, 0.5), "k3": (3, 0.5), "k13a1": (13, 1.0)}


def brute_force(
    scores: Tensor, boxes: Tensor, points: Tensor, gt: GroundTruth, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, pair by pair."""
    foreground = torch.zeros(scores.shape[:2], dtype=torch.bool)
    index, target = torch.zeros(scores.shape[:2], dtype=torch.long), torch.zeros(scores.shape[:2])
    for b in range(len(scores)):
        overlap, metric = {}, {}
        for g in range(gt.boxes.shape[1]):
            if not gt.valid[b, g]:
                continue
            x1, y1, x2, y2 = gt.boxes[b, g].tolist()
            for a, (x, y) in enumerate(points.tolist()):
                if min(x - x1, y - y1, x2 - x, y2 - y) > 1e-9:
                    overlap[g, a] = max(complete_iou(boxes[b, a], gt.boxes[b, g]).item(), 0)
                    metric[g, a] = scores[b, a, gt.labels[b, g]].item() ** 0.5 * overlap[g, a] ** 6
        owners = {}
        for g in {g for g, _ in metric}:
            best = sorted((a for h, a in metric if h == g and metric[g, a] > 0), key=lambda a, g=g: -metric[g, a])
            for a in best[:topk]:
                owners.setdefault(a, []).append(g)
        kept = {}
        for a, gs in owners.items():
            kept[a] = (
                gs[0] if len(gs) == 1 else max((g for g, i in overlap if i == a), key=lambda g, a=a: overlap[g, a])
            )
        for a, g in kept.items():
            mine = [i for i, h in kept.items() if h == g]
            foreground[b, a], index[b, a] = True, g
            target[b, a] = metric[g, a] * max(overlap[g, i] for i in mine) / (max(metric[g, i] for i in mine) + 1e-9)
    return foreground, index, target


def random_case(seed: int, *, images: int = 3, most: int = 7) -> tuple[Tensor, Tensor, Tensor, GroundTruth]:
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(8) * 8.0 + 4, torch.arange(8) * 8.0 + 4, indexing="ij")
    points = torch.stack((x, y), -1).view(-1, 2)
    half = torch.rand(images, 64, 4, generator=g) * 24
    boxes = torch.cat((points - half[..., :2], points + half[..., 2:]), -1)
    counts = torch.randint(0, most + 1, (images,), generator=g).tolist()
    corners = [torch.rand(n, 2, 2, generator=g) * 64 for n in counts]
    gt_boxes = [torch.cat((c.amin(1), c.amax(1)), 1) for c in corners]
    labels = [torch.randint(0, 4, (n,), generator=g) for n in counts]
    return torch.rand(images, 64, 4, generator=g), boxes, points, pad_ground_truth(gt_boxes, labels)


@pytest.mark.parametrize("max_pairs", [1, 2**24])
@pytest.mark.parametrize("case", CASES)
def test_assignment_of_the_published_assigner(case, max_pairs):
    topk, alpha = CASES[case]
    fixture = load("myolo_tal")
    array = {key: torch.from_numpy(value) for key, value in fixture.arrays.items()}
    gt = GroundTruth(array["in_gt_bboxes"], array["in_gt_labels"][..., 0].long(), array["in_mask_gt"][..., 0].bool())
    assigner = TaskAlignedCIoUAssigner(topk=topk, alpha=alpha, max_pairs=max_pairs)
    found = assigner.assign(array["in_scores"], array["in_bboxes"], array["in_anchor_pixels"], gt)
    foreground = array[f"{case}_fg"].bool()
    assert torch.equal(found.foreground, foreground)
    assert torch.equal(found.gt_index[foreground], array[f"{case}_gt_idx"][foreground].long())
    labels = gt.labels.gather(1, found.gt_index)
    assert torch.equal(labels[foreground], array[f"{case}_labels"][foreground].long())
    target = torch.zeros_like(array["in_scores"]).scatter_(2, labels.unsqueeze(-1), found.score.unsqueeze(-1))
    torch.testing.assert_close(target, array[f"{case}_scores"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_against_the_definition(seed):
    scores, boxes, points, gt = random_case(seed)
    foreground, index, target = brute_force(scores, boxes, points, gt, topk=4)
    for max_pairs in (1, 3 * 64 * 3, 2**24):
        found = TaskAlignedCIoUAssigner(topk=4, max_pairs=max_pairs).assign(scores, boxes, points, gt)
        assert torch.equal(found.foreground, foreground)
        assert torch.equal(found.gt_index, index)
        torch.testing.assert_close(found.score, target, rtol=1e-4, atol=1e-6)


def test_random_cases_hold_conflicts_and_images_without_boxes():
    cases = [random_case(seed) for seed in range(6)]
    assert any((~gt.valid).all(1).any() for *_, gt in cases)
    best = [brute_force(*case, topk=64)[0].sum() for case in cases]
    apart = [sum(brute_force(s, b, p, one, 64)[0].sum() for one in _single_boxes(gt)) for s, b, p, gt in cases]
    assert all(a > b for a, b in zip(apart, best, strict=True))


def _single_boxes(gt: GroundTruth) -> list[GroundTruth]:
    return [GroundTruth(*(t[:, g : g + 1] for t in gt)) for g in range(gt.boxes.shape[1])]


def test_no_box_at_all_is_all_background():
    scores, boxes, points, _ = random_case(0)
    gt = pad_ground_truth([torch.zeros(0, 4)] * 3, [torch.zeros(0, dtype=torch.long)] * 3)
    found = TaskAlignedCIoUAssigner().assign(scores, boxes, points, gt)
    assert not found.foreground.any() and not found.score.any() and not found.gt_index.any()


def test_a_box_without_a_centre_inside_gets_no_anchor():
    scores, boxes, points, _ = random_case(0, images=1)
    gt = pad_ground_truth([torch.tensor([[5.0, 5.0, 7.0, 7.0], [8.0, 8.0, 40.0, 40.0]])], [torch.tensor([1, 2])])
    found = TaskAlignedCIoUAssigner().assign(scores, boxes, points, gt)
    assert set(found.gt_index[found.foreground].tolist()) == {1}


def test_an_image_is_assigned_alike_alone_and_in_a_batch():
    scores, boxes, points, gt = random_case(3)
    whole = TaskAlignedCIoUAssigner().assign(scores, boxes, points, gt)
    for i in range(3):
        one = TaskAlignedCIoUAssigner().assign(
            scores[i : i + 1], boxes[i : i + 1], points, GroundTruth(*(t[i : i + 1] for t in gt))
        )
        assert all(torch.equal(a[0], b[i]) for a, b in zip(one, whole, strict=True))


def test_padding_keeps_order_and_marks_the_rest():
    boxes = [torch.rand(n, 4) for n in (2, 0, 3)]
    labels = [torch.arange(n) + 1 for n in (2, 0, 3)]
    gt = pad_ground_truth(boxes, labels)
    assert gt.valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert gt.labels.tolist() == [[1, 2, 0], [0, 0, 0], [1, 2, 3]]
    assert torch.equal(gt.boxes[0, :2], boxes[0]) and torch.equal(gt.boxes[2], boxes[2]) and not gt.boxes[1].any()


def test_topk_below_one_is_refused():
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        TaskAlignedCIoUAssigner(topk=0)
