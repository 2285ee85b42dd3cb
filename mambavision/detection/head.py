"""Decoupled anchor-free head with distributed box regression, as in YOLOv8."""

import math
from collections.abc import Sequence

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import InstanceList, OptInstanceList
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from mambavision.backbones.mamba_yolo import ConvBNSiLU, set_batch_norm
from mambavision.detection.assigner import pad_ground_truth
from mambavision.detection.losses import global_normalizer

TEST_CFG = {
    "multi_label": True,
    "score_thr": 0.001,
    "nms_pre": 30000,
    "nms": {"type": "nms", "iou_threshold": 0.7},
    "max_per_img": 300,
}


def _tower(in_channels: int, channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBNSiLU(in_channels, channels, 3), ConvBNSiLU(channels, channels, 3), nn.Conv2d(channels, out_channels, 1)
    )


def anchor_points(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cell centres of all levels, row by row, in units of the cell.

    Returns:
        points (A, 2), x and y = index + 0.5; strides (A, 1), both float32.
    """
    points, steps = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5, indexing="ij"
        )
        points.append(torch.stack((x, y), -1).view(-1, 2))
        steps.append(torch.full((height * width, 1), float(stride), device=device))
    return torch.cat(points), torch.cat(steps)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes ``xyxy`` (..., 4) from centres (..., 2) and distances (..., 4) to left, top, right and bottom side."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (..., 4) from centres (..., 2) to the left, top, right and bottom side of ``xyxy`` boxes (..., 4)."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), -1)


def class_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Indices kept by NMS within each class, by falling score.

    On the GPU the classes are moved apart in float64 and go through one call: torchvision loops over the classes of
    long inputs there, with a wait in each. On the CPU, where NMS is quadratic in one thread, that loop is the faster
    way.
    """
    if not boxes.is_cuda:
        return batched_nms(boxes, scores, labels, iou_threshold)
    apart = boxes.double()
    return nms(apart + (labels * (apart.abs().amax() * 2 + 1)).unsqueeze(-1), scores.double(), iou_threshold)


def select_boxes(boxes: Tensor, scores: Tensor, cfg: dict, *, with_nms: bool = True) -> InstanceData:
    """Final boxes of one image.

    Args:
        boxes: (A, 4) ``xyxy``.
        scores: (A, C) class probabilities.
        cfg: mmdet's ``test_cfg``: ``score_thr``; ``multi_label`` (every class above the threshold, else the best one
            of each anchor); ``nms_pre`` (candidates that enter NMS, over all levels); ``nms`` (``iou_threshold``,
            ``class_agnostic``); ``max_per_img``.
        with_nms: False returns the candidates, by falling score.

    Returns:
        InstanceData with ``bboxes`` (n, 4), ``scores`` (n,) and ``labels`` (n,), by falling score.

    Raises:
        ValueError: for an NMS type other than ``nms``.
    """
    if cfg["nms"].get("type", "nms") != "nms":
        raise ValueError(f"MambaYOLOHead supports test_cfg.nms.type 'nms', got {cfg['nms']['type']!r}")
    if cfg["multi_label"]:
        anchor, label = (scores > cfg["score_thr"]).nonzero(as_tuple=True)
        score = scores[anchor, label]
    else:
        score, label = scores.max(1)
        anchor = (score > cfg["score_thr"]).nonzero().squeeze(1)
        score, label = score[anchor], label[anchor]
    score, order = score.sort(descending=True, stable=True)
    score, order = score[: cfg["nms_pre"]], order[: cfg["nms_pre"]]
    results = InstanceData(bboxes=boxes[anchor[order]], scores=score, labels=label[order])
    if not with_nms:
        return results
    if len(results) == 0:
        return results
    threshold = cfg["nms"]["iou_threshold"]
    if cfg["nms"].get("class_agnostic", False):
        keep = nms(results.bboxes, score, threshold)
    else:
        keep = class_nms(results.bboxes, score, results.labels, threshold)
    return results[keep[: cfg["max_per_img"]]]


def to_original_image(boxes: Tensor, meta: dict) -> Tensor:
    """Undo letterbox and resize, and clip to the original picture.

    Args:
        boxes: (n, 4) ``xyxy`` pixels of the network input.
        meta: ``scale_factor`` (w, h), ``ori_shape`` (h, w), and ``pad_param`` (top, bottom, left, right) where the
            pipeline padded elsewhere than at the right and bottom.
    """
    top, _, left, _ = meta.get("pad_param", (0, 0, 0, 0))
    scale = boxes.new_tensor(meta["scale_factor"]).repeat(2)
    return clip_boxes((boxes - boxes.new_tensor((left, top, left, top))) / scale, meta["ori_shape"])


def clip_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes (n, 4) ``xyxy`` clipped to a picture of ``shape`` (h, w, ...)."""
    height, width = shape[:2]
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height, width, height)))


@MODELS.register_module()
class MambaYOLOHead(BaseDenseHead):
    """Detection head of Mamba-YOLO (the one of YOLOv8): two towers per level, boxes as distributions of distances.

    Each level has ``3x3, 3x3, 1x1`` convolutions to ``4 * reg_max`` box logits and, apart, to ``num_classes`` logits.
    The distance of a cell's centre to each side of the box is the expectation of softmax over the bins 0 .. reg_max -
    1, in strides.

    Losses (``loss_cls``, ``loss_bbox``, ``loss_dfl``), computed in float32 whatever the network's precision, are
    weighted sums over anchors divided by :func:`~mambavision.detection.losses.global_normalizer`; the weight of an
    anchor's box losses is its soft class score. A batch without any box trains the background.

    Args:
        num_classes: C >= 1.
        in_channels: channels of the levels' features.
        strides: their strides.
        reg_max: bins per side.
        assigner, loss_cls, loss_bbox, loss_dfl: configs; the published recipe by default.
        train_cfg: unused, part of mmdet's head interface.
        test_cfg: see :func:`select_boxes`; keys left out take the values of validation (score 0.001, IoU 0.7, 300
            boxes).
        init_cfg: mmengine's.

    Wang et al., 2025, Mamba YOLO: A Simple Baseline for Object Detection with State Space Model.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] = (8, 16, 32),
        reg_max: int = 16,
        assigner: dict | None = None,
        loss_cls: dict | None = None,
        loss_bbox: dict | None = None,
        loss_dfl: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_classes < 1 or len(in_channels) != len(strides):
            raise ValueError(
                f"need num_classes >= 1 and one stride per level, got num_classes {num_classes}, "
                f"in_channels {tuple(in_channels)}, strides {tuple(strides)}"
            )
        self.num_classes, self.strides, self.reg_max = num_classes, tuple(strides), reg_max
        self.train_cfg, self.test_cfg = train_cfg, test_cfg
        self.assigner = TASK_UTILS.build(assigner or {"type": "TaskAlignedCIoUAssigner"})
        self.loss_cls = MODELS.build(loss_cls or {"type": "SoftTargetBCELoss"})
        self.loss_bbox = MODELS.build(loss_bbox or {"type": "CompleteIoULoss"})
        self.loss_dfl = MODELS.build(loss_dfl or {"type": "SideMeanDistributionFocalLoss"})
        reg_channels = max(16, in_channels[0] // 4, 4 * reg_max)
        cls_channels = max(in_channels[0], min(num_classes, 100))
        self.reg_towers = nn.ModuleList(_tower(c, reg_channels, 4 * reg_max) for c in in_channels)
        self.cls_towers = nn.ModuleList(_tower(c, cls_channels, num_classes) for c in in_channels)
        set_batch_norm(self)
        self._init_biases()

    def _init_biases(self) -> None:
        """Box logits start at 1; class logits at 5 expected objects in a picture of 640 pixels."""
        for reg, cls, stride in zip(self.reg_towers, self.cls_towers, self.strides, strict=True):
            nn.init.constant_(reg[-1].bias, 1.0)
            nn.init.constant_(cls[-1].bias, math.log(5 / self.num_classes / (640 / stride) ** 2))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Raw maps of all levels: box logits (B, 4 * reg_max, h, w), sides l t r b, and class logits (B, C, h, w)."""
        return (
            [tower(x) for tower, x in zip(self.reg_towers, feats, strict=True)],
            [tower(x) for tower, x in zip(self.cls_towers, feats, strict=True)],
        )

    def loss(self, x: Sequence[Tensor], batch_data_samples: list) -> dict[str, Tensor]:
        """Losses of the features ``x`` against the ground truth of the data samples."""
        gt_instances, ignored, metas = unpack_gt_instances(batch_data_samples)
        return self.loss_by_feat(*self(x), gt_instances, metas, ignored)

    def loss_by_feat(
        self,
        reg_maps: Sequence[Tensor],
        cls_maps: Sequence[Tensor],
        batch_gt_instances: InstanceList,
        batch_img_metas: list[dict],
        batch_gt_instances_ignore: OptInstanceList = None,
    ) -> dict[str, Tensor]:
        """Losses of the raw maps of :meth:`forward`.

        Args:
            reg_maps, cls_maps: see :meth:`forward`.
            batch_gt_instances: per image ``bboxes`` (n, 4) xyxy pixels of the network input and ``labels`` (n,), on
                any device.
            batch_img_metas, batch_gt_instances_ignore: not used.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_dfl``, scalars that are to be summed.
        """
        gt = pad_ground_truth(
            [get_box_tensor(g.bboxes) for g in batch_gt_instances],
            [g.labels for g in batch_gt_instances],
            cls_maps[0].device,
        )
        with torch.autocast(cls_maps[0].device.type, enabled=False):
            sides, logits, points, strides = self._flatten(reg_maps, cls_maps)
            boxes = self._decode(sides, points)
            target = self.assigner.assign(logits.detach().sigmoid(), boxes.detach() * strides, points * strides, gt)
            target_boxes = gt.boxes.gather(1, target.gt_index.unsqueeze(-1).expand(-1, -1, 4)) / strides
            target_labels = gt.labels.gather(1, target.gt_index).unsqueeze(-1)
            target_scores = torch.zeros_like(logits).scatter_(2, target_labels, target.score.unsqueeze(-1))
            divisor = global_normalizer(target.score.sum(), len(logits))
            return {
                "loss_cls": self.loss_cls(logits, target_scores, avg_factor=divisor),
                "loss_bbox": self.loss_bbox(boxes, target_boxes, weight=target.score, avg_factor=divisor),
                "loss_dfl": self.loss_dfl(
                    sides, boxes_to_distances(points, target_boxes), weight=target.score, avg_factor=divisor
                ),
            }

    def predict_by_feat(
        self,
        reg_maps: Sequence[Tensor],
        cls_maps: Sequence[Tensor],
        batch_img_metas: list[dict],
        cfg: ConfigDict | dict | None = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceList:
        """Boxes of each image from the raw maps of :meth:`forward`.

        Args:
            reg_maps, cls_maps: see :meth:`forward`.
            batch_img_metas: per image ``img_shape`` or, with ``rescale``, what :func:`to_original_image` reads.
            cfg: replaces the head's ``test_cfg``.
            rescale: return pixels of the original picture instead of the network input.
            with_nms: see :func:`select_boxes`.

        Returns:
            Per image InstanceData with ``bboxes`` (n, 4) xyxy float32, ``scores`` and ``labels``, by falling score.
        """
        cfg = {**TEST_CFG, **(cfg or self.test_cfg or {})}
        results = []
        for boxes, scores, meta in zip(*self.decode(reg_maps, cls_maps), batch_img_metas, strict=True):
            found = select_boxes(boxes, scores, cfg, with_nms=with_nms)
            if rescale:
                found.bboxes = to_original_image(found.bboxes, meta)
            else:
                found.bboxes = clip_boxes(found.bboxes, meta["img_shape"])
            results.append(found)
        return results

    def decode(self, reg_maps: Sequence[Tensor], cls_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (B, A, 4) ``xyxy`` in pixels of the network input, not clipped, and scores (B, A, C), in float32."""
        with torch.autocast(cls_maps[0].device.type, enabled=False):
            sides, logits, points, strides = self._flatten(reg_maps, cls_maps)
            return self._decode(sides, points) * strides, logits.sigmoid()

    def _flatten(self, reg_maps: Sequence[Tensor], cls_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Box logits (B, A, 4, reg_max), class logits (B, A, C), points (A, 2) in cells, strides (A, 1), in float32."""
        sides = torch.cat([m.flatten(2).transpose(1, 2).float() for m in reg_maps], 1)
        logits = torch.cat([m.flatten(2).transpose(1, 2).float() for m in cls_maps], 1)
        points, strides = anchor_points([m.shape[-2:] for m in cls_maps], self.strides, logits.device)
        return sides.unflatten(-1, (4, self.reg_max)), logits, points, strides

    def _decode(self, sides: Tensor, points: Tensor) -> Tensor:
        """Boxes (B, A, 4) ``xyxy`` in cells."""
        bins = torch.arange(self.reg_max, dtype=sides.dtype, device=sides.device)
        return distances_to_boxes(points, sides.softmax(-1) @ bins)
