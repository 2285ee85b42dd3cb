"""Losses of the YOLOv8-style head: complete IoU, distribution focal loss averaged over the sides, soft-target BCE.

All three reduce to ``loss_weight * sum(element loss * weight) / avg_factor`` and take per-element weights instead of
index lists, so that background anchors are multiplied by zero and nothing waits for the GPU.
"""

import math

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn


def complete_iou(boxes: Tensor, targets: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of two broadcastable sets of ``xyxy`` boxes.

    ``CIoU = IoU - d^2 / c^2 - alpha v`` with d the distance of the centres, c the diagonal of the enclosing box,
    ``v = 4 / pi^2 (atan(w_t / h_t) - atan(w / h))^2`` and ``alpha = v / (v - IoU + 1 + eps)``, which is taken as a
    constant by the gradient. ``alpha`` is not gated by the IoU as in mmdet's ``CIoULoss``. Zheng et al., 2020,
    Distance-IoU Loss, eq. 8-11.

    Args:
        boxes, targets: (..., 4), same unit, broadcastable against each other: (B, 1, A, 4) against (B, G, 1, 4) gives
            all pairs.
        eps: added to the height, union and squared diagonal, and inside ``alpha``.

    Returns:
        (...) values in (-1.5, 1].
    """
    x1, y1, x2, y2 = boxes.movedim(-1, 0).contiguous()
    tx1, ty1, tx2, ty2 = targets.movedim(-1, 0).contiguous()
    w, h = x2 - x1, y2 - y1 + eps
    tw, th = tx2 - tx1, ty2 - ty1 + eps
    inter = (torch.minimum(x2, tx2) - torch.maximum(x1, tx1)).clamp(min=0) * (
        torch.minimum(y2, ty2) - torch.maximum(y1, ty1)
    ).clamp(min=0)
    iou = inter / (w * h + tw * th - inter + eps)
    diagonal = (
        (torch.maximum(x2, tx2) - torch.minimum(x1, tx1)).square()
        + (torch.maximum(y2, ty2) - torch.minimum(y1, ty1)).square()
        + eps
    )
    distance = ((tx1 + tx2 - x1 - x2).square() + (ty1 + ty2 - y1 - y2).square()) / 4
    v = (4 / math.pi**2) * (torch.atan(tw / th) - torch.atan(w / h)).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance / diagonal + v * alpha)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of a distance to its two neighbouring bins, averaged over the four sides.

    ``-( (j + 1 - t) log p_j + (t - j) log p_{j+1} )`` with ``j = floor(t)``. Li et al., 2020, Generalized Focal Loss,
    eq. 6, as a mean over the sides (mmdet's ``DistributionFocalLoss`` sums them when flattened).

    Args:
        logits: (..., 4, reg_max) scores of the bins 0 .. reg_max - 1.
        target: (..., 4) distances in grid units; clamped to [0, reg_max - 1 - 0.01].

    Returns:
        (...) non-negative losses.
    """
    target = target.clamp(0, logits.shape[-1] - 1 - 0.01)
    left = target.long()
    fraction = target - left
    log_prob = logits.log_softmax(-1)
    log_left = log_prob.gather(-1, left.unsqueeze(-1)).squeeze(-1)
    log_right = log_prob.gather(-1, left.unsqueeze(-1) + 1).squeeze(-1)
    return -(log_left * (1 - fraction) + log_right * fraction).mean(-1)


def global_normalizer(score_sum: Tensor, batch_size: int) -> Tensor:
    """Divisor that makes averaged data-parallel gradients equal those of one process on the whole batch.

    The published recipe divides each loss by the sum of target scores (at least 1) and multiplies it by the batch size:
    with score sum s and batch b in one process the divisor is ``max(s, 1) / b``. With W processes
    ``DistributedDataParallel`` (mmengine's ``MMDistributedDataParallel`` too) averages the gradients, and sums over all
    ranks enter: ``max(sum s, 1) / (W sum b)``. The mean over ranks of ``local loss sum / divisor`` is then ``sum b /
    max(sum s, 1)`` times the loss sum of the whole batch: exactly the loss of one process that sees all its images,
    however they are shared out. (The original multiplies by W too, but divides by each rank's own score sum.)
    A rank's logged loss is W times its share.

    Args:
        score_sum: scalar, sum of the target scores of this rank's images.
        batch_size: number of this rank's images.

    Returns:
        Scalar tensor on the same device; one collective of two numbers, no wait for the GPU.
    """
    totals = torch.stack([score_sum, torch.full_like(score_sum, batch_size)])
    all_reduce(totals)
    return totals[0].clamp(min=1) / (totals[1] * get_world_size())


def _reduce(loss: Tensor, weight: Tensor | None, avg_factor: Tensor | float | None) -> Tensor:
    if weight is not None:
        loss = loss * weight
    return loss.mean() if avg_factor is None else loss.sum() / avg_factor


@MODELS.register_module()
class CompleteIoULoss(nn.Module):
    """``1 - CIoU`` of box pairs (see :func:`complete_iou`).

    Args:
        loss_weight: factor of the result.
        eps: see :func:`complete_iou`.
    """

    def __init__(self, *, loss_weight: float = 7.5, eps: float = 1e-7) -> None:
        super().__init__()
        self.loss_weight, self.eps = loss_weight, eps

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: Tensor | float | None = None
    ) -> Tensor:
        """Scalar loss of ``pred`` and ``target`` (..., 4), weighted by (...); the mean without ``avg_factor``."""
        return self.loss_weight * _reduce(1 - complete_iou(pred, target, self.eps), weight, avg_factor)


@MODELS.register_module()
class SideMeanDistributionFocalLoss(nn.Module):
    """Distribution focal loss averaged over the four sides (see :func:`distribution_focal_loss`).

    Args:
        loss_weight: factor of the result.
    """

    def __init__(self, *, loss_weight: float = 1.5) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: Tensor | float | None = None
    ) -> Tensor:
        """Scalar loss of ``pred`` (..., 4, reg_max) and distances ``target`` (..., 4), weighted by (...)."""
        return self.loss_weight * _reduce(distribution_focal_loss(pred, target), weight, avg_factor)


@MODELS.register_module()
class SoftTargetBCELoss(nn.Module):
    """Binary cross entropy of logits against soft targets in [0, 1].

    Args:
        loss_weight: factor of the result.
    """

    def __init__(self, *, loss_weight: float = 0.5) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, avg_factor: Tensor | float | None = None
    ) -> Tensor:
        """Scalar loss of logits ``pred`` and ``target`` of one shape, weighted element by element."""
        loss = F.binary_cross_entropy_with_logits(pred, target, reduction="none")
        return self.loss_weight * _reduce(loss, weight, avg_factor)
