"""Training and test transforms of the YOLO family for mmdet pipelines. Random numbers come from `np.random`."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes

from mambavision.detection.photos import PAD_VALUE, imread, shrink


@TRANSFORMS.register_module()
class LoadPhoto(BaseTransform):
    """Load a photo, and with `with_boxes` its boxes, from the dataset's cache, the file `img_path` or the array `img`.

    Adds img (uint8 BGR), img_shape, ori_shape and, where the dataset shrank the photo, scale_factor (w, h); boxes are
    in pixels of img. For validation leave `with_boxes` off and put mmdet's LoadAnnotations after LetterBox: metrics
    compare in pixels of the original photo.
    """

    def __init__(self, *, with_boxes: bool = False) -> None:
        self.with_boxes = with_boxes

    def transform(self, results: dict) -> dict:
        dataset = results.get("dataset")
        if dataset is not None:
            photo = dataset.photo(results["sample_idx"])
            results["img"] = photo.img
            results["ori_shape"] = (results["height"], results["width"])
            results["scale_factor"] = (photo.factor, photo.factor)
            if self.with_boxes:
                _set_boxes(results, photo.boxes, photo.labels, photo.ignore)
        else:
            if self.with_boxes:
                raise ValueError("LoadPhoto(with_boxes=True) needs a dataset of mambavision.detection.datasets")
            if "img" not in results:
                results["img"] = imread(results["img_path"])
            results["ori_shape"] = results["img"].shape[:2]
        results["img_shape"] = results["img"].shape[:2]
        return results


@TRANSFORMS.register_module()
class LetterBox(BaseTransform):
    """Resize with the aspect ratio kept and pad with gray 114, centred; boxes follow where there are any.

    Args:
        size: (width, height) of the result in pixels, or one number for a square.
        rect: pad only up to the next multiple of `stride` instead of up to `size` (validation).
        stride: largest stride of the network.

    Writes img, img_shape, scale_factor (w, h; from the original photo) and pad_param (top, bottom, left, right): a
    point (x, y) of the original photo is now at (x, y) * scale_factor + (left, top).
    """

    def __init__(self, size: int | tuple[int, int], *, rect: bool = False, stride: int = 32) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.rect = rect
        self.stride = stride
        if min(self.size) < 1 or (rect and any(side % stride for side in self.size)):
            raise ValueError(f"size {self.size} must be positive, and with rect a multiple of stride {stride}")

    def transform(self, results: dict) -> dict:
        img = results["img"]
        h, w = img.shape[:2]
        max_w, max_h = self.size
        ratio = min(max_w / w, max_h / h)
        new_w, new_h = max(round(w * ratio), 1), max(round(h * ratio), 1)
        if (new_w, new_h) != (w, h):
            img = cv2.resize(img, (new_w, new_h), interpolation=cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR)
        if self.rect:
            max_w, max_h = (-(-side // self.stride) * self.stride for side in (new_w, new_h))
        top, left = (max_h - new_h) // 2, (max_w - new_w) // 2
        bottom, right = max_h - new_h - top, max_w - new_w - left
        if top or bottom or left or right:
            img = cv2.copyMakeBorder(img, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(PAD_VALUE,) * 3)
        results["img"] = img
        results["img_shape"] = img.shape[:2]
        ratio_w, ratio_h = new_w / w, new_h / h
        before = results.get("scale_factor", (1.0, 1.0))
        results["scale_factor"] = (before[0] * ratio_w, before[1] * ratio_h)
        results["pad_param"] = np.array([top, bottom, left, right], np.float32)
        if "gt_bboxes" in results:
            results["gt_bboxes"].rescale_((ratio_w, ratio_h))
            results["gt_bboxes"].translate_((left, top))
        return results


@TRANSFORMS.register_module()
class RandomScaleTranslate(BaseTransform):
    """Scale the picture about its centre and shift it, then drop the boxes that became too small.

    A box stays if both sides exceed `min_side` pixels, its aspect ratio is below `max_aspect`, and what the border
    left of it is more than `min_area_ratio` of the scaled box (the YOLOv5 family's filter).

    Args:
        scale: range of the scale factor.
        translate: largest shift as a fraction of the picture's sides.
    """

    def __init__(
        self,
        *,
        scale: tuple[float, float] = (0.5, 1.5),
        translate: float = 0.1,
        min_side: float = 2.0,
        max_aspect: float = 100.0,
        min_area_ratio: float = 0.1,
    ) -> None:
        self.scale = scale
        self.translate = translate
        self.min_side = min_side
        self.max_aspect = max_aspect
        self.min_area_ratio = min_area_ratio

    def draw(self) -> tuple[float, float, float]:
        """Draw (scale, x, y): the source's centre lands at the fractions x and y of the result."""
        scale = np.random.uniform(*self.scale)
        x, y = np.random.uniform(0.5 - self.translate, 0.5 + self.translate, 2)
        return scale, x, y

    def keep(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Which boxes (n, 4) stay: bool (n,). `before` is scaled but not clipped, `after` clipped to the picture."""
        w, h = (after[:, 2:] - after[:, :2]).T
        w0, h0 = (before[:, 2:] - before[:, :2]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            aspect = np.maximum(w / h, h / w)
            ratio = (w * h) / (w0 * h0)
        return (w > self.min_side) & (h > self.min_side) & (aspect < self.max_aspect) & (ratio > self.min_area_ratio)

    def transform(self, results: dict) -> dict:
        img = results["img"]
        h, w = img.shape[:2]
        scale, x, y = self.draw()
        shift = x * w - scale * w / 2, y * h - scale * h / 2
        # cv2 takes pixel centres at integers, boxes at halves
        matrix = np.array(
            [[scale, 0, shift[0] + (scale - 1) / 2], [0, scale, shift[1] + (scale - 1) / 2]], dtype=np.float64
        )
        results["img"] = cv2.warpAffine(img, matrix, (w, h), borderValue=(PAD_VALUE,) * 3)
        if "gt_bboxes" in results:
            before = results["gt_bboxes"].tensor.numpy() * scale + np.array(shift * 2, np.float32)
            after = _clip(before, w, h)
            kept = self.keep(before, after)
            _set_boxes(results, after[kept], results["gt_bboxes_labels"][kept], results["gt_ignore_flags"][kept])
        return results


@TRANSFORMS.register_module()
class MosaicAffine(BaseTransform):
    """Four photos around a random centre, scaled and shifted, as one picture of size x size (YOLOv4/v5's mosaic).

    The photo asked for and three others of its dataset are each fitted to `size` and meet at a point drawn from the
    middle half of a 2*size canvas; `affine` then scales the canvas and crops size x size. Since that map only
    scales and shifts, each photo is warped straight into the result and the canvas is never made. Replaces LoadPhoto
    in a pipeline; needs a dataset of mambavision.detection.datasets.

    Args:
        size: side of the result in pixels.
        affine: options of RandomScaleTranslate.
    """

    def __init__(self, size: int, **affine) -> None:
        self.size = size
        self.affine = RandomScaleTranslate(**affine)

    def transform(self, results: dict) -> dict:
        dataset, size = results["dataset"], self.size
        indices = [results["sample_idx"], *np.random.randint(0, len(dataset), 3)]
        centre_x, centre_y = np.random.uniform(0.5 * size, 1.5 * size, 2).round()
        scale, x, y = self.affine.draw()
        shift = np.array([x * size - scale * size, y * size - scale * size])  # result = scale * canvas + shift

        out = np.full((size, size, 3), PAD_VALUE, np.uint8)
        boxes, labels, ignore = [], [], []
        for corner, index in enumerate(indices):
            photo = dataset.photo(int(index))
            img, factor = shrink(photo.img, size)
            h, w = img.shape[:2]
            ratio = size / max(h, w)
            # where the photo's top left corner lies on the canvas
            left = centre_x - (w * ratio if corner % 2 == 0 else 0)
            top = centre_y - (h * ratio if corner < 2 else 0)
            origin = np.array([left, top])
            paste(out, img, zoom=ratio * scale, origin=origin * scale + shift, limits=(shift, shift + 2 * size * scale))
            boxes.append(photo.boxes * (factor * ratio) + np.tile(origin, 2).astype(np.float32))
            labels.append(photo.labels)
            ignore.append(photo.ignore)

        canvas = _clip(np.concatenate(boxes), 2 * size, 2 * size)
        before = canvas * np.float32(scale) + np.tile(shift, 2).astype(np.float32)
        after = _clip(before, size, size)
        kept = self.affine.keep(before, after)
        _set_boxes(results, after[kept], np.concatenate(labels)[kept], np.concatenate(ignore)[kept])
        results["img"] = out
        results["img_shape"] = results["ori_shape"] = (size, size)
        results["scale_factor"] = (1.0, 1.0)
        return results


@TRANSFORMS.register_module()
class HSVGain(BaseTransform):
    """Multiply hue, saturation and value by 1 + gain * uniform(-1, 1), each drawn on its own; hue wraps around."""

    def __init__(self, *, hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> None:
        self.gains = np.array([hue, saturation, value])

    def transform(self, results: dict) -> dict:
        factors = 1 + np.random.uniform(-1, 1, 3) * self.gains
        table = np.arange(256, dtype=np.float64)[:, None] * factors
        table[:, 0] %= 180
        table = table.clip(0, 255).astype(np.uint8)
        hsv = cv2.cvtColor(results["img"], cv2.COLOR_BGR2HSV)
        results["img"] = cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2BGR)
        return results


def paste(
    out: np.ndarray,
    img: np.ndarray,
    *,
    zoom: float,
    origin: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Draw `img`, magnified by `zoom`, into `out` with its top left corner at `origin` (x, y), subpixel exact.

    `limits` are two points (x, y) outside whose rectangle nothing is drawn.
    """
    h, w = img.shape[:2]
    low, high = origin, origin + np.array([w, h]) * zoom
    if limits is not None:
        low, high = np.maximum(low, limits[0]), np.minimum(high, limits[1])
    x0, y0 = np.maximum(np.round(low), 0).astype(int)
    x1, y1 = np.minimum(np.round(high), out.shape[1::-1]).astype(int)
    if x0 >= x1 or y0 >= y1:
        return
    # source pixel of result pixel (i, j): ((x0 + i + 0.5) - origin) / zoom - 0.5
    matrix = np.array(
        [
            [1 / zoom, 0, (x0 + 0.5 - origin[0]) / zoom - 0.5],
            [0, 1 / zoom, (y0 + 0.5 - origin[1]) / zoom - 0.5],
        ]
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = int(x1 - x0), int(y1 - y0)
    out[y0:y1, x0:x1] = cv2.warpAffine(img, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _clip(boxes: np.ndarray, w: float, h: float) -> np.ndarray:
    return np.clip(boxes, 0, np.array([w, h, w, h], boxes.dtype))


def _set_boxes(results: dict, boxes: np.ndarray, labels: np.ndarray, ignore: np.ndarray) -> None:
    results["gt_bboxes"] = HorizontalBoxes(torch.from_numpy(np.array(boxes, np.float32)))
    results["gt_bboxes_labels"] = np.array(labels, np.int64)
    results["gt_ignore_flags"] = np.array(ignore, bool)
