"""Task-aligned assignment with complete IoU, for a whole batch at once."""

from typing import NamedTuple

import numpy as np
import torch
from mmdet.registry import TASK_UTILS
from torch import Tensor

from mambavision.detection.losses import complete_iou


class GroundTruth(NamedTuple):
    """Boxes of a batch, padded to the largest count G (at least 1).

    ``boxes`` (B, G, 4) xyxy pixels of the network input, ``labels`` (B, G) long, ``valid`` (B, G) bool; padding is
    zero / False.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor


class Assignment(NamedTuple):
    """What each of the A anchors of B images shall predict.

    ``foreground`` (B, A) bool; ``gt_index`` (B, A) long, index into the padded ground truth, 0 for background;
    ``score`` (B, A) soft class score in [0, 1], 0 for background.
    """

    foreground: Tensor
    gt_index: Tensor
    score: Tensor


def pad_ground_truth(boxes: list[Tensor], labels: list[Tensor], device: torch.device | None = None) -> GroundTruth:
    """Stack per-image ground truth into padded tensors without waiting for the GPU.

    Args:
        boxes: B tensors (n_i, 4).
        labels: B tensors (n_i,).
        device: of the result; by default that of the inputs.

    Returns:
        :class:`GroundTruth`, boxes in float32.
    """
    counts = np.array([len(b) for b in boxes])
    width = max(1, counts.max())
    device = device or boxes[0].device
    slots = _move(torch.from_numpy(np.flatnonzero(np.arange(width) < counts[:, None])), device)
    flat_boxes, flat_labels = _move(torch.cat(boxes).float(), device), _move(torch.cat(labels).long(), device)
    size = len(boxes) * width
    return GroundTruth(
        flat_boxes.new_zeros(size, 4).index_copy_(0, slots, flat_boxes).view(-1, width, 4),
        flat_labels.new_zeros(size).index_copy_(0, slots, flat_labels).view(-1, width),
        flat_labels.new_zeros(size, dtype=torch.bool).index_fill_(0, slots, True).view(-1, width),
    )


def _move(values: Tensor, device: torch.device) -> Tensor:
    return (
        values.to(device)
        if values.is_cuda or device.type != "cuda"
        else values.pin_memory().to(device, non_blocking=True)
    )


@TASK_UTILS.register_module()
class TaskAlignedCIoUAssigner:
    """Task-aligned assigner of TOOD with complete IoU, as YOLOv8-style heads use it.

    Alignment of anchor a and ground truth g: ``m = score_a[label_g]^alpha * max(CIoU(box_a, g), 0)^beta`` if the
    centre of a lies inside g, else 0. Each g takes its ``topk`` anchors of largest m (of those with m > 0); an anchor
    taken by several goes to the ground truth of highest CIoU among all that contain it. Soft target of a kept anchor:
    ``m / (max m of g + eps) * max CIoU of g`` with the maxima over the anchors that g keeps. Differs from mmdet's
    ``TaskAlignedAssigner`` in the overlap (CIoU), in testing the centre before the top-k, in working on all images at
    once, and in normalising here. Feng et al., 2021, TOOD, section 3.3.

    No step depends on values on the host, and the (B, G, A) pairs are visited in blocks of ``max_pairs``.

    Args:
        topk: anchors per ground truth before conflicts.
        alpha, beta: exponents of score and overlap.
        eps: smallest distance of a centre to the sides of its box, and guard of the division.
        max_pairs: largest number of (image, box, anchor) triples evaluated at a time; one temporary takes 4 bytes
            each.
    """

    def __init__(
        self, *, topk: int = 10, alpha: float = 0.5, beta: float = 6.0, eps: float = 1e-9, max_pairs: int = 2**24
    ) -> None:
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        self.topk, self.alpha, self.beta, self.eps, self.max_pairs = topk, alpha, beta, eps, max_pairs

    @torch.no_grad()
    def assign(self, scores: Tensor, boxes: Tensor, points: Tensor, gt: GroundTruth) -> Assignment:
        """Assign ground truth to anchors.

        Args:
            scores: (B, A, C) class probabilities.
            boxes: (B, A, 4) predicted boxes, xyxy pixels.
            points: (A, 2) anchor centres, x and y in pixels.
            gt: padded ground truth.

        Returns:
            :class:`Assignment`.
        """
        scores, boxes, points = scores.float(), boxes.float(), points.float()
        batch, anchors = scores.shape[:2]
        k = min(self.topk, anchors)
        by_class = scores.transpose(1, 2)
        taken = torch.zeros(batch, anchors, dtype=torch.long, device=scores.device)
        taken_by = torch.zeros_like(taken)
        best_overlap = torch.zeros(batch, anchors, device=scores.device)
        best_gt = torch.zeros_like(taken)
        step = max(1, self.max_pairs // (batch * anchors))
        for start in range(0, gt.boxes.shape[1], step):
            gt_boxes, labels = gt.boxes[:, start : start + step], gt.labels[:, start : start + step]
            score = by_class.gather(1, labels.unsqueeze(-1).expand(-1, -1, anchors))  # (B, step, A)
            overlap = self._overlap(boxes.unsqueeze(1), points, gt_boxes.unsqueeze(2))
            overlap *= gt.valid[:, start : start + step, None]
            metric, index = self._alignment(score, overlap).topk(k, dim=-1)

            chosen = (metric > 0).long()
            owner = torch.arange(start, start + labels.shape[1], device=index.device)[:, None]
            taken.scatter_add_(1, index.flatten(1), chosen.flatten(1))
            taken_by.scatter_add_(1, index.flatten(1), (chosen * owner).flatten(1))
            block_overlap, block_gt = overlap.max(1)
            better = block_overlap > best_overlap
            best_overlap = torch.where(better, block_overlap, best_overlap)
            best_gt = torch.where(better, block_gt + start, best_gt)

        foreground = taken > 0
        gt_index = torch.where(taken > 1, best_gt, taken_by)
        return Assignment(foreground, gt_index, self._soft_scores(scores, boxes, points, gt, foreground, gt_index))

    def _overlap(self, boxes: Tensor, points: Tensor, gt_boxes: Tensor) -> Tensor:
        """CIoU clamped at 0, and 0 where the centre is not inside."""
        x, y = points.T.contiguous()
        x1, y1, x2, y2 = gt_boxes.movedim(-1, 0).contiguous()
        inside = torch.minimum(torch.minimum(x - x1, x2 - x), torch.minimum(y - y1, y2 - y)) > self.eps
        return complete_iou(boxes, gt_boxes).clamp_(min=0).mul_(inside)

    def _alignment(self, score: Tensor, overlap: Tensor) -> Tensor:
        return score.pow(self.alpha).mul_(overlap.pow(self.beta))

    def _soft_scores(
        self, scores: Tensor, boxes: Tensor, points: Tensor, gt: GroundTruth, foreground: Tensor, gt_index: Tensor
    ) -> Tensor:
        """Normalised alignment of each anchor with its own ground truth, (B, A)."""
        label = gt.labels.gather(1, gt_index)
        score = scores.gather(2, label.unsqueeze(-1)).squeeze(-1)
        own_boxes = gt.boxes.gather(1, gt_index.unsqueeze(-1).expand(-1, -1, 4))
        overlap = self._overlap(boxes, points, own_boxes) * foreground
        metric = self._alignment(score, overlap)
        zero = metric.new_zeros(gt.labels.shape)
        best_metric = zero.scatter_reduce(1, gt_index, metric, "amax")
        best_overlap = zero.scatter_reduce(1, gt_index, overlap, "amax")
        return metric * best_overlap.gather(1, gt_index) / (best_metric.gather(1, gt_index) + self.eps)
