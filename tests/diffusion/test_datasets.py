"""Data sets of pictures and videos: what they read, in which classes, and what they refuse."""

import io
import json
import tarfile
import zipfile

import cv2
import numpy as np
import pytest
from PIL import Image

from mambavision.diffusion.datasets import (
    CifarArchive,
    ClassFolder,
    ImageArchive,
    ImageArrays,
    ImageFolder,
    VideoFolder,
    cover,
    to_rgb,
)
from mambavision.diffusion.outputs import write_gif
from mambavision.engine.photos import DatasetError
from mambavision.engine.video import write_video
from tests.diffusion.drawn import write_photo

BLUE, RED = (250, 10, 10), (10, 10, 250)  # BGR


@pytest.fixture
def classes(tmp_path):
    for i, (name, colour) in enumerate((("zebra", BLUE), ("ape", RED), ("ape", RED))):
        write_photo(tmp_path / "train" / name / f"{i}.png", colour)
    (tmp_path / "train/ape/notes.txt").write_text("no photo")
    return tmp_path


def test_class_folder_has_rgb_pictures_and_sorted_classes(classes):
    dataset = ClassFolder(classes / "train", (6, 4))
    assert (dataset.size, dataset.channels, dataset.class_names) == ((6, 4), 3, ("ape", "zebra"))
    assert [dataset[i].label for i in range(len(dataset))] == [0, 0, 1]
    frames = dataset[2].frames
    assert frames.shape == (1, 3, 6, 4) and frames.dtype == np.uint8 and frames[0, :, 3, 2].tolist() == [10, 10, 250]


def test_image_folder_has_no_classes_and_may_be_gray(classes):
    dataset = ImageFolder(classes, (8, 8), gray=True)
    assert len(dataset) == 3 and dataset.class_names == () and dataset[0].frames.shape == (1, 1, 8, 8)
    with pytest.raises(DatasetError, match="3 items lie in no class folder|1 items"):
        write_photo(classes / "train/alone.png")
        ClassFolder(classes / "train", (8, 8))


@pytest.mark.parametrize("suffix", [".tar.xz", ".tar", ".zip"])
def test_archives_are_as_their_folders(classes, suffix):
    path = classes / f"pack{suffix}"
    files = sorted((classes / "train").rglob("*.*"))
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(classes))
    else:
        with tarfile.open(path, "w:xz" if suffix.endswith("xz") else "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(classes))
    ours, folder = ImageArchive(path, (8, 8), folder="train"), ClassFolder(classes / "train", (8, 8))
    assert ours.class_names == folder.class_names and len(ours) == len(folder)
    for i in range(3):
        assert ours[i].label == folder[i].label and np.array_equal(ours[i].frames, folder[i].frames)
    with pytest.raises(DatasetError, match="no photos in test"):
        ImageArchive(path, (8, 8), folder="test")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DatasetError):
        ImageArchive(path, (8, 8), folder="train")


def _zipped(root, path, **options):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root))
    return ImageArchive(path, (8, 8), **options)


def test_hidden_folders_and_files_are_no_classes(classes):
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/ape/._1.png", "ape/._1.png", "ape/.old/0.png"):
        write_photo(classes / "train" / name)
    for dataset in (ClassFolder(classes / "train", (8, 8)), _zipped(classes / "train", classes / "mac.zip")):
        assert dataset.class_names == ("ape", "zebra") and dataset.labels == [0, 0, 1] and len(dataset) == 3


def test_a_folder_may_itself_be_hidden(classes):
    (classes / "train").rename(classes / ".train")
    assert len(ClassFolder(classes / ".train", (8, 8))) == 3
    assert len(_zipped(classes, classes / "all.zip", folder=".train")) == 3


@pytest.mark.parametrize("depth", [1, 2])
def test_classes_may_lie_in_folders_that_hold_all(classes, depth):
    top = classes / ("mine" if depth == 1 else "mine/photos")
    top.mkdir(parents=True)
    (classes / "train").rename(top / "train")
    write_photo(classes / "mine/__MACOSX/0.png")
    made = ClassFolder(classes / "mine", (8, 8)), _zipped(classes / "mine", classes / "mine.zip")
    for dataset in made:
        assert dataset.class_names == ("ape", "zebra") and dataset.labels == [0, 0, 1]
    write_photo(top / "train/alone.png")
    where = "train" if depth == 1 else "photos/train"
    with pytest.raises(DatasetError, match=f"mine/{where}: 1 items lie in no class folder"):
        ClassFolder(classes / "mine", (8, 8))
    with pytest.raises(DatasetError, match=f"mine.zip/{where}: 1 items lie in no class folder"):
        _zipped(classes / "mine", classes / "mine.zip")


def test_one_class_is_a_class(classes):
    write_photo(classes / "one/ape/0.png")
    assert ClassFolder(classes / "one", (8, 8)).class_names == ("ape",)
    assert _zipped(classes / "one", classes / "one.zip").class_names == ("ape",)


def _cifar(path, *, fine, names=b"cat\ndog\ncow\n\n"):
    rng = np.random.default_rng(0)
    records = {}
    with tarfile.open(path, "w:gz") as archive:

        def add(name, data):
            info = tarfile.TarInfo(f"cifar/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for name in ("train.bin", "test.bin") if fine else ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"):
            pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            labels = rng.integers(0, 3, (4, 2 if fine else 1), dtype=np.uint8)
            records[name] = labels[:, -1], pixels.reshape(4, 3, 32, 32)
            add(name, np.hstack([labels, pixels]).tobytes())
        add("fine_label_names.txt" if fine else "batches.meta.txt", names)
    return records


@pytest.mark.parametrize("fine", [False, True], ids=["cifar10", "cifar100"])
def test_cifar_archive(tmp_path, fine):
    path = tmp_path / "cifar.tar.gz"
    records = _cifar(path, fine=fine)
    train, test = CifarArchive(path), CifarArchive(path, "test", flip=False)
    assert train.class_names == ("cat", "dog", "cow") and len(train) == (4 if fine else 8) and len(test) == 4
    labels, pixels = records["test.bin" if fine else "test_batch.bin"]
    assert [test[i].label for i in range(4)] == labels.tolist()
    assert np.array_equal(test[3].frames[0], pixels[3]) and train.flip and not test.flip
    with pytest.raises(DatasetError, match="not an archive of CIFAR's binary version"):
        with tarfile.open(tmp_path / "other.tar", "w") as archive:
            archive.add(path, "x")
        CifarArchive(tmp_path / "other.tar")


@pytest.mark.parametrize("fine", [False, True], ids=["cifar10", "cifar100"])
def test_what_no_cifar_archive_has_is_refused(tmp_path, fine):
    path = tmp_path / "cifar.tar.gz"
    records = _cifar(path, fine=fine, names=b"cat\n")
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        CifarArchive(path, "val")
    label = records["test.bin" if fine else "test_batch.bin"][0].max()
    with pytest.raises(DatasetError, match=f"cifar.tar.gz: a picture has label {label}, but .* for 1 classes"):
        CifarArchive(path, "test")


def test_arrays(tmp_path):
    photos = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", photos)
    np.save(tmp_path / "labels.npy", np.array([1, 0, 1], np.uint8))
    (tmp_path / "names.json").write_text(json.dumps(["ape", "bee"]))
    files = [tmp_path / name for name in ("photos.npy", "labels.npy", "names.json")]
    dataset = ImageArrays(*files, bgr=True)
    assert (dataset.size, dataset.channels, dataset.class_names) == ((4, 5), 3, ("ape", "bee"))
    assert dataset[2].label == 1 and np.array_equal(dataset[2].frames[0].transpose(1, 2, 0), photos[2][..., ::-1])
    assert ImageArrays(files[0]).class_names == ()
    bees = ImageArrays(*files, classes=["bee"])
    assert bees.class_names == ("bee",) and [bees[i].label for i in range(len(bees))] == [0, 0]
    assert np.array_equal(bees[1].frames[0].transpose(1, 2, 0), photos[2])
    turned = ImageArrays(*files, classes=["bee", "ape"])
    assert [turned[i].label for i in range(3)] == [0, 1, 0]
    with pytest.raises(DatasetError, match="names.json: no class 'cow' among its 2"):
        ImageArrays(*files, classes=["ape", "cow"])
    np.save(files[1], np.array([1, 0], np.uint8))
    with pytest.raises(DatasetError, match="2 labels from 0 to 1, expected one of 0 to 1 .* each of 3 pictures"):
        ImageArrays(*files)
    for labels, found in (([0, 1, -1], "-1 to 1"), ([0, 1, 2], "0 to 2"), ([], "0 to 0")):
        np.save(files[1], np.array(labels, np.int64))
        with pytest.raises(DatasetError, match=f"{len(labels)} labels from {found}, expected one of 0 to 1 "):
            ImageArrays(*files)
    np.save(files[0], photos.astype(np.float32))
    with pytest.raises(DatasetError, match=r"holds float32 \(3, 4, 5, 3\), expected uint8"):
        ImageArrays(files[0])


def test_videos_of_files_gifs_and_folders(tmp_path):
    for i in range(6):
        write_photo(tmp_path / f"walk/frames/{i:02}.png", (40 * i, 40 * i, 40 * i), (16, 16))
    pages = [Image.new("RGB", (16, 16), (0, 50 * i, 0)) for i in range(4)]
    pages[0].save(tmp_path / "walk/b.gif", save_all=True, append_images=pages[1:], duration=100)
    (tmp_path / "run").mkdir()
    with write_video(tmp_path / "run/c.mp4", height=32, width=32, rate=10) as append:
        for i in range(8):
            append(np.full((32, 32, 3), 30 * i, np.uint8))
    dataset = VideoFolder(tmp_path, (4, 8, 8), classes=True)
    assert dataset.class_names == ("run", "walk") and [path.name for path in dataset.paths] == [
        "c.mp4",
        "b.gif",
        "frames",
    ]
    shapes = [dataset[i].frames.shape for i in range(3)]
    assert shapes == [(8, 3, 8, 8), (4, 3, 8, 8), (6, 3, 8, 8)] and [dataset[i].label for i in range(3)] == [0, 1, 1]
    assert dataset[2].frames[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160, 200]
    (tmp_path / "mine").mkdir()
    for name in ("walk", "run"):
        (tmp_path / name).rename(tmp_path / "mine" / name)
    dataset = VideoFolder(tmp_path, (4, 8, 8), classes=True)
    assert dataset.class_names == ("run", "walk") and dataset.labels == [0, 1, 1]
    np.testing.assert_allclose(dataset[0].frames[:, 0, 4, 4], np.arange(8) * 30, atol=6)
    assert dataset[1].frames[3, :, 0, 0].tolist() == pytest.approx([0, 150, 0], abs=3)
    strided = VideoFolder(tmp_path, (3, 8, 8), stride=2)
    assert strided[2].frames[:, 0, 0, 0].tolist() == [0, 80, 160]
    with pytest.raises(DatasetError, match="b.gif: 2 frames at stride 2, a clip has 3"):
        strided[1]


def test_frames_come_in_the_order_of_their_numbers_and_hidden_files_are_left_out(tmp_path):
    for i in range(12):
        write_photo(tmp_path / f"clip/frame{i}.png", (20 * i, 20 * i, 20 * i), (16, 16))
    (tmp_path / "clip/._frame0.png").write_bytes(b"of a Macintosh")
    for name in ("._clip.mp4", "__MACOSX/clip.mp4", ".trash/clip.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"of a Macintosh")
    dataset = VideoFolder(tmp_path, (4, 8, 8))
    assert [path.name for path in dataset.paths] == ["clip"]
    assert dataset[0].frames[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]


def test_pictures_are_cut_from_their_middle():
    img = np.zeros((10, 30, 3), np.uint8)
    img[:, 10:20] = 200
    cut = cover(img, 5, 5)
    assert cut.shape == (5, 5, 3) and (cut == 200).all()
    assert cover(img[..., :1], 20, 20).shape == (20, 20, 1)
    assert cover(img, 10, 30) is not None and np.array_equal(cover(img, 10, 30), img)


def test_what_is_transparent_becomes_white():
    img = np.zeros((1, 2, 4), np.uint8)
    img[0, 0] = (0, 0, 255, 255)
    assert to_rgb(img)[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert to_rgb(np.full((2, 2), 513, np.uint16))[0, 0].tolist() == [2, 2, 2]


def test_what_is_transparent_in_a_gif_becomes_white(tmp_path):
    pages = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    for i, page in enumerate(pages):
        page.paste((255, 0, 0, 255), (4 * i, 0, 4 * i + 4, 8))
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], disposal=2)
    clip = VideoFolder(tmp_path, (2, 8, 8))[0].frames
    assert [clip[t, :, 2, x].tolist() for t in (0, 1) for x in (2, 6)] == [
        [255, 0, 0],
        [255, 255, 255],
        [255, 255, 255],
        [255, 0, 0],
    ]


def _arrays_without_names(path):
    np.save(path / "x.npy", np.zeros((1, 2, 2, 3), np.uint8))
    return ImageArrays(path / "x.npy", classes=["ape"])


def _no_array(path):
    (path / "x.npy").touch()
    return ImageArrays(path / "x.npy")


def _float_labels(path):
    np.save(path / "x.npy", np.zeros((1, 2, 2, 3), np.uint8))
    np.save(path / "y.npy", np.zeros(1))
    (path / "names.json").write_text('["ape"]')
    return ImageArrays(path / "x.npy", path / "y.npy", path / "names.json")


def _unknown_zip(path):
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        archive.writestr("a.png", b"0")
    data = bytearray((path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2") + 10] = 77  # a compression that nobody knows
    (path / "a.zip").write_bytes(data)
    return ImageArchive(path / "a.zip", (8, 8))


def _clip_of_photos(path):
    write_photo(path / "a.png", BLUE)
    return ImageFolder(path, (4, 8, 8))


@pytest.mark.parametrize("rate", [5, 8, 10, 24, 30, 60])
def test_a_gif_of_ours_has_its_still_frames_again(tmp_path, rate):
    shades = np.repeat([0, 100, 200, 50], [7, 1, 4, 2]).astype(np.uint8)
    write_gif(tmp_path / "a.gif", shades.repeat(8 * 8 * 3).reshape(-1, 8, 8, 3), rate)
    assert Image.open(tmp_path / "a.gif").n_frames == 4  # Pillow writes equal frames once
    assert VideoFolder(tmp_path, (14, 8, 8))[0].frames[:, 0, 0, 0].tolist() == shades.tolist()


def test_frames_of_a_gif_that_say_no_duration_come_once(tmp_path):
    pages = [Image.new("L", (8, 8), shade) for shade in (0, 100, 200)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:])
    assert VideoFolder(tmp_path, (3, 8, 8))[0].frames.shape[0] == 3


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.95])
def test_a_gif_that_is_cut_short_is_named(tmp_path, kept):
    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    path = tmp_path / "a.gif"
    write_gif(path, frames)
    assert VideoFolder(tmp_path, (6, 8, 8))[0].frames.shape[0] == 6
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DatasetError, match="a.gif: "):
        VideoFolder(tmp_path, (6, 8, 8))[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: ImageFolder(path / "gone", (8, 8)), FileNotFoundError, "gone"),
        (lambda path: ImageFolder(path, (8, 8)), DatasetError, "no photos in this folder"),
        (lambda path: ImageFolder(path, (8, 0)), ValueError, "size must be at least 1 pixel"),
        (lambda path: VideoFolder(path, (2, 8, 8)), DatasetError, "no videos in this folder"),
        (lambda path: VideoFolder(path / "gone", (2, 8, 8)), FileNotFoundError, "gone"),
        (lambda path: VideoFolder(path, (8, 8)), ValueError, "frames, height, width"),
        (lambda path: ImageArchive(path / "gone.tar", (8, 8)), FileNotFoundError, "no such archive"),
        (lambda path: ImageArrays(path / "gone.npy"), FileNotFoundError, "gone.npy"),
        (lambda path: ImageArrays(path / "x.npy", labels=path / "y.npy"), ValueError, "come together"),
        (_arrays_without_names, ValueError, "classes: give labels and names"),
        (_no_array, DatasetError, "not a .npy file of numbers"),
        (_float_labels, DatasetError, "expected whole numbers"),
        (_unknown_zip, DatasetError, "not a whole .tar or .zip archive"),
        (_clip_of_photos, ValueError, r"\(height, width\) of pictures, got \(4, 8, 8\)"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        make(tmp_path)


def test_a_broken_photo_is_named(classes):
    path = classes / "train/ape/1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DatasetError, match=r"ape/1.png: truncated photo"):
        ClassFolder(classes / "train", (8, 8))[0]
    assert cv2.imread(str(classes / "train/ape/2.png")) is not None
