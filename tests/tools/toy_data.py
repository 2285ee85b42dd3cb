"""A detection set that is drawn in a moment: bright rectangles of two classes on dark noise, COCO and VOC layout."""

import json
from pathlib import Path

import cv2
import numpy as np
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer

CLASSES = ("red", "green")


def forget_runs() -> None:
    """Forget mmengine's named objects: a second run in this process would write to the first one's folder."""
    for named in (MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        named._instance_dict.clear()


def draw_scene(rng: np.random.Generator, width: int = 96, height: int = 64) -> tuple[np.ndarray, list[tuple]]:
    """A BGR picture and its boxes (label, x, y, w, h)."""
    picture = rng.integers(0, 60, (height, width, 3), np.uint8)
    boxes = []
    for label in (0, 1):
        w, h = rng.integers(24, 40, 2)
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        picture[y : y + h, x : x + w] = (0, 0, 255) if label == 0 else (0, 255, 0)
        boxes.append((label, int(x), int(y), int(w), int(h)))
    return picture, boxes


def make_coco(folder: Path, *, train: int = 12, val: int = 4) -> Path:
    """Write train/, val/, train.json and val.json; returns the folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            picture, boxes = draw_scene(rng)
            cv2.imwrite(str(folder / split / f"{index}.png"), picture)
            height, width = picture.shape[:2]
            images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
            for label, x, y, w, h in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return folder


def make_voc(root: Path, *, photos: int = 4) -> Path:
    """Write a VOCdevkit of VOC2007 and VOC2012 whose boxes are cars and dogs; returns its folder."""
    rng = np.random.default_rng(2)
    for year, lists in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval",))):
        folder = root / year
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        for split in lists:
            names = [f"{split}_{index}" for index in range(photos)]
            (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
            for name in names:
                picture, boxes = draw_scene(rng)
                height, width = picture.shape[:2]
                cv2.imwrite(str(folder / "JPEGImages" / f"{name}.jpg"), picture)
                objects = "".join(
                    f"<object><name>{('car', 'dog')[label]}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                    f"<ymin>{y + 1}</ymin><xmax>{x + w + 1}</xmax><ymax>{y + h + 1}</ymax></bndbox></object>"
                    for label, x, y, w, h in boxes
                )
                size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
                (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return root


def make_video(path: Path, frames: int = 5) -> Path:
    """Write a short mp4 of scenes."""
    rng = np.random.default_rng(1)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    for _ in range(frames):
        writer.write(draw_scene(rng)[0])
    writer.release()
    return path
