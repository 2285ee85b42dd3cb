import numpy as np
import pytest
import torch

from mambavision.detection import build_mamba_yolo
from mambavision.detection.inferencer import Detections, DetInferencer, draw
from mambavision.detection.photos import imread
from mambavision.detection.weights import save_weights
from tests.conftest import shared


@pytest.fixture(scope="module")
def inferencer(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    detector = build_mamba_yolo("debug", classes=["a", "b"])
    for tower in detector.bbox_head.cls_towers:  # untrained scores are all alike and tiny
        tower[-1].weight.data.mul_(30)
        tower[-1].bias.data.zero_()
    save_weights(detector, path, size="debug", variant="aaai", classes=["a", "b"], input_size=96)
    return DetInferencer.from_weights(path, score_thr=0.3)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_boxes_are_in_pixels_of_the_picture(inferencer):
    img = picture(96, 96)
    (found,) = inferencer([img])
    assert len(found) > 3
    assert (np.diff(found.scores) <= 0).all() and found.scores.min() >= 0.3
    # the same picture with every pixel doubled is averaged back to itself: boxes twice as large
    (doubled,) = inferencer([img.repeat(2, 0).repeat(2, 1)])
    np.testing.assert_allclose(doubled.boxes, found.boxes * 2, atol=1e-3)
    np.testing.assert_allclose(doubled.scores, found.scores, atol=1e-5)


def test_a_narrow_picture_is_padded_and_the_padding_undone(inferencer):
    img = picture(40, 96)
    padded = np.full((64, 96, 3), 114, np.uint8)
    padded[12:52] = img  # what the letterbox makes of it: up to a multiple of 32, centred
    (found,) = inferencer([img])
    (by_hand,) = inferencer([padded])
    expected = by_hand.boxes - np.array([0, 12, 0, 12])
    np.testing.assert_allclose(found.boxes, np.clip(expected, 0, [96, 40, 96, 40]), atol=1e-3)


def test_a_batch_gives_what_its_pictures_give_alone(inferencer):
    pictures = [picture(96, 96), picture(96, 96, 1)]
    for found, img in zip(inferencer(pictures), pictures, strict=True):
        (alone,) = inferencer([img])
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
    assert inferencer([]) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (3, 2), (6000, 8000)])
def test_pictures_of_any_size(inferencer, shape):
    img = np.full((*shape, 3), 90, np.uint8)
    (found,) = inferencer([img])
    height, width = shape
    assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()
    assert draw(img, found, inferencer.classes).shape == img.shape


@pytest.mark.parametrize("img", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_other_arrays_are_refused(inferencer, img):
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        inferencer([img])


def test_detections_become_json():
    found = Detections(np.float32([[1, 2, 3.456, 4]]), np.float32([0.75]), np.array([1]))
    assert found.as_dicts(["a", "b"]) == [{"class": "b", "label": 1, "score": 0.75, "xyxy": [1.0, 2.0, 3.46, 4.0]}]


def test_drawing_marks_the_box_and_leaves_the_original():
    img = picture(200, 300) // 4
    before = img.copy()
    found = Detections(np.float32([[50, 60, 150, 160]]), np.float32([0.9]), np.array([0]))
    out = draw(img, found, ["größe"])
    assert np.array_equal(img, before)
    changed = (out != img).any(-1)
    assert changed[60, 50:150].all() and changed[160 - 1, 50:150].all() and changed[60:160, 50].all()
    assert not changed[70:150, 60:140].any() and not changed[170:].any()
    assert changed[44:60, 50:100].any()  # the label above


def test_drawing_keeps_labels_inside_the_picture():
    found = Detections(np.float32([[0, 0, 10, 10], [290, 190, 300, 200]]), np.float32([0.9, 0.8]), np.array([0, 1]))
    out = draw(np.zeros((200, 300, 3), np.uint8), found, ["long name", "another"])
    assert out[:20, :40].any() and out[170:190, 250:].any()


def test_an_inferencer_knows_its_weights(inferencer):
    assert inferencer.weights.name == "w.safetensors"
    assert DetInferencer(inferencer.detector, [], classes=["a", "b"], score_thr=0.3).weights is None


def test_a_real_photo_goes_through(inferencer):
    img = imread(shared("data", "bccd", "JPEGImages", "BloodImage_00007.jpg"))
    (found,) = inferencer([img])
    assert (found.boxes[:, 2] <= img.shape[1]).all() and (found.boxes[:, 3] <= img.shape[0]).all()
