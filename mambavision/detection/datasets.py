"""Detection data sets as people have them: COCO JSON and Pascal VOC folders, with plain words for what is wrong.

What is done with bad input, everywhere:

- a missing file, a broken JSON or XML, a missing key, an unknown category id: DatasetError, one line.
- a box that leaves the photo is clipped; one wholly outside, or without area, is skipped and counted.
- a truncated or undecodable photo, or one whose size is not the annotated one: skipped and counted in training,
  DatasetError with `test_mode`.
- photos without boxes are kept: they train as background.
- boxes are taken in the photo as displayed, EXIF orientation applied; where the annotated width and height fit only
  the photo as stored, it is read as stored.
"""

from __future__ import annotations

import json
import logging
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from mmdet.datasets.base_det_dataset import BaseDetDataset
from mmdet.registry import DATASETS
from mmengine.logging import print_log

from mambavision.detection.photos import imread, shrink
from mambavision.engine.memory import free_memory
from mambavision.engine.photos import PHOTO_SUFFIXES, DatasetError, is_hidden, is_truncated

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Photo(NamedTuple):
    """A decoded photo: img uint8 BGR (H, W, 3); boxes float32 (n, 4) xyxy in pixels of img; labels int64 (n,);
    ignore bool (n,), crowds and difficult ones; factor, by which img is smaller than the file (<= 1)."""

    img: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    factor: float


class PhotoDataset(BaseDetDataset):
    """Base of the data sets here: photos decoded once, bad ones skipped and counted.

    Args:
        cache: "ram" decodes every photo at construction and keeps it, shared by forked data loader workers.
        photo_side: photos are shrunk to this longer side when read; None keeps them as they are.
        kwargs: those of mmdet's BaseDetDataset (ann_file, data_root, data_prefix, pipeline, test_mode, metainfo, ...).

    Raises:
        DatasetError: as the module says.
    """

    def __init__(self, *, cache: Literal["none", "ram"] = "none", photo_side: int | None = None, **kwargs) -> None:
        if cache not in ("none", "ram"):
            raise ValueError(f'cache must be "none" or "ram", not {cache!r}')
        self.cache = cache
        self.photo_side = photo_side
        self.skipped: Counter[str] = Counter()
        self._photos: dict[str, tuple[np.ndarray, float]] = {}
        self._reported: set[str] = set()
        super().__init__(**kwargs)

    def full_init(self) -> None:
        """Read the annotations, check the files, fill the cache and log one line of what was found and skipped."""
        if not self._fully_initialized:
            super().full_init()
            if self.cache == "ram":
                self._fill_cache()
            self._log_summary()

    def filter_data(self) -> list[dict]:
        """Drop photos that cannot be decoded in training, and those that `filter_cfg` excludes (as mmdet does)."""
        if not self.data_list:
            raise DatasetError(f"{self.ann_file}: lists no photos")
        with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
            problems = list(pool.map(lambda info: _file_problem(info["img_path"]), self.data_list))
        missing = [info["img_path"] for info, problem in zip(self.data_list, problems, strict=True)
                   if problem == "missing"]  # fmt: skip
        if missing:
            raise DatasetError(
                f"{missing[0]}: no such photo ({len(missing)} of {len(problems)} are missing); "
                f"check data_root and data_prefix"
            )
        kept = []
        filter_cfg = {} if self.test_mode else self.filter_cfg or {}
        for info, problem in zip(self.data_list, problems, strict=True):
            if problem and self.test_mode:
                raise DatasetError(f"{info['img_path']}: {problem}")
            if problem:
                self.skipped[f"photos ({problem})"] += 1
            elif filter_cfg.get("filter_empty_gt") and not info["instances"]:
                self.skipped["photos (no boxes)"] += 1
            elif min(info["width"], info["height"]) < filter_cfg.get("min_size", 0):
                self.skipped["photos (too small)"] += 1
            else:
                kept.append(info)
        if not kept:
            raise DatasetError(f"{self.ann_file}: none of its {len(problems)} photos can be used ({self._skips()})")
        return kept

    def photo(self, index: int) -> Photo:
        """Photo number `index` with its boxes, from the cache or from its file.

        Raises:
            DatasetError: the file cannot be decoded, or its size is not the annotated one.
        """
        info = self.get_data_info(index)
        img, factor = self._photos.get(info["img_path"]) or self._read(info)
        instances = info["instances"]
        boxes = np.array([instance["bbox"] for instance in instances], np.float32).reshape(-1, 4)
        return Photo(
            img,
            boxes * np.float32(factor),
            np.array([instance["bbox_label"] for instance in instances], np.int64),
            np.array([instance["ignore_flag"] for instance in instances], bool),
            factor,
        )

    def prepare_data(self, idx: int) -> dict | None:
        """Run the pipeline on photo `idx`; None, which makes the caller draw another, for a bad photo in training."""
        info = self.get_data_info(idx)
        info["dataset"] = self
        try:
            return self.pipeline(info)
        except DatasetError as error:
            if self.test_mode:
                raise
            if str(error) not in self._reported:
                self._reported.add(str(error))
                print_log(f"skipped: {error}", logger="current", level=logging.WARNING)
            return None

    def _read(self, info: dict) -> tuple[np.ndarray, float]:
        img = imread(info["img_path"])
        size = info["height"], info["width"]
        if img.shape[:2] != size:
            stored = imread(info["img_path"], orientation="stored")
            if stored.shape[:2] != size:
                raise DatasetError(
                    f"{info['img_path']}: the photo is {img.shape[1]}x{img.shape[0]}, "
                    f"its annotation says {size[1]}x{size[0]}"
                )
            img = stored
        return (img, 1.0) if self.photo_side is None else shrink(img, self.photo_side)

    def _fill_cache(self) -> None:
        infos = [self.get_data_info(i) for i in range(len(self))]
        need = 0
        for info in infos:
            w, h = info["width"], info["height"]
            factor = 1.0 if self.photo_side is None else min(1.0, self.photo_side / max(w, h))
            need += int(3 * w * h * factor**2)
        free = free_memory("cpu")
        if need > 0.8 * free:
            raise DatasetError(
                f'{self.ann_file}: cache="ram" needs {need / 2**30:.1f} GiB for {len(infos)} photos, '
                f'{free / 2**30:.1f} GiB are free; use cache="none" or a smaller photo_side'
            )

        def read(info: dict) -> tuple[np.ndarray, float] | DatasetError:
            try:
                return self._read(info)
            except DatasetError as error:
                return error

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            photos = list(pool.map(read, infos))
        bad = [i for i, photo in enumerate(photos) if isinstance(photo, DatasetError)]
        if bad and (self.test_mode or len(bad) == len(photos)):
            raise photos[bad[0]]
        if bad:
            self.skipped["photos (cannot be read)"] += len(bad)
            self.get_subset_([i for i in range(len(photos)) if i not in set(bad)])
        self._photos = {
            info["img_path"]: photo
            for info, photo in zip(infos, photos, strict=True)
            if not isinstance(photo, DatasetError)
        }

    def _box(self, box: Sequence[float], width: int, height: int) -> list[float] | None:
        """Clip an xyxy box to the photo; None, and counted, if nothing remains of it."""
        x1, y1, x2, y2 = box
        if x2 <= x1 or y2 <= y1:
            self.skipped["boxes (no area)"] += 1
            return None
        clipped = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.skipped["boxes (outside the photo)"] += 1
            return None
        return clipped

    def _skips(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.skipped.items())) or "nothing"

    def _log_summary(self) -> None:
        boxes = sum(len(self.get_data_info(i)["instances"]) for i in range(len(self)))
        print_log(
            f"{self.ann_file}: {len(self)} photos, {boxes} boxes, {len(self.metainfo['classes'])} classes; "
            f"skipped {self._skips()}",
            logger="current",
        )


@DATASETS.register_module()
class CocoDetDataset(PhotoDataset):
    """A COCO-format JSON and its photos; the classes come from the JSON's own categories.

    `data_prefix=dict(img=...)` is the folder that file_name starts from; without it, the JSON's own folder.
    `metainfo=dict(classes=...)` selects classes by name: label i is classes[i], boxes of others are left out. With
    `test_mode` they must be the JSON's (chosen) categories in its order, because CocoMetric counts by that order.
    Missing width and height are read from the photo, a missing area or iscrowd is not needed.
    """

    def __init__(self, *, ann_file: str, data_prefix: Mapping[str, str] | None = None, **kwargs) -> None:
        self._own_folder = not (data_prefix or {}).get("img")
        super().__init__(ann_file=str(ann_file), data_prefix=dict(data_prefix or {"img": ""}), **kwargs)

    def load_data_list(self) -> list[dict]:
        """Parse the JSON into mmdet's data list."""
        content = read_coco(self.ann_file)
        names = {category["id"]: category["name"] for category in content["categories"]}
        classes = self._metainfo.get("classes")
        if classes is None:
            classes = tuple(names.values())
            self._metainfo["classes"] = classes
        unknown = [name for name in classes if name not in names.values()]
        chosen = [name for name in names.values() if name in classes]
        if self.test_mode and (unknown or list(classes) != chosen):
            raise DatasetError(
                f"{self.ann_file}: its categories are {tuple(names.values())}, the classes are {tuple(classes)}; "
                f"for evaluation give it the same categories in the same order"
            )
        if not chosen:
            raise DatasetError(
                f"{self.ann_file}: has none of the classes {tuple(classes)}; its categories are {tuple(names.values())}"
            )
        label_of = {key: classes.index(name) for key, name in names.items() if name in classes}
        self.cat_ids = list(label_of)
        self.cat2label = label_of

        folder = os.path.dirname(self.ann_file) if self._own_folder else self.data_prefix["img"]
        infos: dict = {}
        for image in content["images"]:
            path = os.path.join(folder, image["file_name"])
            if "width" not in image or "height" not in image:
                height, width = imread(path).shape[:2]
            else:
                height, width = int(image["height"]), int(image["width"])
            infos[image["id"]] = {
                "img_path": path, "img_id": image["id"], "height": height, "width": width, "instances": [],
            }  # fmt: skip
        for annotation in content["annotations"]:
            info = infos[annotation["image_id"]]
            label = label_of.get(annotation["category_id"])
            if label is None:
                self.skipped["boxes (classes not chosen)"] += 1
                continue
            x, y, w, h = map(float, annotation["bbox"])
            box = self._box((x, y, x + w, y + h), info["width"], info["height"])
            if box is not None:
                ignore = int(bool(annotation.get("iscrowd", 0)) or bool(annotation.get("ignore", 0)))
                info["instances"].append({"bbox": box, "bbox_label": label, "ignore_flag": ignore})
        return list(infos.values())


@DATASETS.register_module()
class VOCDetDataset(PhotoDataset):
    """A Pascal VOC folder: JPEGImages, Annotations/*.xml and a list of names such as ImageSets/Main/train.txt.

    `data_root` is the folder that holds the three (VOCdevkit/VOC2007, for example), `ann_file` the list, relative to
    it. Without `metainfo=dict(classes=...)` the classes are VOC's twenty if all names in Annotations are among them,
    and else the names found there, sorted. Coordinates count from 1 in the XML and from 0 here. Objects marked
    difficult get ignore_flag 1.
    """

    def __init__(self, *, data_root: str, ann_file: str, **kwargs) -> None:
        super().__init__(data_root=str(data_root), ann_file=str(ann_file), **kwargs)

    def load_data_list(self) -> list[dict]:
        """Parse the list and its XML files into mmdet's data list."""
        root = Path(self.data_root)
        try:
            lines = Path(self.ann_file).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DatasetError(f"{self.ann_file}: {_reason(error)}") from None
        names = [self._listed(root, line.strip()) for line in lines if line.strip()]
        if "classes" not in self._metainfo:
            self._metainfo["classes"] = voc_classes(root / "Annotations")
        # VOCMetric chooses its rules by this
        year = next((year for year in ("VOC2007", "VOC2012") if year in str(root)), None)
        self._metainfo.setdefault("dataset_type", year)
        label_of = {name: i for i, name in enumerate(self._metainfo["classes"])}
        infos = [self._parse(root, name, label_of) for name in names]
        if self.skipped["boxes (classes not chosen)"] and not any(info["instances"] for info in infos):
            raise DatasetError(
                f"{self.ann_file}: no box has one of the classes {tuple(label_of)}; the annotations have "
                f"{voc_classes(root / 'Annotations')}"
            )
        return infos

    @staticmethod
    def _listed(root: Path, line: str) -> str:
        """The name in a line of a list; in a class's own list -1, 0 or 1 follows it."""
        name, _, flag = line.rpartition(" ")
        if flag in ("-1", "0", "1") and not (root / "Annotations" / f"{line}.xml").exists():
            return name.strip()
        return line

    def _parse(self, root: Path, name: str, label_of: dict[str, int]) -> dict:
        path = root / "Annotations" / f"{name}.xml"
        tree = _read_xml(path)
        photo = next(
            (file for suffix in PHOTO_SUFFIXES for ending in (suffix, suffix.upper())
             if (file := root / "JPEGImages" / (name + ending)).exists()),
            root / "JPEGImages" / f"{name}.jpg",
        )  # fmt: skip
        try:
            size = tree.find("size")
            if size is None:
                height, width = imread(photo).shape[:2]
            else:
                height, width = int(size.findtext("height")), int(size.findtext("width"))
            instances = []
            for thing in tree.iter("object"):
                label = label_of.get((thing.findtext("name") or "").strip())
                if label is None:
                    self.skipped["boxes (classes not chosen)"] += 1
                    continue
                corners = thing.find("bndbox")
                raw = [float(corners.findtext(key)) - 1 for key in ("xmin", "ymin", "xmax", "ymax")]
                box = self._box(raw, width, height)
                if box is not None:
                    ignore = int(thing.findtext("difficult") or 0)
                    instances.append({"bbox": box, "bbox_label": label, "ignore_flag": ignore})
        except DatasetError:
            raise
        except (TypeError, ValueError, AttributeError):
            raise DatasetError(
                f"{path}: needs size/width, size/height and for each object name and bndbox/xmin, ymin, xmax, ymax"
            ) from None
        return {"img_path": str(photo), "img_id": name, "height": height, "width": width, "instances": instances}


def read_coco(path: str | os.PathLike) -> dict:
    """Read a COCO-format detection JSON and check its structure.

    Returns:
        The JSON's content. annotations may be an empty list, images too; categories not.

    Raises:
        DatasetError: not there, not JSON, a missing key, an unknown or doubled id, a box that is not four numbers.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # some programs on Windows begin with a mark
            content = json.load(file)
    except OSError as error:
        raise DatasetError(f"{path}: {_reason(error)}") from None
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: not a JSON file (it is not UTF-8 text)") from None
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: a COCO JSON is an object with images, annotations, categories, not a list")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DatasetError(f"{path}: needs a list named {key!r}; its keys are {sorted(content)}")
    for key, fields in (
        ("images", ("id", "file_name")),
        ("categories", ("id", "name")),
        ("annotations", ("image_id", "category_id", "bbox")),
    ):
        for i, item in enumerate(content[key]):
            absent = [field for field in fields if not isinstance(item, dict) or field not in item]
            if absent:
                found = sorted(item) if isinstance(item, dict) else type(item).__name__
                raise DatasetError(f"{path}: {key}[{i}] has no {absent[0]!r}; it has {found}")
    for i, image in enumerate(content["images"]):
        for field in ("width", "height"):
            if field in image and not (isinstance(image[field], int) and image[field] > 0):
                raise DatasetError(f"{path}: images[{i}] has {field} {image[field]!r}; it must be a positive integer")
    if not content["categories"]:
        raise DatasetError(f"{path}: 'categories' is empty, so there is nothing to detect")
    for key, field in (("images", "id"), ("categories", "id"), ("categories", "name")):
        count = Counter(item[field] for item in content[key])
        double = [value for value, times in count.items() if times > 1]
        if double:
            raise DatasetError(f"{path}: {key} have the {field} {double[0]!r} more than once")
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for i, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] not in images:
            raise DatasetError(f"{path}: annotations[{i}] is of image id {annotation['image_id']!r}, not in 'images'")
        if annotation["category_id"] not in categories:
            known = sorted(categories, key=str)
            known = f"{known[:10]}{' ...' if len(known) > 10 else ''}"
            raise DatasetError(
                f"{path}: annotations[{i}] has category id {annotation['category_id']!r}, not among the ids in "
                f"'categories', {known}"
            )
        box = annotation["bbox"]
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(value, (int, float)) and math.isfinite(value) for value in box)
        ):
            raise DatasetError(f"{path}: annotations[{i}] has bbox {box!r}; it must be four numbers [x, y, w, h]")
    return content


def coco_classes(ann_file: str | os.PathLike) -> tuple[str, ...]:
    """Names of a COCO JSON's categories, in its order: what `metainfo=dict(classes=...)` takes."""
    return tuple(category["name"] for category in read_coco(ann_file)["categories"])


def voc_classes(annotations: str | os.PathLike) -> tuple[str, ...]:
    """VOC's twenty classes if all names in this folder of XML files are among them, and else those names, sorted."""
    files = sorted(file for file in Path(annotations).glob("*.xml") if not is_hidden(file.name))
    if not files:
        raise DatasetError(f"{annotations}: no XML files there; expected a Pascal VOC folder's Annotations")
    found = {(thing.findtext("name") or "").strip() for file in files for thing in _read_xml(file).iter("object")}
    found.discard("")
    if not found:
        raise DatasetError(f"{annotations}: its {len(files)} XML files name no object")
    return VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))


def _file_problem(path: str) -> str | None:
    """What is wrong with a photo's file as far as its first and last bytes tell, without decoding it."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 64, 0))
            tail = file.read()
            if not head:
                return "empty file"
            if head[:2] == b"\xff\xd8" and b"\xff\xd9" not in tail or head[:4] == b"\x89PNG" and b"IEND" not in tail:
                file.seek(0)
                return "truncated" if is_truncated(file.read()) else None
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return _reason(error)
    return None


def _read_xml(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()
    except OSError as error:
        raise DatasetError(f"{path}: {_reason(error)}") from None
    except ET.ParseError as error:
        raise DatasetError(f"{path}: not valid XML ({error})") from None


def _reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
