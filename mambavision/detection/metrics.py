"""COCO metrics that also count an evaluation without any detection."""

import numpy as np
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS


@METRICS.register_module(name="CocoMetric", force=True)
class WholeCocoMetric(CocoMetric):
    """mmdet's CocoMetric, and in its place in the registry, whose result has all its names if nothing was found.

    pycocotools cannot load an empty list of boxes, on which mmdet's class returns no metrics at all: nothing to print,
    and nothing by which a training could choose its best checkpoint.
    """

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
