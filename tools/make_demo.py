#!/usr/bin/env python
"""Draw the demo set of blood smears: a small COCO-format data set that is the project's own."""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from mambavision.engine import cli
from mambavision.engine.files import check_folder

CLASSES = ("Platelets", "RBC", "WBC")
WIDTH, HEIGHT = 320, 240
SCALE = 4  # drawn larger, then averaged down: smooth edges


def main() -> None:
    """Write OUT/{train,val}/*.jpg and OUT/{train,val}.json, the same for the same arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write, such as demo/cells")
    parser.add_argument("--train", type=int, default=24, help="training pictures (default 24)")
    parser.add_argument("--val", type=int, default=8, help="validation pictures (default 8)")
    args = parser.parse_args()
    check_folder(args.out, "out")
    write_split(args.out, "train", args.train, seed=0)
    write_split(args.out, "val", args.val, seed=1)


def write_split(out: Path, split: str, count: int, *, seed: int) -> None:
    """Draw `count` pictures and their COCO JSON."""
    (out / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        picture, cells = draw_smear(np.random.default_rng((seed, number)))
        name = f"smear_{number:03d}.jpg"
        cv2.imwrite(str(out / split / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 88])
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for label, (x1, y1, x2, y2) in cells:
            w, h = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x1, y1, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / f"{split}.json").write_text(json.dumps(content))


def draw_smear(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """A picture (HEIGHT, WIDTH, 3) uint8 BGR and its cells: (label, [x1, y1, x2, y2])."""
    shape = HEIGHT * SCALE, WIDTH * SCALE
    ground = np.array([205, 208, 225]) + rng.uniform(-12, 12, 3)
    slope = np.linspace(-1, 1, shape[1])[None, :, None] * rng.uniform(-12, 12)
    picture = (ground + slope + np.zeros((*shape, 1))).astype(np.float32)
    cells: list[tuple[int, list[int]]] = []
    counts = rng.integers(1, 5), rng.integers(6, 14), rng.integers(0, 3)
    for label in (2, 1, 0):
        for _ in range(counts[label]):
            radius = {0: (7, 10), 1: (18, 24), 2: (31, 40)}[label]
            axes = rng.uniform(*radius) * rng.uniform(0.88, 1.12, 2)
            centre = _free_place(cells, axes, rng)
            if centre is None:
                continue
            outline = _blob(shape, centre, axes, rng)
            {0: _platelet, 1: _red_cell, 2: _white_cell}[label](picture, outline, centre, axes, rng)
            rows, columns = np.flatnonzero(outline.any(1)), np.flatnonzero(outline.any(0))
            edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            cells.append((label, [int(round(edge / SCALE)) for edge in edges]))
    small = cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.5, 0.9)) + rng.normal(0, 3, small.shape)
    return small.clip(0, 255).astype(np.uint8), cells


def _free_place(cells: list, axes: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """A centre whose cell overlaps the others a little at most; None if twenty tries find none."""
    for _ in range(20):
        centre = rng.uniform((0.6 * axes[0], 0.6 * axes[1]), (WIDTH - 0.6 * axes[0], HEIGHT - 0.6 * axes[1]))
        gaps = [
            np.hypot(*(centre - ((x1 + x2) / 2, (y1 + y2) / 2))) - 0.85 * (axes.mean() + (x2 - x1 + y2 - y1) / 4)
            for _, (x1, y1, x2, y2) in cells
        ]
        if all(gap > 0 for gap in gaps):
            return centre
    return None


def _blob(shape: tuple[int, int], centre: np.ndarray, axes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask (bool, `shape`) of a round thing with a slightly wavy outline."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    radius = 1 + sum(rng.uniform(-0.04, 0.04) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    points = centre + np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None] * axes
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(points * SCALE).astype(np.int32)], 1)
    return mask.astype(bool)


def _red_cell(picture, outline, centre, axes, rng) -> None:
    colour = np.array([140, 135, 195]) + rng.uniform(-14, 14, 3)
    y, x = np.nonzero(outline)
    distance = np.hypot((x / SCALE - centre[0]) / axes[0], (y / SCALE - centre[1]) / axes[1])
    pale = np.exp(-((distance / 0.45) ** 2))[:, None] * rng.uniform(0.3, 0.9)
    picture[y, x] = colour + (picture[y, x] - colour) * (0.15 + 0.7 * pale)


def _white_cell(picture, outline, centre, axes, rng) -> None:
    picture[outline] = np.array([190, 165, 195]) + rng.uniform(-10, 10, 3)
    for _ in range(rng.integers(2, 5)):
        lobe = _blob(picture.shape[:2], centre + rng.uniform(-0.35, 0.35, 2) * axes, axes * rng.uniform(0.3, 0.5), rng)
        picture[lobe & outline] = np.array([140, 60, 105]) + rng.uniform(-10, 10, 3)


def _platelet(picture, outline, centre, axes, rng) -> None:
    picture[outline] = np.array([165, 105, 140]) + rng.uniform(-12, 12, 3)


if __name__ == "__main__":
    cli.run(main)
