import cv2
import numpy as np
import pytest
from PIL import Image

from mambavision.engine.photos import DatasetError, decode_unchanged, find_photos, imread_unchanged, read_all


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_truncated_photos_are_refused(tmp_path, suffix, left):
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))
    data = path.read_bytes()
    assert imread_unchanged(path).shape == (80, 80, 3)
    path.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(DatasetError, match="truncated") as error:
        imread_unchanged(path)
    assert "\n" not in str(error.value)
    path.write_bytes(data + b"\0" * 500)  # trailing bytes are harmless
    if suffix == "jpg":
        assert imread_unchanged(path).shape == (80, 80, 3)


@pytest.mark.parametrize("content, message", [(b"", "empty file"), (b"hello", "not a photo"), (None, "no such file")])
def test_what_is_no_photo_is_named(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as error:
        imread_unchanged(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(DatasetError, match="cannot be read"):
        imread_unchanged(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_and_bits_stay(tmp_path, dtype, channels):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (5, 7, channels), dtype)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    read = imread_unchanged(tmp_path / "a.png")
    assert read.dtype == dtype and np.array_equal(read, pixels[..., 0] if channels == 1 else pixels)
    Image.new("L", (9, 5), 7).save(tmp_path / "gray.jpg")
    assert imread_unchanged(tmp_path / "gray.jpg").shape == (5, 9)


def test_links_to_folders_are_followed_and_links_to_nowhere_are_missing_photos(tmp_path):
    for name in ("far/cat/a.jpg", "far/.deep/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "dog.jpg").symlink_to(tmp_path / "gone.jpg")
    (photos / "loop.jpg").symlink_to(photos / "loop.jpg")
    (photos / "cats").symlink_to(tmp_path / "far")
    (photos / "self").symlink_to(photos)
    (photos / "up").symlink_to("..")
    (tmp_path / "far/cat/back").symlink_to(photos)  # which holds the link to far
    assert [str(relative) for _, relative in find_photos(photos)] == ["cats/cat/a.jpg", "dog.jpg", "loop.jpg"]
    for name, reason in (("dog.jpg", "no such file"), ("loop.jpg", "cannot be read")):
        with pytest.raises(DatasetError, match=f"{name}: {reason}"):
            imread_unchanged(photos / name)


def test_photos_of_a_folder(tmp_path):
    hidden = "._b.PNG", "deep/.trash/a.jpg", ".ipynb_checkpoints/a.jpg", "__MACOSX/deep/._a.jpg"
    for name in ("b.PNG", "deep/a.jpg", "notes.txt", "out/a.jpg", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_photos(tmp_path, exclude=tmp_path / "out")
    assert [str(relative) for _, relative in found] == ["b.PNG", "deep/a.jpg"]
    assert find_photos(tmp_path / "b.PNG")[0][1].name == "b.PNG"
    assert find_photos(tmp_path / "deep", exclude=tmp_path)[0][1].name == "a.jpg"  # of an outer folder, nothing
    with pytest.raises(DatasetError, match="choose another folder"):
        find_photos(tmp_path, exclude=tmp_path / "deep" / "..")
    assert find_photos(tmp_path / "deep/.trash")[0][1].name == "a.jpg"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no photos in this folder"):
        find_photos(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such photo"):
        find_photos(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="an empty name is no photo"):
        find_photos("")


def test_all_photos_are_read_and_what_cannot_be_is_counted(tmp_path):
    class Photos:
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, i):
            return decode_unchanged(self.data[i], f"{i}.png")

    data = [cv2.imencode(".png", np.full((4, 4, 3), i, np.uint8))[1].tobytes() for i in range(5)]
    data[1], data[3] = b"", data[3][:30]
    items, skipped = read_all(Photos(data))
    assert [int(item[0, 0, 0]) for item in items] == [0, 2, 4]
    assert skipped[0] == "1.png: empty file" and skipped[1].startswith("3.png: truncated photo")
    with pytest.raises(DatasetError, match="none of 1 clips can be used; 0.png: empty file"):
        read_all(Photos([b""]), "clip")
    with pytest.raises(DatasetError, match="there is none"):
        read_all(Photos([]))
