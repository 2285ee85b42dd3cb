"""mmdet on mmcv-lite: a stand-in for mmcv's compiled operators, made from torchvision's."""

import importlib
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

_OPENCV_HELP = "apt-get install libgl1 libglib2.0-0, or pip install --force-reinstall --no-deps opencv-python-headless"


def install() -> None:
    """Make mmcv's operators importable without its compiled extension, and mmengine's checkpoints loadable.

    A real `mmcv._ext` that imports is left alone. Otherwise a module of that name is put in `sys.modules`: NMS,
    soft-NMS, NMS match, RoIAlign (average) and the sigmoid focal loss work, any other operator raises
    NotImplementedError with its name when called. Also calls `checkpoint.allow_mmengine_globals`. May be called often.

    Raises:
        ImportError: If there is neither mmcv nor mmcv-lite, or OpenCV lacks system libraries.
    """
    try:
        importlib.import_module("mmcv")
    except ImportError as error:
        if error.name == "mmcv":
            raise ImportError("mmdet needs mmcv: pip install 'mmcv-lite>=2.1,<2.2'", name="mmcv") from error
        if ".so" in str(error):
            raise ImportError(f"OpenCV does not load: {error}; {_OPENCV_HELP}") from error
        raise
    from .checkpoint import allow_mmengine_globals

    allow_mmengine_globals()
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            logging.getLogger(__name__).warning(
                "mmcv's compiled operators do not load (%s): using torchvision's", error
            )
        sys.modules["mmcv._ext"] = _StandIn()


def has_stand_in() -> bool:
    """Whether mmcv's operators come from `install` instead of a compiled mmcv."""
    return isinstance(sys.modules.get("mmcv._ext"), _StandIn)


class _StandIn(ModuleType):
    """Module in place of `mmcv._ext`; the signatures and the in-place outputs are those of mmcv's binding."""

    def __init__(self) -> None:
        super().__init__("mmcv._ext", "torchvision-backed stand-in for mmcv's compiled operators")
        self.__spec__ = ModuleSpec("mmcv._ext", None)
        for op in (
            nms,
            softnms,
            nms_match,
            roi_align_forward,
            roi_align_backward,
            sigmoid_focal_loss_forward,
            sigmoid_focal_loss_backward,
        ):
            setattr(self, op.__name__, op)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs) -> NoReturn:
            raise NotImplementedError(
                f"mmcv operator {name!r} needs a compiled mmcv (>=2.1,<2.2): mmcv-lite has none, torchvision no equal"
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices that greedy NMS keeps, by falling score; a box is as wide as x2 - x1 + offset."""
    import torchvision

    boxes, scores = _wide(boxes), _wide(scores)
    return torchvision.ops.nms(_with_offset(boxes, offset), scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017): write the kept boxes and decayed scores to `dets`, return their indices.

    Method 0 drops overlapping boxes, 1 decays their scores by 1 - IoU, 2 every score by exp(-IoU^2 / sigma).
    """
    scores, iou = scores.clone(), _iou(boxes, offset)
    alive, kept = torch.ones_like(scores, dtype=torch.bool), []
    while alive.any():
        best = int(scores.masked_fill(~alive, -torch.inf).argmax())
        dets[len(kept)] = torch.cat((boxes[best], scores[best, None]))
        kept.append(best)
        alive[best] = False
        overlap = iou[best]
        if method == 2:
            decay = torch.exp(-overlap.square() / sigma)
        else:
            decay = torch.where(overlap >= iou_threshold, 1 - overlap if method == 1 else 0.0, 1.0)
        scores = torch.where(alive, scores * decay, scores)
        alive &= scores >= min_score
    return torch.tensor(kept, dtype=torch.long)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of box indices: each kept box of (N, 5) `dets`, then those it suppresses, by falling score."""
    iou, order, groups = _iou(dets[:, :4], 0), dets[:, 4].argsort(descending=True), []
    while len(order):
        matched = iou[order[0], order] >= iou_threshold
        matched[0] = True
        groups.append(order[matched].tolist())
        order = order[~matched]
    return groups


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign with averaging, written to `output`."""
    import torchvision

    if pool_mode != 1:
        raise NotImplementedError("mmcv's RoIAlign with pool_mode='max' needs a compiled mmcv (>=2.1,<2.2)")
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` by its input, added to `grad_input`."""
    import torchvision  # noqa: F401

    grad_input += torch.ops.torchvision._roi_align_backward(
        grad_output, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
    )


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss of (N, C) logits for (N,) class indices, C meaning background; (C,) or empty weights by class."""
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Gradient of `sigmoid_focal_loss_forward` by its input, written to `grad_input`."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    import torchvision

    classes = torch.arange(input.shape[1], device=input.device)
    one_hot = (target[:, None] == classes).to(input.dtype)
    loss = torchvision.ops.sigmoid_focal_loss(input, one_hot, alpha=alpha, gamma=gamma)
    return loss * weight[target.clamp(max=len(weight) - 1), None] if len(weight) else loss


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    return boxes + boxes.new_tensor((0, 0, offset, offset)) if offset else boxes


def _iou(boxes: Tensor, offset: int) -> Tensor:
    import torchvision

    boxes = _with_offset(boxes, offset)
    return torchvision.ops.box_iou(boxes, boxes)
