"""Detection pictures made of Tiny-ImageNet-200 photos: a small data set to pre-train a detector on."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.registry import DATASETS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.dataset import BaseDataset

from mambavision.detection.photos import PAD_VALUE
from mambavision.detection.tinyimagenet_pack import SIDE, Split
from mambavision.engine.photos import DatasetError

MIN_ZOOM, MAX_ZOOM = 0.75, 5.0
MIN_BOX = 6.0  # pixels; a smaller side is not labelled
MIN_VISIBLE = 0.5  # of a box's area; a box that is less visible is not labelled


@DATASETS.register_module()
class TinyImageNetMosaic(BaseDataset):
    """Pictures composed of 1 to about 40 photos of 64 x 64 pixels, each with its one box.

    Picture `i` of a `seed` is always the same, so `length` is free: an endless training set is a large length. Half
    of the pictures are tiled (a random guillotine partition, each cell filled by a crop of a photo that shows
    most of its box), half scattered (photos at random places, over each other, on gray or on a blurred patch of a
    photo). Photos are magnified 0.75 to 5 times on a 320 pixel canvas, in proportion on others, and in training
    mirrored at random. Boxes follow; tiny and mostly hidden ones are dropped.

    Args:
        root: a pack folder (see tinyimagenet_pack).
        split: "train" or "val", the source of the photos.
        length: number of pictures.
        size: side of the square canvas in pixels.
        seed: of all choices.
        kwargs: those of mmengine's BaseDataset (pipeline, test_mode, ...).

    The pipeline gets img, gt_bboxes, gt_bboxes_labels, gt_ignore_flags, and `instances` for a CocoMetric that has no
    ann_file (name `instances` in PackDetInputs' meta_keys).

    Raises:
        DatasetError: the folder is not a pack.
    """

    def __init__(
        self, *, root: str, split: Split = "train", length: int, size: int = 320, seed: int = 0, **kwargs
    ) -> None:
        folder = Path(root)
        try:
            self.photos = np.load(folder / f"{split}_photos.npy", mmap_mode="r")
            self.photo_boxes = np.load(folder / f"{split}_boxes.npy").astype(np.float32)
            self.photo_labels = np.load(folder / f"{split}_labels.npy").astype(np.int64)
            names = tuple(json.loads((folder / "names.json").read_text()))
        except (OSError, ValueError) as error:
            raise DatasetError(f"{folder}: not a Tiny-ImageNet pack ({error})") from None
        self.split = split
        self.length = length
        self.size = size
        self.seed = seed
        super().__init__(metainfo={"classes": names}, serialize_data=False, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Nothing to list: pictures are composed when asked for."""
        return []

    def __len__(self) -> int:
        return self.length

    def get_cat_ids(self, idx: int) -> list[int]:
        """Labels in picture `idx`."""
        return self.sample(idx)[2].tolist()

    def get_data_info(self, idx: int) -> dict:
        """Picture `idx` as an mmdet pipeline takes it."""
        img, boxes, labels = self.sample(idx)
        return {
            "img": img,
            "img_id": idx,
            "sample_idx": idx,
            "img_path": f"{self.split}/{idx}",
            "img_shape": img.shape[:2],
            "ori_shape": img.shape[:2],
            "height": self.size,
            "width": self.size,
            "scale_factor": (1.0, 1.0),
            "gt_bboxes": HorizontalBoxes(torch.from_numpy(boxes.copy())),
            "gt_bboxes_labels": labels,
            "gt_ignore_flags": np.zeros(len(labels), bool),
            "instances": [
                {"bbox": box, "bbox_label": label, "ignore_flag": 0}
                for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
            ],
        }

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Picture `index`: (img uint8 BGR (size, size, 3), boxes float32 (n, 4) xyxy in pixels, labels int64 (n,))."""
        rng = np.random.default_rng((self.seed, self.split == "val", index))
        img = np.full((self.size, self.size, 3), PAD_VALUE, np.uint8)
        compose = self._tile if rng.random() < 0.5 else self._scatter
        boxes, labels = compose(img, rng)
        return img, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)

    def _tile(self, img: np.ndarray, rng: np.random.Generator) -> tuple[list, list]:
        unit = self.size / 320
        # the cells' target side, log-uniform: as many pictures of few large things as of many small ones
        target = SIDE * unit * np.exp(rng.uniform(np.log(0.9), np.log(MAX_ZOOM)))
        boxes, labels = [], []
        for x, y, w, h in _partition(self.size, self.size, target, MIN_ZOOM * SIDE * unit, rng):
            if rng.random() < 0.06:
                continue
            photo, box, label = self._draw(rng)
            zoom = max(w, h) / SIDE * rng.uniform(1.0, 1.3)
            side = max(round(SIDE * zoom), w, h)
            zoom = side / SIDE
            left = _crop_offset(box[0] * zoom, box[2] * zoom, w, side, rng)
            top = _crop_offset(box[1] * zoom, box[3] * zoom, h, side, rng)
            img[y : y + h, x : x + w] = _magnify(photo, side)[top : top + h, left : left + w]
            whole = box * zoom + np.array([x - left, y - top] * 2)
            seen = whole.clip((x, y, x, y), (x + w, y + h, x + w, y + h))
            boxes.append(seen)
            labels.append(label)
        return _large_enough(boxes, labels)

    def _scatter(self, img: np.ndarray, rng: np.random.Generator) -> tuple[list, list]:
        size, unit = self.size, self.size / 320
        if rng.random() < 0.7:
            photo, _, _ = self._draw(rng)
            x, y = rng.integers(0, SIDE - 12, 2)
            img[:] = cv2.resize(photo[y : y + 12, x : x + 12], (size, size), interpolation=cv2.INTER_CUBIC)
        largest = np.exp(rng.uniform(np.log(1.2), np.log(MAX_ZOOM)))
        covered, limit = 0.0, rng.uniform(0.4, 0.9) * size * size
        owner = np.full((size, size), -1, np.int16)
        rectangles = np.empty((40, 4), np.int64)
        boxes, labels = [], []
        while covered < limit and len(boxes) < 40:
            photo, box, label = self._draw(rng)
            zoom = np.exp(rng.uniform(np.log(MIN_ZOOM), np.log(largest)))
            side = min(round(SIDE * zoom * unit), size)
            zoom = side / SIDE
            places = rng.integers(0, size - side + 1, (8, 2))
            x, y = places[int(np.argmin(_overlap(places, side, rectangles[: len(boxes)])))]
            # half of the photos are cut down to their box and some surroundings, so that edges tell less
            x0, y0, x1, y1 = 0, 0, side, side
            if rng.random() < 0.5:
                margin = rng.uniform(0, 1, 4)
                x0, y0 = (box[:2] * zoom * margin[:2]).astype(int)
                x1, y1 = np.ceil(side - (side - box[2:] * zoom) * margin[2:]).astype(int)
            img[y + y0 : y + y1, x + x0 : x + x1] = _magnify(photo, side)[y0:y1, x0:x1]
            owner[y + y0 : y + y1, x + x0 : x + x1] = len(boxes)
            rectangles[len(boxes)] = x + x0, y + y0, x + x1, y + y1
            covered += (x1 - x0) * (y1 - y0)
            boxes.append(box * zoom + np.array([x, y, x, y]))
            labels.append(label)
        kept = []
        for number, box in enumerate(boxes):
            x0, y0, x1, y1 = np.round(box).astype(int)
            mine = owner[y0:y1, x0:x1] == number
            if mine.mean() >= MIN_VISIBLE:
                rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
                seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) + np.array([x0, y0, x0, y0])
                boxes[number] = np.concatenate([np.maximum(box[:2], seen[:2]), np.minimum(box[2:], seen[2:])])
                kept.append(number)
        return _large_enough([boxes[i] for i in kept], [labels[i] for i in kept])

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        number = int(rng.integers(len(self.photos)))
        photo, box = self.photos[number], self.photo_boxes[number]
        if self.split == "train" and rng.random() < 0.5:
            photo, box = photo[:, ::-1], np.array([SIDE - box[2], box[1], SIDE - box[0], box[3]], np.float32)
        return photo, box, int(self.photo_labels[number])


def _partition(
    width: int, height: int, target: float, smallest: float, rng: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """Cut a rectangle in two at random, again and again, until cells (x, y, w, h) are about `target` pixels wide."""
    cells, todo = [], [(0, 0, width, height)]
    while todo:
        x, y, w, h = todo.pop()
        long = max(w, h)
        if long < 2 * smallest or (long <= 1.4 * target and long <= 1.8 * min(w, h)):
            cells.append((x, y, w, h))
            continue
        low = max(smallest / long, 0.35)
        cut = int(rng.uniform(low, 1 - low) * long)
        if w >= h:
            todo += [(x, y, cut, h), (x + cut, y, w - cut, h)]
        else:
            todo += [(x, y, w, cut), (x, y + cut, w, h - cut)]
    return cells


def _crop_offset(start: float, end: float, cell: int, side: int, rng: np.random.Generator) -> int:
    """Where to begin a crop of `cell` pixels out of `side`, so that it shows four fifths of the span start..end."""
    shown = 0.8 * min(end - start, cell)
    low, high = max(int(np.ceil(start + shown)) - cell, 0), min(int(end - shown), side - cell)
    return int(rng.integers(low, max(low, high) + 1))


def _overlap(places: np.ndarray, side: int, rectangles: np.ndarray) -> np.ndarray:
    """Summed overlap in pixels of squares of `side` at places (n, 2) with rectangles (m, 4): (n,)."""
    low = np.maximum(places[:, None], rectangles[:, :2])
    high = np.minimum(places[:, None] + side, rectangles[:, 2:])
    return np.maximum(high - low, 0).prod(2).sum(1)


def _magnify(photo: np.ndarray, side: int) -> np.ndarray:
    interpolation = cv2.INTER_AREA if side < SIDE else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(photo), (side, side), interpolation=interpolation)


def _large_enough(boxes: list[np.ndarray], labels: list[int]) -> tuple[list, list]:
    kept = [i for i, box in enumerate(boxes) if min(box[2] - box[0], box[3] - box[1]) >= MIN_BOX]
    return [boxes[i] for i in kept], [labels[i] for i in kept]
