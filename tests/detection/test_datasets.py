import mambavision.detection  # noqa: F401  makes mmdet importable

# isort: split
import json
import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate, worker_init_fn
from PIL import Image

from mambavision.detection.datasets import (
    VOC_CLASSES,
    CocoDetDataset,
    DatasetError,
    VOCDetDataset,
    coco_classes,
    read_coco,
    voc_classes,
)
from mambavision.detection.photos import imread, shrink
from tests.conftest import shared

TRAIN = [{"type": "MosaicAffine", "size": 64}, {"type": "HSVGain"}, {"type": "RandomFlip", "prob": 0.5}]
VAL = [{"type": "LoadPhoto"}, {"type": "LetterBox", "size": 64}, {"type": "LoadAnnotations", "with_bbox": True}]
PACK = {"type": "PackDetInputs", "meta_keys": ("img_id", "ori_shape", "scale_factor", "pad_param", "instances")}


def coco(folder: Path, *, boxes=((10, 10, 20, 15),), count: int = 4, **changes) -> Path:
    """Write `count` photos of 60 x 40 with the same boxes and their JSON; `changes` replace parts of the JSON."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": i, "file_name": f"photos/{i}.jpg", "width": 60, "height": 40} for i in range(count)],
        "annotations": [
            {"id": 100 * i + j, "image_id": i, "category_id": 7, "bbox": list(box), "area": box[2] * box[3]}
            for i in range(count)
            for j, box in enumerate(boxes)
        ],
        "categories": [{"id": 7, "name": "cell"}, {"id": 3, "name": "dust"}],
    }
    content.update(changes)
    rng = np.random.default_rng(0)
    for image in content["images"] or ():
        cv2.imwrite(str(folder / image.get("file_name", "photos/0.jpg")), rng.integers(0, 255, (40, 60, 3), np.uint8))
    path = folder / "train.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_own_coco_json_needs_nothing_else(tmp_path):
    ann_file = coco(tmp_path)
    data = DATASETS.build({"type": "CocoDetDataset", "ann_file": str(ann_file), "pipeline": [*TRAIN, PACK]})
    assert data.metainfo["classes"] == ("cell", "dust") == coco_classes(ann_file)
    np.random.seed(0)
    item = data[0]
    assert item["inputs"].shape == (3, 64, 64) and item["inputs"].dtype == torch.uint8
    assert (item["data_samples"].gt_instances.labels == 0).all()


def test_validation_keeps_boxes_in_original_pixels(tmp_path):
    data = CocoDetDataset(ann_file=coco(tmp_path), test_mode=True, pipeline=[*VAL, PACK])
    sample = data[1]["data_samples"]
    assert sample.gt_instances.bboxes.tensor.tolist() == [[10, 10, 30, 25]]
    assert sample.instances[0]["bbox"] == [10, 10, 30, 25] and sample.ori_shape == (40, 60)


def test_classes_are_chosen_by_name(tmp_path):
    ann_file = coco(tmp_path)
    data = CocoDetDataset(ann_file=ann_file, metainfo={"classes": ("dust", "cell")})
    assert data.get_data_info(0)["instances"][0]["bbox_label"] == 1
    with pytest.raises(DatasetError, match="same order") as error:
        CocoDetDataset(ann_file=ann_file, metainfo={"classes": ("dust", "cell")}, test_mode=True)
    one_line(error)
    only = CocoDetDataset(ann_file=ann_file, metainfo={"classes": ("dust",)})
    assert only.skipped["boxes (classes not chosen)"] == 4 and not only.get_data_info(0)["instances"]
    with pytest.raises(DatasetError, match="none of the classes"):
        CocoDetDataset(ann_file=ann_file, metainfo={"classes": ("car",)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": None}, "needs a list named 'images'; its keys are"),
        ({"annotations": None}, "needs a list named 'annotations'"),
        ({"categories": {}}, "needs a list named 'categories'"),
        ({"categories": []}, "'categories' is empty"),
        ({"categories": [{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]}, "id 7 more than once"),
        ({"images": [{"id": 0, "name": "x"}]}, "images[0] has no 'file_name'; it has ['id', 'name']"),
        ({"images": [{"id": 0, "file_name": "a.jpg", "width": "wide"}]}, "width 'wide'"),
        ({"images": [], "annotations": []}, "lists no photos"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "box": [1, 1, 2, 2]}]}, "annotations[0] has no 'bbox'"),
        ({"annotations": [{"image_id": 0, "category_id": 9, "bbox": [1, 1, 2, 2]}]}, "category id 9"),
        ({"annotations": [{"image_id": 44, "category_id": 7, "bbox": [1, 1, 2, 2]}]}, "image id 44"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": [1, 1, 2]}]}, "four numbers"),
        ({"annotations": [{"image_id": 0, "category_id": 7, "bbox": [1, 1, 2, float("nan")]}]}, "four numbers"),
        ({"annotations": ["a"]}, "annotations[0] has no 'image_id'; it has str"),
    ],
)
def test_wrong_json_is_one_line(tmp_path, changes, message):
    with pytest.raises(DatasetError) as error:
        CocoDetDataset(ann_file=coco(tmp_path, **changes))
    assert message in one_line(error) and "train.json" in one_line(error)


@pytest.mark.parametrize(
    "content, message",
    [(b"{'a': 1}", "line 1 column 2"), (b"", "not valid JSON"), (b"\xff\xfe\x00", "not UTF-8"), (b"[]", "not a list")],
)
def test_not_a_coco_json(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DatasetError) as error:
        CocoDetDataset(ann_file=tmp_path / "a.json")
    assert message in one_line(error)


def test_missing_files(tmp_path):
    with pytest.raises(DatasetError, match="no such file") as error:
        CocoDetDataset(ann_file=tmp_path / "nothing.json")
    one_line(error)
    ann_file = coco(tmp_path)
    (tmp_path / "photos" / "2.jpg").unlink()
    with pytest.raises(DatasetError, match=r"2\.jpg: no such photo \(1 of 4 are missing\)") as error:
        CocoDetDataset(ann_file=ann_file)
    one_line(error)


def test_bad_boxes_are_clipped_or_counted(tmp_path):
    boxes = [(-5, 30, 20, 20), (70, 10, 5, 5), (10, 10, 0, 5), (10, 10, 5, -5), (50, 35, 10, 5)]
    data = CocoDetDataset(ann_file=coco(tmp_path, boxes=boxes, count=2))
    assert [instance["bbox"] for instance in data.get_data_info(0)["instances"]] == [[0, 30, 15, 40], [50, 35, 60, 40]]
    assert data.skipped == {"boxes (outside the photo)": 2, "boxes (no area)": 4}


def test_summary_line(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("mambavision.detection.datasets.print_log", lambda text, **_: lines.append(text))
    ann_file = coco(tmp_path, boxes=[(10, 10, 5, 5), (10, 10, 0, 5)])
    truncate(tmp_path / "photos" / "3.jpg")
    CocoDetDataset(ann_file=ann_file)
    assert lines == [f"{ann_file}: 3 photos, 3 boxes, 2 classes; skipped 4 boxes (no area), 1 photos (truncated)"]


def test_empty_annotations_train_as_background(tmp_path):
    data = CocoDetDataset(ann_file=coco(tmp_path, annotations=[]), pipeline=[*TRAIN, PACK])
    item = data[0]
    assert len(data) == 4 and len(item["data_samples"].gt_instances) == 0
    filtered = {"filter_empty_gt": True}
    with pytest.raises(DatasetError, match="none of its 4 photos can be used"):
        CocoDetDataset(ann_file=coco(tmp_path, annotations=[]), filter_cfg=filtered)


def test_crowds_are_flagged(tmp_path):
    annotation = {"image_id": 0, "category_id": 7, "bbox": [1, 1, 9, 9], "iscrowd": 1}
    data = CocoDetDataset(ann_file=coco(tmp_path, annotations=[annotation]))
    assert data.photo(0).ignore.tolist() == [True]


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_truncated_photo_is_skipped_in_training_and_an_error_in_test(tmp_path, cache):
    ann_file = coco(tmp_path)
    truncate(tmp_path / "photos" / "1.jpg")
    (tmp_path / "photos" / "2.jpg").write_bytes(b"")
    data = CocoDetDataset(ann_file=ann_file, cache=cache, pipeline=TRAIN)
    assert len(data) == 2 and data.skipped == {"photos (truncated)": 1, "photos (empty file)": 1}
    with pytest.raises(DatasetError, match=r"1\.jpg: truncated") as error:
        CocoDetDataset(ann_file=ann_file, cache=cache, test_mode=True)
    one_line(error)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_undecodable_and_mismatched_photos(tmp_path, cache):
    ann_file = coco(tmp_path)
    (tmp_path / "photos" / "0.jpg").write_bytes(b"this is no photo")
    cv2.imwrite(str(tmp_path / "photos" / "1.jpg"), np.zeros((41, 60, 3), np.uint8))
    data = CocoDetDataset(ann_file=ann_file, cache=cache, pipeline=TRAIN)
    np.random.seed(0)
    assert {data[i]["img"].shape for i in range(len(data))} == {(64, 64, 3)}
    if cache == "ram":
        assert len(data) == 2 and data.skipped == {"photos (cannot be read)": 2}
    tests = [r"0\.jpg: not a photo", r"1\.jpg: the photo is 60x41, its annotation says 60x40"]
    for index, message in enumerate(tests):
        with pytest.raises(DatasetError, match=message) as error:
            CocoDetDataset(ann_file=ann_file, test_mode=True, pipeline=VAL)[index]
        one_line(error)


def test_all_photos_bad(tmp_path):
    ann_file = coco(tmp_path, count=2)
    for i in range(2):
        truncate(tmp_path / "photos" / f"{i}.jpg")
    with pytest.raises(DatasetError, match="none of its 2 photos can be used") as error:
        CocoDetDataset(ann_file=ann_file)
    one_line(error)


def test_size_may_be_missing_in_json(tmp_path):
    data = CocoDetDataset(ann_file=coco(tmp_path, images=[{"id": 0, "file_name": "photos/0.jpg"}], annotations=[]))
    assert (data.get_data_info(0)["width"], data.get_data_info(0)["height"]) == (60, 40)


@pytest.mark.parametrize("frame", ["displayed", "stored"])
def test_exif_rotation(tmp_path, frame):
    """A white square in the stored photo's top right corner is in the bottom right one as displayed (turned by 90)."""
    img = np.zeros((40, 60, 3), np.uint8)
    img[:10, 50:] = 255
    photo = Image.fromarray(img)
    exif = photo.getexif()
    exif[0x0112] = 6
    width, height, box = (60, 40, [50, 0, 10, 10]) if frame == "stored" else (40, 60, [30, 50, 10, 10])
    ann_file = coco(
        tmp_path,
        images=[{"id": 0, "file_name": "photos/0.jpg", "width": width, "height": height}],
        annotations=[{"image_id": 0, "category_id": 7, "bbox": box}],
    )
    photo.save(tmp_path / "photos" / "0.jpg", exif=exif)
    loaded = CocoDetDataset(ann_file=ann_file).photo(0)
    x1, y1, x2, y2 = loaded.boxes[0].astype(int)
    assert loaded.img.shape == (height, width, 3)
    assert loaded.img[y1:y2, x1:x2].mean() > 240 and loaded.img.astype(int).sum() < 1.2 * 300 * 255


def test_cache_gives_the_same_photos_and_is_shared_by_workers(tmp_path):
    ann_file = coco(tmp_path)
    plain = CocoDetDataset(ann_file=ann_file, photo_side=30)
    cached = CocoDetDataset(ann_file=ann_file, photo_side=30, cache="ram", pipeline=[*TRAIN, PACK])
    for i in range(4):
        a, b = plain.photo(i), cached.photo(i)
        assert np.array_equal(a.img, b.img) and a.factor == b.factor == 0.5
        assert a.img.shape == (20, 30, 3) and a.boxes.tolist() == [[5, 5, 15, 12.5]] == b.boxes.tolist()
    for file in (tmp_path / "photos").iterdir():
        file.unlink()  # whoever still reads files fails
    loader = torch.utils.data.DataLoader(
        cached,
        batch_size=2,
        num_workers=2,
        collate_fn=pseudo_collate,
        multiprocessing_context=multiprocessing.get_context("fork"),
        worker_init_fn=lambda worker: worker_init_fn(worker, 2, 0, 5),
    )
    first, second = ([torch.stack(batch["inputs"]) for batch in loader] for _ in range(2))
    assert [batch.shape for batch in first] == [(2, 3, 64, 64)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cache_that_does_not_fit_is_refused(tmp_path):
    huge = [{"id": i, "file_name": "photos/0.jpg", "width": 10**6, "height": 10**5} for i in range(4)]
    with pytest.raises(DatasetError, match=r'cache="ram" needs \d+\.\d GiB for 4 photos') as error:
        CocoDetDataset(ann_file=coco(tmp_path, images=huge, annotations=[]), cache="ram")
    one_line(error)


def test_subset_keeps_its_photos(tmp_path):
    data = CocoDetDataset(ann_file=coco(tmp_path), cache="ram")
    assert np.array_equal(data.get_subset([2]).photo(0).img, data.photo(2).img)


# photos


@pytest.mark.parametrize(
    "pixels, expected",
    [
        (np.full((5, 7), 200, np.uint8), 200),
        (np.full((5, 7), 200 * 256 + 9, np.uint16), 200),
        (np.full((5, 7, 3), 200 * 256, np.uint16), 200),
        (np.full((5, 7, 4), (200, 200, 200, 255), np.uint8), 200),
        (np.full((5, 7, 4), (200, 200, 200, 0), np.uint8), 114),
        (np.full((5, 7, 4), (51200, 51200, 51200, 65535), np.uint16), 200),
        (np.full((1, 1, 3), 200, np.uint8), 200),
    ],
)
def test_imread_gives_bgr_bytes(tmp_path, pixels, expected):
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), pixels)
    img = imread(path)
    assert img.dtype == np.uint8 and img.shape == (*pixels.shape[:2], 3) and img.flags.c_contiguous
    assert (img == expected).all()


def test_imread_order_is_bgr(tmp_path):
    Image.new("RGB", (4, 3), (250, 0, 0)).save(tmp_path / "a.png")
    assert imread(tmp_path / "a.png")[0, 0].tolist() == [0, 0, 250]


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png")])
def test_imread_other_modes(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (9, 5), (255, 255, 255)).convert(mode).save(path)
    assert imread(path).shape == (5, 9, 3) and (imread(path) > 250).all()


def test_imread_large(tmp_path):
    path = tmp_path / "large.jpg"
    cv2.imwrite(str(path), np.full((6000, 8000, 3), 90, np.uint8))
    img = imread(path)
    assert img.shape == (6000, 8000, 3)
    small, factor = shrink(img, 640)
    assert small.shape == (480, 640, 3) and factor == 0.08


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = coco(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_coco(path)["images"]) == 4


# Pascal VOC


def voc(folder: Path, *, objects: str | None = None, size: str | None = None, names=("a", "b")) -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>31</xmax><ymax>16</ymax></bndbox>"
    if objects is None:
        objects = (
            f"<object><name>wasp</name><difficult>1</difficult>{box}</object><object><name>ant</name>{box}</object>"
        )
    if size is None:
        size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
    for name in names:
        cv2.imwrite(str(folder / "JPEGImages" / f"{name}.jpg"), np.zeros((40, 60, 3), np.uint8))
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(names) + "\n\n")
    return folder


def voc_data(folder: Path, **options) -> VOCDetDataset:
    return VOCDetDataset(data_root=folder, ann_file="ImageSets/Main/train.txt", **options)


def test_voc_folder(tmp_path):
    data = voc_data(voc(tmp_path), pipeline=[*TRAIN, PACK])
    assert data.metainfo["classes"] == ("ant", "wasp") and len(data) == 2
    photo = data.photo(0)
    assert photo.boxes.tolist() == [[10, 5, 30, 15]] * 2
    assert photo.labels.tolist() == [1, 0] and photo.ignore.tolist() == [True, False]
    assert data[0]["inputs"].shape == (3, 64, 64)


def test_voc_classes_are_the_twenty_where_they_fit(tmp_path):
    objects = (
        "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
    )
    folder = voc(tmp_path / "VOC2007", objects=objects)
    (folder / "Annotations/._a.xml").write_bytes(b"\0a Mac's")
    data = voc_data(folder)
    assert data.metainfo["classes"] == VOC_CLASSES and data.metainfo["dataset_type"] == "VOC2007"
    assert data.photo(0).labels.tolist() == [VOC_CLASSES.index("dog")]


def test_voc_size_may_be_missing_and_suffix_may_differ(tmp_path):
    folder = voc(tmp_path, size="")
    (folder / "JPEGImages" / "a.jpg").rename(folder / "JPEGImages" / "a.JPG")
    assert voc_data(folder).photo(0).img.shape == (40, 60, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objects": "<object><name>ant</name></object>"}, "bndbox/xmin"),
        ({"objects": "<object><name>ant</name><bndbox><xmin>x</xmin></bndbox></object>"}, "bndbox/xmin"),
        ({"size": "<size><width>60</width></size>"}, "size/height"),
        ({"objects": "<object>"}, "not valid XML"),
        ({"objects": ""}, "name no object"),
    ],
)
def test_wrong_voc_is_one_line(tmp_path, options, message):
    with pytest.raises(DatasetError) as error:
        voc_data(voc(tmp_path, **options))
    assert message in one_line(error)


def test_voc_lists_of_a_class_and_names_with_spaces(tmp_path):
    folder = voc(tmp_path, names=("a", "a dog", "photo 1"))
    (folder / "ImageSets/Main/train.txt").write_text("\ufeffa  1\na dog -1\nphoto 1\n")
    assert [info["img_id"] for info in voc_data(folder).load_data_list()] == ["a", "a dog", "photo 1"]


def test_voc_missing_files(tmp_path):
    folder = voc(tmp_path)
    (folder / "Annotations" / "b.xml").unlink()
    with pytest.raises(DatasetError, match=r"b\.xml: no such file"):
        voc_data(folder)
    (folder / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DatasetError, match=r"train\.txt: no such file"):
        voc_data(folder)
    with pytest.raises(DatasetError, match="no XML files there"):
        voc_classes(tmp_path / "nowhere")


def test_voc_empty_list_and_foreign_classes(tmp_path):
    with pytest.raises(DatasetError, match="no box has one of the classes"):
        voc_data(voc(tmp_path), metainfo={"classes": ("car",)})
    with pytest.raises(DatasetError, match="lists no photos"):
        (tmp_path / "ImageSets/Main/train.txt").write_text("")
        voc_data(tmp_path)


def test_bccd():
    counts = {"train": (205, 1), "val": (87, 1), "test": (72, 0)}
    for split, (photos, empty) in counts.items():
        data = VOCDetDataset(data_root=shared("data", "bccd"), ann_file=f"ImageSets/Main/{split}.txt")
        assert data.metainfo["classes"] == ("Platelets", "RBC", "WBC")
        assert len(data) == photos and data.skipped.get("boxes (no area)", 0) == empty
    data = VOCDetDataset(
        data_root=shared("data", "bccd"), ann_file="ImageSets/Main/test.txt", test_mode=True, pipeline=[*VAL, PACK]
    )
    assert all(data[i]["inputs"].shape == (3, 64, 64) for i in range(0, 72, 9))


def test_tinycoco():
    root = shared("data", "tinycoco")
    data = CocoDetDataset(
        data_root=str(root),
        ann_file="annotations/instances_train2017.json",
        data_prefix={"img": "images/train2017"},
        photo_side=64,
        cache="ram",
        pipeline=[*TRAIN, PACK],
    )
    assert len(data) == 32 and len(data.metainfo["classes"]) == 80 and data.metainfo["classes"][79] == "toothbrush"
    flags = [instance["ignore_flag"] for i in range(32) for instance in data.get_data_info(i)["instances"]]
    assert len(flags) == 288 and sum(flags) == 4
    np.random.seed(0)
    assert data[3]["inputs"].shape == (3, 64, 64)
