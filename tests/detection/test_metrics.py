"""The COCO metric on validation JSONs as labelling tools write them."""

import json

import numpy as np
import pytest

from mambavision.detection.metrics import WholeCocoMetric
from mambavision.engine.photos import DatasetError

BOXES = [(5, 5, 20, 10), (30, 20, 15, 15), (1, 30, 10, 8)]
WHOLE = [
    dict(image_id=1, category_id=7, bbox=(x, y, w, h), id=i, area=w * h, iscrowd=0)
    for i, (x, y, w, h) in enumerate(BOXES, 1)
]


def measured(path, annotations):
    """Metrics of three right boxes."""
    content = dict(images=[dict(id=1, file_name="a.jpg", width=64, height=48)], categories=[dict(id=7, name="cell")])
    path.write_text(json.dumps(content | dict(annotations=annotations)))
    metric = WholeCocoMetric(ann_file=str(path), metric="bbox")
    metric.dataset_meta = {"classes": ("cell",)}
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in BOXES], np.float32)
    found = dict(img_id=1, bboxes=corners, scores=np.array([0.9, 0.8, 0.7]), labels=np.zeros(3, np.int64))
    return metric.compute_metrics([(dict(img_id=1, width=64, height=48), found)])


@pytest.mark.parametrize("left_out", [("area",), ("iscrowd",), ("id",), ("area", "iscrowd", "id")])
def test_fields_that_a_labelling_tool_left_out(tmp_path, left_out):
    bare = [{name: value for name, value in one.items() if name not in left_out} for one in WHOLE]
    whole = measured(tmp_path / "whole.json", WHOLE)
    assert whole["bbox_mAP"] == 1.0
    assert measured(tmp_path / "bare.json", bare) == whole


@pytest.mark.parametrize("ids", [(1, 1, 1), (0, 1, 2)])
def test_annotation_ids_that_repeat_or_begin_at_0(tmp_path, ids):
    found = measured(tmp_path / "a.json", [one | dict(id=i) for one, i in zip(WHOLE, ids, strict=True)])
    assert found["bbox_mAP"] == 1.0


def test_a_crowd_stays_one(tmp_path):
    found = measured(tmp_path / "a.json", [WHOLE[0], WHOLE[1], WHOLE[2] | dict(iscrowd=1)])
    assert found["bbox_mAP"] == 1.0


def test_what_is_no_coco_json_is_said(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        WholeCocoMetric(ann_file=str(tmp_path / "gone.json"))
