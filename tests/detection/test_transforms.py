import mambavision.detection  # noqa: F401  makes mmdet importable

# isort: split
import random

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes

from mambavision.detection.datasets import Photo
from mambavision.detection.transforms import HSVGain, LetterBox, LoadPhoto, MosaicAffine, RandomScaleTranslate, paste


def photo_of_squares(width: int, height: int, squares: list[tuple[int, int, int, int]], colour: int = 255) -> Photo:
    """Black photo with filled rectangles, which are its boxes."""
    img = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2 in squares:
        img[y1:y2, x1:x2] = colour
    n = len(squares)
    boxes = np.array(squares, np.float32).reshape(-1, 4)
    return Photo(img, boxes, np.arange(n, dtype=np.int64), np.zeros(n, bool), 1.0)


class Photos:
    def __init__(self, *photos: Photo) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def photo(self, index: int) -> Photo:
        return self.photos[index]


def results_of(photo: Photo) -> dict:
    return {
        "img": photo.img,
        "gt_bboxes": HorizontalBoxes(torch.from_numpy(photo.boxes.copy())),
        "gt_bboxes_labels": photo.labels,
        "gt_ignore_flags": photo.ignore,
    }


def bright_box(img: np.ndarray, threshold: int = 180) -> list[int]:
    rows, columns = np.nonzero(img[..., 0] > threshold)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_all_are_registered():
    for name in ("LoadPhoto", "LetterBox", "RandomScaleTranslate", "MosaicAffine", "HSVGain"):
        assert TRANSFORMS.get(name) is not None


@pytest.mark.parametrize("width, height", [(100, 50), (50, 100), (33, 97), (640, 480), (1, 1), (4000, 3), (64, 64)])
@pytest.mark.parametrize("rect", [False, True])
def test_letterbox_geometry(width, height, rect):
    photo = photo_of_squares(width, height, [(0, 0, width, height)])
    out = LetterBox(64, rect=rect)(results_of(photo))
    h, w = out["img"].shape[:2]
    assert out["img_shape"] == (h, w) and h % 32 == 0 and w % 32 == 0 and max(h, w) == 64
    if not rect:
        assert (h, w) == (64, 64)
    top, bottom, left, right = out["pad_param"]
    assert abs(top - bottom) <= 1 and abs(left - right) <= 1
    box = out["gt_bboxes"].tensor[0].tolist()
    assert box == pytest.approx([left, top, w - right, h - bottom], abs=1e-3)
    scale_w, scale_h = out["scale_factor"]
    assert w - left - right == pytest.approx(width * scale_w)
    assert h - top - bottom == pytest.approx(height * scale_h)
    padding = np.ones((h, w), bool)
    padding[int(top) : h - int(bottom), int(left) : w - int(right)] = False
    assert (out["img"][padding] == 114).all()


def test_letterbox_moves_a_box_with_its_pixels():
    photo = photo_of_squares(200, 100, [(40, 20, 120, 60)])
    out = LetterBox(128)(results_of(photo))
    assert bright_box(out["img"]) == pytest.approx(out["gt_bboxes"].tensor[0].tolist(), abs=1.0)


def test_letterbox_without_boxes_and_large_photo():
    out = LetterBox(640, rect=True)({"img": np.zeros((6000, 8000, 3), np.uint8)})
    assert out["img"].shape == (480, 640, 3) and out["scale_factor"] == pytest.approx((0.08, 0.08))


def test_letterbox_refuses_a_size_off_the_stride():
    with pytest.raises(ValueError, match="multiple of stride 32"):
        LetterBox(100, rect=True)


def test_random_scale_translate_moves_boxes_with_pixels():
    photo = photo_of_squares(96, 64, [(36, 24, 60, 40)])
    np.random.seed(0)
    for _ in range(20):
        out = RandomScaleTranslate()(results_of(photo))
        assert out["img"].shape == photo.img.shape
        assert bright_box(out["img"] * (out["img"] != 114), 127) == pytest.approx(
            out["gt_bboxes"].tensor[0].tolist(), abs=1.01
        )


def test_box_filter():
    affine = RandomScaleTranslate()
    before = np.array([[0, 0, 10, 10], [0, 0, 2, 10], [0, 0, 300, 2.5], [0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 5]])
    after = np.array([[0, 0, 10, 10], [0, 0, 2, 10], [0, 0, 300, 2.5], [7, 7, 10, 10], [6, 6, 10, 10], [5, 5, 5, 5]])
    # kept; 2 px wide; aspect 120; 9 % of the area left; 16 % left; nothing
    assert affine.keep(before, after).tolist() == [True, False, False, False, True, False]


def test_paste_is_subpixel_exact():
    ramp = np.repeat(np.arange(50, 100, dtype=np.uint8)[None, :, None], 50, 0).repeat(3, 2)
    out = np.zeros((80, 80, 3), np.uint8)
    paste(out, ramp, zoom=2.0, origin=np.array([-20.0, 10.0]))
    # result pixel i has its centre at source (i + 0.5 + 20) / 2 - 0.5
    expected = 50 + (np.arange(80) + 20.5) / 2 - 0.5
    assert np.abs(out[30, :79, 0] - expected[:79]).max() <= 0.51
    assert (out[:10] == 0).all() and (out[10:] > 0).all()


def test_mosaic_boxes_lie_on_their_pixels():
    squares = [(20, 20, 70, 50)]
    photos = Photos(*(photo_of_squares(w, h, squares) for w, h in ((100, 80), (90, 120), (300, 100), (96, 96))))
    np.random.seed(3)
    seen = 0
    for step in range(40):
        out = MosaicAffine(96, scale=(0.8, 1.2))({"dataset": photos, "sample_idx": step % 4})
        assert out["img"].shape == (96, 96, 3) and out["img_shape"] == (96, 96)
        boxes = out["gt_bboxes"].tensor.numpy()
        assert len(boxes) == len(out["gt_bboxes_labels"]) == len(out["gt_ignore_flags"])
        inside = np.zeros((96, 96), bool)
        for x1, y1, x2, y2 in boxes:
            # pixels a little within the box are white, those around all boxes are not
            assert (out["img"][int(y1) + 2 : int(y2) - 2, int(x1) + 2 : int(x2) - 2] > 200).all()
            inside[max(int(y1) - 2, 0) : int(y2) + 3, max(int(x1) - 2, 0) : int(x2) + 3] = True
        stray = (out["img"][..., 0] > 200) & ~inside
        assert stray.sum() <= 150  # remains of boxes cut below the area limit
        seen += len(boxes)
    assert seen > 60


def test_mosaic_equals_canvas_then_crop():
    """Against the plain way: paste four photos on a canvas of twice the size, then warp it."""
    rng = np.random.default_rng(0)
    noise = [cv2.GaussianBlur(rng.random((64, 64, 3)), (0, 0), 3) for _ in range(4)]
    imgs = [cv2.normalize(img, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8) for img in noise]
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), 1.0
    photos = Photos(*(Photo(img, *none) for img in imgs))
    for seed in range(5):
        np.random.seed(seed)
        out = MosaicAffine(64)({"dataset": photos, "sample_idx": 0})["img"]
        np.random.seed(seed)
        chosen = [0, *np.random.randint(0, 4, 3)]
        cx, cy = np.random.uniform(32, 96, 2).round().astype(int)
        scale = np.random.uniform(0.5, 1.5)
        x, y = np.random.uniform(0.4, 0.6, 2)
        canvas = np.full((256, 256, 3), 114, np.uint8)  # with a margin of 64
        for corner, index in enumerate(chosen):
            left, top = 64 + cx - (64 if corner % 2 == 0 else 0), 64 + cy - (64 if corner < 2 else 0)
            canvas[top : top + 64, left : left + 64] = imgs[index]
        canvas = canvas[64:192, 64:192]
        shift = np.array([x, y]) * 64 - scale * 64 + (scale - 1) / 2
        plain = cv2.warpAffine(
            canvas, np.array([[scale, 0, shift[0]], [0, scale, shift[1]]]), (64, 64), borderValue=(114,) * 3
        )
        difference = np.abs(out.astype(int) - plain)
        assert np.median(difference) <= 1 and (difference > 6).mean() < 0.05  # only the seams


def test_mosaic_is_deterministic_and_leaves_photos_alone():
    photos = Photos(*(photo_of_squares(60, 40, [(10, 10, 30, 30)]) for _ in range(3)))
    copies = [photo.img.copy() for photo in photos.photos]
    outs = []
    for _ in range(2):
        np.random.seed(7)
        random.seed(7)
        out = MosaicAffine(64)({"dataset": photos, "sample_idx": 1})
        outs.append((HSVGain()(dict(out))["img"], out["gt_bboxes"].tensor))
    assert np.array_equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert all(np.array_equal(photo.img, copy) for photo, copy in zip(photos.photos, copies, strict=True))


def test_mosaic_of_photos_without_boxes():
    photos = Photos(photo_of_squares(60, 40, []))
    out = MosaicAffine(64)({"dataset": photos, "sample_idx": 0})
    assert out["gt_bboxes"].tensor.shape == (0, 4) and out["gt_bboxes_labels"].shape == (0,)


def test_hsv_gain_multiplies():
    img = np.full((4, 4, 3), (40, 80, 120), np.uint8)
    hsv = cv2.cvtColor(img, cv2.COLOR_BGR2HSV)[0, 0].astype(float)
    np.random.seed(1)
    factors = 1 + np.random.uniform(-1, 1, 3) * [0.0, 0.0, 0.4]
    np.random.seed(1)
    out = HSVGain(hue=0.0, saturation=0.0)({"img": img})["img"]
    value = cv2.cvtColor(out, cv2.COLOR_BGR2HSV)[0, 0].astype(float)
    assert value[2] == pytest.approx(hsv[2] * factors[2], abs=1) and value[:2] == pytest.approx(hsv[:2], abs=2)
    assert np.array_equal(img, np.full((4, 4, 3), (40, 80, 120), np.uint8))
    same = HSVGain(hue=0.0, saturation=0.0, value=0.0)({"img": img})["img"]
    assert np.abs(same.astype(int) - img).max() <= 2


def test_load_photo_from_file_and_array(tmp_path):
    path = tmp_path / "gray.png"
    cv2.imwrite(str(path), np.full((6, 9), 7, np.uint8))
    out = LoadPhoto()({"img_path": str(path)})
    assert out["img"].shape == (6, 9, 3) and out["ori_shape"] == (6, 9)
    assert LoadPhoto()({"img": np.zeros((5, 4, 3), np.uint8)})["img_shape"] == (5, 4)
    with pytest.raises(ValueError, match="with_boxes"):
        LoadPhoto(with_boxes=True)({"img_path": str(path)})


def test_pipeline_builds_from_config():
    transform = TRANSFORMS.build({"type": "MosaicAffine", "size": 64, "scale": (0.9, 1.1)})
    assert transform.affine.scale == (0.9, 1.1)
