"""Detection on pictures in memory: preprocessing, network, boxes in pixels of the picture, and drawing them."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from PIL import Image, ImageDraw, ImageFont

from mambavision.detection.weights import from_checkpoint, load_detector

_SMALLEST_FONT = 10  # pixels
_LOADERS = ("LoadImageFromFile", "LoadImageFromNDArray", "LoadPhoto", "LoadAnnotations")


@dataclass(frozen=True)
class Detections:
    """Boxes found in one picture, by falling score.

    Attributes:
        boxes: float32 (n, 4), xyxy, pixels of the picture as it was given.
        scores: float32 (n,), in 0..1.
        labels: int64 (n,), indices into the inferencer's ``classes``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def as_dicts(self, classes: Sequence[str]) -> list[dict]:
        """One JSON-ready dict a box: class, label, score, xyxy."""
        return [
            {
                "class": classes[label],
                "label": int(label),
                "score": round(float(score), 4),
                "xyxy": [round(float(value), 2) for value in box],
            }
            for box, score, label in zip(self.boxes, self.scores, self.labels, strict=True)
        ]


class DetInferencer:
    """Find objects in BGR pictures of any size.

    Args:
        detector: Detector in eval mode on its device; its test score threshold becomes ``score_thr``.
        pipeline: mmdet test pipeline, without the loading steps, that ends with PackDetInputs.
        classes: Class names; by default those of ``detector.dataset_meta``.
        score_thr: Least score of a box, in 0..1.
        weights: File that the detector's weights are from, for messages.

    Raises:
        ValueError: If ``score_thr`` is outside 0..1.
    """

    def __init__(
        self,
        detector: BaseModel,
        pipeline: Sequence[dict],
        *,
        classes: Sequence[str] | None = None,
        score_thr: float = 0.25,
        weights: str | Path | None = None,
    ) -> None:
        if not 0 <= score_thr <= 1:
            raise ValueError(f"score threshold {score_thr} is outside 0..1")
        init_default_scope("mmdet")
        self.detector = detector
        self.pipeline = Compose([dict(type="LoadPhoto"), *pipeline])
        self.score_thr = score_thr
        self.weights = None if weights is None else Path(weights)
        detector.bbox_head.test_cfg = ConfigDict(detector.bbox_head.test_cfg or {}, score_thr=score_thr)
        num_classes = detector.bbox_head.num_classes
        self.classes = tuple(classes or detector.dataset_meta["classes"])
        self.classes += tuple(f"class {index}" for index in range(len(self.classes), num_classes))

    @classmethod
    def from_weights(
        cls, path: str | Path, *, device: str | torch.device = "cpu", score_thr: float = 0.25
    ) -> "DetInferencer":
        """Load a published weights file; see :func:`~mambavision.detection.weights.load_detector` for errors."""
        detector = load_detector(path, device)
        pipeline = [
            dict(type="LetterBox", size=detector.input_size, rect=True),
            dict(type="PackDetInputs", meta_keys=("ori_shape", "img_shape", "scale_factor", "pad_param")),
        ]
        return cls(detector, pipeline, score_thr=score_thr, weights=path)

    @classmethod
    def from_config(
        cls,
        config: str | Path | Config,
        checkpoint: str | Path,
        *,
        device: str | torch.device = "cpu",
        score_thr: float = 0.25,
    ) -> "DetInferencer":
        """Load a training checkpoint of any single-stage mmdet config, with the config's own test pipeline."""
        config = config if isinstance(config, Config) else Config.fromfile(config)
        detector = from_checkpoint(config, checkpoint, device)
        steps = config.test_dataloader.dataset.pipeline
        steps = [step for step in steps if step["type"] not in _LOADERS]
        return cls(detector, steps, score_thr=score_thr, weights=checkpoint)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Detect on uint8 BGR pictures (H, W, 3), all in one batch; see ``detection.photos.imread`` for other kinds.

        Raises:
            ValueError: If a picture is not uint8 (H, W, 3) or is empty.
        """
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
                raise ValueError(f"a picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        if not pictures:
            return []
        samples = self.detector.test_step(pseudo_collate([self.pipeline(dict(img=picture)) for picture in pictures]))
        return [self._unpack(sample.pred_instances) for sample in samples]

    def _unpack(self, found) -> Detections:
        found = found[found.scores >= self.score_thr].cpu().numpy()
        order = np.argsort(-found.scores, kind="stable")
        return Detections(found.bboxes[order], found.scores[order], found.labels[order])


def draw(picture: np.ndarray, found: Detections, classes: Sequence[str]) -> np.ndarray:
    """Return a copy of a BGR picture with its boxes, class names and scores drawn in; best boxes on top."""
    height, width = picture.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(picture[..., ::-1]))
    canvas = ImageDraw.Draw(image)
    line = max(1, round((height + width) / 600))
    largest = max(_SMALLEST_FONT, round((height + width) / 75))
    items = list(zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True))[::-1]
    for (x1, y1, x2, y2), _, label in items:
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_colour(label), width=line)
    for (x1, y1, x2, _), score, label in items:
        text = f"{classes[label]} {score:.2f}"
        length = canvas.textlength(text, font=_font(largest))
        # a label may be a little wider than its box, or neighbours cover each other's
        size = min(largest, max(_SMALLEST_FONT, int(largest * 1.3 * (x2 - x1) / length)))
        _, _, text_width, text_height = canvas.textbbox((0, 0), text, font=_font(size))
        # above the box, or inside its top edge where the picture ends; never past the right edge
        left = max(0.0, min(x1, width - text_width - 2 * line))
        top = y1 - text_height - 2 * line
        top = top if top >= 0 else y1
        colour = _colour(label)
        canvas.rectangle((left, top, left + text_width + 2 * line, top + text_height + 2 * line), fill=colour)
        luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
        canvas.text((left + line, top + line), text, fill=ink, font=_font(size))
    return np.ascontiguousarray(np.asarray(image)[..., ::-1])


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _colour(label: int) -> tuple[int, int, int]:
    """RGB of a class; consecutive labels are a golden-ratio turn of the hue apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
