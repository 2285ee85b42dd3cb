"""COCO metrics that also count an evaluation without any detection."""

from typing import Any

import numpy as np
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS

from mambavision.detection.datasets import read_coco


@METRICS.register_module(name="CocoMetric", force=True)
class WholeCocoMetric(CocoMetric):
    """mmdet's CocoMetric, and in its place in the registry, whose result has all its names if nothing was found.

    pycocotools cannot load an empty list of boxes, on which mmdet's class returns no metrics at all: nothing to print,
    and nothing by which a training could choose its best checkpoint. Annotations need no area and no iscrowd, and are
    numbered anew: pycocotools takes those of one id for one, and one of id 0 for none. Arguments are CocoMetric's.

    Raises:
        DatasetError: If ``ann_file`` is no COCO JSON, see :func:`~mambavision.detection.datasets.read_coco`.
    """

    def __init__(self, ann_file: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if ann_file is not None:
            self._coco_api = COCO()
            self._coco_api.dataset = _completed(read_coco(ann_file))
            self._coco_api.createIndex()

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics; with no box in any picture, those of one miss of score 0 and no area: AP and AR 0."""
        if not self.format_only and results and not any(len(found["scores"]) for _, found in results):
            truth, found = results[0]
            miss = {
                "bboxes": np.zeros((1, 4), np.float32),
                "scores": np.zeros(1, np.float32),
                "labels": np.zeros(1, np.int64),
            }
            results = [(truth, {**found, **miss}), *results[1:]]
        return super().compute_metrics(results)


def _completed(content: dict) -> dict:
    """A COCO JSON's content whose annotations have ids, area and iscrowd."""
    annotations = [
        {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], **one, "id": i}
        for i, one in enumerate(content["annotations"], 1)
    ]
    return {"info": {}, "licenses": [], **content, "annotations": annotations}
