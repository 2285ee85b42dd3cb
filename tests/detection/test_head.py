import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchvision.ops import batched_nms

from mambavision.detection.assigner import TaskAlignedCIoUAssigner, pad_ground_truth
from mambavision.detection.head import (
    MambaYOLOHead,
    anchor_points,
    boxes_to_distances,
    class_nms,
    distances_to_boxes,
    select_boxes,
)
from mambavision.detection.losses import complete_iou
from tests.parity import load

CHANNELS = (8, 16, 24)
NMS_CASES = {
    "default": {"score_thr": 0.25, "multi_label": False, "nms": {"iou_threshold": 0.45}},
    "multi": {"score_thr": 0.25, "multi_label": True, "nms": {"iou_threshold": 0.45}},
    "agnostic": {"score_thr": 0.25, "multi_label": False, "nms": {"iou_threshold": 0.45, "class_agnostic": True}},
    "val": {"score_thr": 0.001, "multi_label": True, "nms": {"iou_threshold": 0.7}},
    "few": {"score_thr": 0.25, "multi_label": False, "nms": {"iou_threshold": 0.45}},
}


def head(num_classes: int = 3, **kwargs) -> MambaYOLOHead:
    torch.manual_seed(0)
    return MambaYOLOHead(num_classes, CHANNELS, **kwargs)


def features(batch: int = 2, size: int = 64, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, size // s, size // s, generator=g) for c, s in zip(CHANNELS, (8, 16, 32), strict=True)
    ]


def instances(*boxes: list[list[float]], labels: list[list[int]] | None = None) -> list[InstanceData]:
    labels = labels or [[0] * len(b) for b in boxes]
    return [
        InstanceData(bboxes=torch.tensor(b).view(-1, 4), labels=torch.tensor(i, dtype=torch.long))
        for b, i in zip(boxes, labels, strict=True)
    ]


GT = instances([[4.0, 6.0, 40.0, 60.0], [30.0, 8.0, 62.0, 30.0]], [[10.0, 10.0, 50.0, 50.0]], labels=[[0, 2], [1]])
METAS = [{"img_shape": (64, 64)}] * 2


def maps_of(boxes: Tensor, scores: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Raw maps of one 32 x 32 picture at strides 8, 16, 32 that decode to whole-cell boxes and given scores."""
    points, strides = anchor_points([(4, 4), (2, 2), (1, 1)], (8, 16, 32), torch.device("cpu"))
    distances = boxes_to_distances(points, boxes / strides).clamp(0, 14.99)
    left = distances.long()
    fraction = distances - left
    bins = torch.zeros(len(boxes), 4, 16).scatter_(2, left[..., None], 1 - fraction[..., None])
    bins.scatter_(2, left[..., None] + 1, fraction[..., None])

    def levels(rows: Tensor) -> list[Tensor]:
        return [part.T.reshape(1, -1, n, n) for part, n in zip(rows.split([16, 4, 1]), (4, 2, 1), strict=True)]

    return levels(bins.clamp(min=1e-30).log().flatten(1)), levels(torch.logit(scores, eps=1e-30))


def test_anchor_points_and_boxes_of_the_published_code():
    fixture = load("myolo_tal")
    array = {key: torch.from_numpy(value) for key, value in fixture.arrays.items()}
    points, strides = anchor_points([(8, 12), (4, 6), (2, 3)], (8, 16, 32), torch.device("cpu"))
    assert torch.equal(points, array["anchor_points"]) and torch.equal(strides, array["anchor_strides"])
    boxes = distances_to_boxes(points, array["dist_in"])
    xywh = torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), -1)
    torch.testing.assert_close(xywh, array["dist2bbox_xywh"])
    distances = boxes_to_distances(points, array["in_gt_bboxes"][0, 0] / 8).clamp(0, 15 - 0.01)
    torch.testing.assert_close(distances, array["bbox2dist"])
    torch.testing.assert_close(boxes_to_distances(points, boxes), array["dist_in"])


@pytest.mark.parametrize("case", NMS_CASES)
def test_nms_of_the_published_code(case):
    fixture = load("myolo_nms")
    row = next(row for row in fixture.meta["cases"] if row["tag"] == case)
    wanted = row.get("classes")
    cfg = {"nms_pre": 30000, "max_per_img": 10**6 if wanted else row.get("max_det", 300), **NMS_CASES[case]}
    for i, pred in enumerate(torch.from_numpy(fixture.arrays["pred"])):
        centre, size, scores = pred[:2].T, pred[2:4].T, pred[4:].T
        found = select_boxes(torch.cat((centre - size / 2, centre + size / 2), 1), scores, cfg)
        if wanted:  # of the kept boxes, as NMS leaves the classes alone
            found = found[torch.isin(found.labels, torch.tensor(wanted))][: row["max_det"]]
        rows = torch.cat((found.bboxes, found.scores[:, None], found.labels[:, None]), 1)
        assert rows.shape[0] == row["kept"][i]
        torch.testing.assert_close(rows, torch.from_numpy(fixture.arrays[f"{case}_{i}"]), rtol=1e-5, atol=1e-4)


def test_tower_widths_and_first_biases():
    h = head(80)
    assert [t[0].conv.out_channels for t in h.reg_towers] == [64] * 3
    assert [t[0].conv.out_channels for t in h.cls_towers] == [80] * 3
    assert all(m.eps == 1e-3 and m.momentum == 0.03 for m in h.modules() if isinstance(m, torch.nn.BatchNorm2d))
    for reg, cls, stride in zip(h.reg_towers, h.cls_towers, (8, 16, 32), strict=True):
        assert (reg[-1].bias == 1).all()
        np.testing.assert_allclose(cls[-1].bias.detach(), np.log(5 / 80 / (640 / stride) ** 2), rtol=1e-6)


def test_wrong_levels_or_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes 0"):
        head(0)
    with pytest.raises(ValueError, match="one stride per level"):
        head(strides=(8, 16))


def test_every_box_in_the_targets_gives_zero_box_loss_and_least_focal_loss():
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(21, 1)
    maps = maps_of(boxes, torch.full((21, 3), 0.5))
    h = head()
    perfect = h.loss_by_feat(*maps, instances([[0.0, 0.0, 32.0, 32.0]]), METAS[:1])
    other = h.loss_by_feat(*maps, instances([[0.0, 0.0, 32.0, 24.0]]), METAS[:1])
    assert perfect["loss_bbox"] < 1e-4 < other["loss_bbox"] and perfect["loss_dfl"] < other["loss_dfl"]


def test_loss_is_written_out():
    h = head()
    maps = h(features())
    losses = h.loss_by_feat(*maps, GT, METAS)
    sides, logits, points, strides = h._flatten(*maps)
    boxes = h._decode(sides, points)
    gt = pad_ground_truth([g.bboxes for g in GT], [g.labels for g in GT])
    target = TaskAlignedCIoUAssigner().assign(logits.sigmoid(), boxes * strides, points * strides, gt)
    total = target.score.sum().clamp(min=1)
    cls = torch.zeros_like(logits)
    box = dfl = 0.0
    for b, a in target.foreground.nonzero().tolist():
        g, w = target.gt_index[b, a], target.score[b, a]
        cls[b, a, gt.labels[b, g]] = w
        goal = gt.boxes[b, g] / strides[a]
        box = box + w * (1 - complete_iou(boxes[b, a], goal))
        for side, t in zip(sides[b, a], boxes_to_distances(points[a], goal).clamp(0, 14.99), strict=True):
            log_p, j = side.log_softmax(0), int(t)
            dfl = dfl - w * (log_p[j] * (j + 1 - t) + log_p[j + 1] * (t - j)) / 4
    bce = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), cls, reduction="sum")
    torch.testing.assert_close(losses["loss_cls"], 0.5 * 2 * bce / total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss_bbox"], 7.5 * 2 * box / total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss_dfl"], 1.5 * 2 * dfl / total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gt", [instances([], []), instances([[4.0, 6.0, 40.0, 60.0]], [])], ids=["none", "one"])
def test_images_without_boxes_train_the_background(gt):
    h = head()
    losses = h.loss_by_feat(*h(features()), gt, METAS)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in h.parameters() if p.grad is not None)
    assert losses["loss_cls"] > 0 and all(t[-1].bias.grad.abs().sum() > 0 for t in h.cls_towers)
    if not any(len(g) for g in gt):
        assert losses["loss_bbox"] == losses["loss_dfl"] == 0
        assert all((t[-1].bias.grad > 0).all() for t in h.cls_towers)


@pytest.mark.parametrize("scale", [1.0, 100.0, 65504.0])
def test_losses_and_gradients_are_finite_over_the_range_of_fp16(scale):
    g = torch.Generator().manual_seed(1)
    maps = [
        [(torch.rand(2, n, s, s, generator=g) * 2 - 1).mul(scale).half().requires_grad_() for s in (8, 4, 2)]
        for n in (64, 3)
    ]
    losses = head().loss_by_feat(*maps, GT, METAS)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).mul(1e-3).backward()
    assert all(m.grad.isfinite().all() for level in maps for m in level)


def test_under_autocast_the_loss_is_that_of_its_maps_in_float32():
    h = head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = h(features())
        losses = h.loss_by_feat(*maps, GT, METAS)
    assert maps[0][0].dtype == torch.bfloat16
    plain = h.loss_by_feat(*([m.float() for m in level] for level in maps), GT, METAS)
    for key, loss in losses.items():
        assert loss.dtype == torch.float32 and torch.equal(loss, plain[key])


def test_the_head_over_fits_a_fixed_batch():
    h, x = head(), features()
    optimizer = torch.optim.AdamW(h.parameters(), lr=3e-3)
    first = last = None
    for _ in range(80):
        losses = h.loss_by_feat(*h(x), GT, METAS)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        last = {key: loss.item() for key, loss in losses.items()}
        first = first or last
    assert last["loss_bbox"] < 0.25 * first["loss_bbox"] and last["loss_cls"] < 0.25 * first["loss_cls"]
    found = h.predict_by_feat(*h(x), METAS, cfg={"score_thr": 0.5})
    for result, gt in zip(found, GT, strict=True):
        assert sorted(set(result.labels.tolist())) == sorted(gt.labels.tolist())


def test_the_number_of_operations_does_not_grow_with_the_batch():
    h = head()

    def operations(batch: int) -> int:
        x = features(batch)
        gt = instances(*[[[4.0, 6.0, 40.0, 60.0]]] * batch)
        maps = h(x)
        with torch.profiler.profile() as profile:
            h.loss_by_feat(*maps, gt, METAS)
        return sum(event.name.startswith("aten::") for event in profile.events())

    assert operations(8) == operations(2)


def test_the_loss_never_asks_for_a_value():
    """On tensors that have no values, anything that would wait for the GPU (item, nonzero, boolean indices) raises."""
    h = head()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = [mode.from_tensor(f) for f in features()]
        gt = [InstanceData(bboxes=mode.from_tensor(g.bboxes), labels=mode.from_tensor(g.labels)) for g in GT]
        losses = h.loss_by_feat(*h(x), gt, METAS)
        sum(losses.values()).backward()
    assert all(isinstance(loss, FakeTensor) and loss.shape == () for loss in losses.values())


def test_predictions_of_known_maps_go_back_to_the_original_picture():
    boxes, scores = torch.zeros(21, 4), torch.zeros(21, 3)
    boxes[:] = torch.tensor([12.0, 12.0, 20.0, 20.0])
    boxes[20], scores[20, 1] = torch.tensor([4.0, 8.0, 28.0, 24.0]), 0.9
    boxes[0], scores[0, 2] = torch.tensor([-2.0, 0.0, 8.0, 12.0]), 0.5
    maps = maps_of(boxes, scores)
    h = head(test_cfg={"score_thr": 0.1})

    (plain,) = h.predict_by_feat(*maps, [{"img_shape": (32, 32)}])
    torch.testing.assert_close(plain.bboxes, torch.tensor([[4.0, 8, 28, 24], [0, 0, 8, 12]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(plain.scores, torch.tensor([0.9, 0.5]))
    assert plain.labels.tolist() == [1, 2]

    meta = {"img_shape": (32, 32), "ori_shape": (24, 64), "scale_factor": (0.5, 0.5)}
    letterbox = {**meta, "pad_param": np.array([10, 10, 0, 0], np.float32)}
    (found,) = h.predict_by_feat(*maps, [letterbox], rescale=True)
    expected = torch.tensor([[8.0, 0, 56, 24], [0, 0, 16, 4]])
    torch.testing.assert_close(found.bboxes, expected, rtol=0, atol=1e-3)
    (found,) = h.predict_by_feat(*maps, [{**meta, "ori_shape": (64, 64), "scale_factor": (0.5, 0.25)}], rescale=True)
    torch.testing.assert_close(found.bboxes, torch.tensor([[8.0, 32, 56, 64], [0, 0, 16, 48]]), rtol=0, atol=1e-3)


def test_nothing_found_is_an_empty_result():
    h = head(test_cfg={"score_thr": 0.99})
    for found in h.predict_by_feat(*h(features()), METAS):
        assert found.bboxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)
        assert found.labels.dtype == torch.long


def test_limits_on_candidates_and_results_hold():
    h = head().eval()
    maps = h(features())
    base = {"score_thr": 0.0, "nms": {"iou_threshold": 0.99}}
    assert [len(r) for r in h.predict_by_feat(*maps, METAS, cfg=base)] == [252] * 2
    assert [len(r) for r in h.predict_by_feat(*maps, METAS, cfg={**base, "max_per_img": 5})] == [5] * 2
    raw = h.predict_by_feat(*maps, METAS, cfg={**base, "nms_pre": 40}, with_nms=False)
    assert [len(r) for r in raw] == [40] * 2 and all((r.scores.diff() <= 0).all() for r in raw)
    single = h.predict_by_feat(*maps, METAS, cfg={**base, "multi_label": False}, with_nms=False)
    assert [len(r) for r in single] == [84] * 2


def test_another_nms_is_refused():
    h = head(test_cfg={"nms": {"type": "soft_nms", "iou_threshold": 0.5}})
    with pytest.raises(ValueError, match="soft_nms"):
        h.predict_by_feat(*h(features()), METAS)


@pytest.mark.gpu
def test_training_never_waits_for_the_gpu():
    h = head().cuda()
    x, gt = [f.cuda() for f in features()], [g.to("cuda") for g in GT]
    sum(h.loss_by_feat(*h(x), gt, METAS).values()).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(h.loss_by_feat(*h(x), gt, METAS).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_class_nms_on_the_gpu_is_that_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(3000, 2, generator=g) * 600
    boxes = torch.cat((corner, corner + torch.rand(3000, 2, generator=g) * 80), 1)
    scores, labels = torch.rand(3000, generator=g), torch.randint(0, 80, (3000,), generator=g)
    kept = class_nms(boxes.cuda(), scores.cuda(), labels.cuda(), 0.3)
    assert torch.equal(kept.cpu(), batched_nms(boxes, scores, labels, 0.3))
