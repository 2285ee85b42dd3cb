import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from mambavision.engine.photos import DatasetError
from mambavision.restoration import images
from mambavision.restoration.images import (
    PhotoFile,
    check_writable,
    from_array,
    from_pil,
    read_photo_file,
    side_by_side,
    to_array,
    to_pil,
    write_photo_file,
)

RNG = np.random.default_rng(0)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(height=30, width=41, channels=3, dtype=np.uint8):
    coarse = RNG.uniform(0.1, 0.9, (4, 5, channels))
    return (cv2.resize(coarse, (width, height)).reshape(height, width, channels) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels, has_alpha", [(1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_what_is_written_is_read_again(tmp_path, dtype, channels, has_alpha, suffix):
    alpha = smooth(channels=1, dtype=dtype)[..., 0] if has_alpha else None
    photo = PhotoFile(smooth(channels=channels, dtype=dtype), alpha)
    path = tmp_path / "deep" / f"a{suffix}"
    if dtype == np.uint16 and suffix in (".bmp", ".webp"):
        with pytest.raises(DatasetError, match="16 bits a channel"):
            write_photo_file(path, photo)
        assert not path.parent.exists()
        return
    write_photo_file(path, photo)
    read = read_photo_file(path)
    assert read.pixels.dtype == dtype
    np.testing.assert_array_equal(read.pixels, np.broadcast_to(photo.pixels, read.pixels.shape))
    assert read.pixels.shape[2] == channels or (has_alpha and dtype == np.uint16) or suffix in (".bmp", ".webp")
    assert (read.alpha is None) == (alpha is None)
    if has_alpha:
        np.testing.assert_array_equal(read.alpha, alpha)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_profile_and_resolution_are_kept(tmp_path, suffix):
    Image.fromarray(smooth()).save(tmp_path / f"a{suffix}", icc_profile=ICC, dpi=(150, 150))
    photo = read_photo_file(tmp_path / f"a{suffix}")
    write_photo_file(tmp_path / f"b{suffix}", photo)
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.info["icc_profile"] == ICC
        if suffix != ".webp":
            np.testing.assert_allclose([float(n) for n in image.info["dpi"]], 150, atol=0.1)


@pytest.mark.skipif(not hasattr(cv2, "imencodeWithMetadata"), reason="this OpenCV writes no profiles")
def test_profile_of_16_bits_is_kept(tmp_path):
    write_photo_file(tmp_path / "a.png", PhotoFile(smooth(dtype=np.uint16), icc=ICC))
    assert read_photo_file(tmp_path / "a.png").icc == ICC


def test_profile_of_other_channels_is_dropped(tmp_path):
    Image.fromarray(smooth()).convert("CMYK").save(tmp_path / "a.jpg", icc_profile=ICC[:16] + b"CMYK" + ICC[20:])
    photo = read_photo_file(tmp_path / "a.jpg")
    assert photo.pixels.shape == (30, 41, 3) and photo.icc is None


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_come_upright(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(smooth()).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        expected = from_pil(image).pixels
    photo = read_photo_file(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(photo.pixels.astype(int), expected.astype(int), atol=3)
    assert photo.pixels.shape[:2] == ((30, 41) if orientation < 5 else (41, 30))
    write_photo_file(tmp_path / f"b.{suffix}", photo)
    with Image.open(tmp_path / f"b.{suffix}") as image:
        assert image.getexif().get(0x0112, 1) == 1 and image.size == expected.shape[1::-1]
        assert suffix == "tif" or image.getexif()[0x010F] == "Maker"


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_print_colours_become_opaque_rgb(tmp_path, suffix):
    image = Image.fromarray(smooth())
    image.convert("CMYK").save(tmp_path / f"a{suffix}", quality=95)
    photo = read_photo_file(tmp_path / f"a{suffix}")
    assert photo.alpha is None and np.abs(photo.pixels.astype(int) - np.asarray(image)).mean() < 3


def test_jpeg_is_written_well(tmp_path):
    photo = PhotoFile(smooth(64, 64))
    write_photo_file(tmp_path / "a.jpg", photo)
    assert np.abs(read_photo_file(tmp_path / "a.jpg").pixels.astype(int) - photo.pixels).mean() < 1


def test_what_a_format_cannot_hold_is_refused():
    transparent = PhotoFile(smooth(), alpha=smooth(channels=1)[..., 0])
    with pytest.raises(DatasetError, match="JPEG holds no alpha"):
        check_writable("a.jpg", transparent)
    with pytest.raises(DatasetError, match="WEBP holds at most 16383 pixels a side, not 20000"):
        check_writable("a.webp", PhotoFile(np.zeros((2, 5000, 3), np.uint8)), scale=4)
    with pytest.raises(DatasetError, match="photos are written as .jpg"):
        check_writable("a.gif", transparent)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"a\.png: cannot be written \(No space left on device\)"):
        write_photo_file(path, PhotoFile(smooth()))
    with pytest.raises(OSError, match=r"b\.png: cannot be written \("):
        write_photo_file(path / "b.png", PhotoFile(smooth()))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def _png_of_huge_size() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_photos_that_cannot_be_read_are_named(tmp_path):
    cv2.imwrite(str(tmp_path / "f.tif"), np.zeros((4, 4, 3), np.float32))
    (tmp_path / "huge.png").write_bytes(_png_of_huge_size())
    for name, message in (("f.tif", "float32 pixels"), ("huge.png", "not a photo"), ("gone.png", "no such file")):
        with pytest.raises(DatasetError, match=message) as error:
            read_photo_file(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_pillow_images_come_back(mode):
    array = smooth(
        channels={"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}[mode], dtype=np.uint16 if ";" in mode else np.uint8
    )
    image = Image.fromarray(array.squeeze())
    assert image.mode == mode
    image.info["icc_profile"] = ICC
    back = to_pil(from_pil(image))
    assert back.mode == mode and np.array_equal(np.asarray(back), np.asarray(image))
    assert back.info.get("icc_profile") == (ICC if mode.startswith("RGB") else None)
    assert np.array_equal(to_array(from_array(array)), array.squeeze())


def test_other_pillow_images_become_rgb():
    image = Image.fromarray(smooth())
    for mode, channels in (("P", 3), ("1", 1), ("CMYK", 3), ("HSV", 3)):
        assert from_pil(image.convert(mode)).pixels.shape == (30, 41, channels)
    buffer = io.BytesIO()
    image.convert("P").save(buffer, "PNG", transparency=3)
    assert from_pil(Image.open(buffer)).alpha is not None
    with pytest.raises(ValueError, match="mode F cannot be restored"):
        from_pil(image.convert("F"))


@pytest.mark.parametrize(
    "shape, dtype", [((4, 4), np.float32), ((4, 4, 5), np.uint8), ((0, 4, 3), np.uint8), ((4,), np.uint8)]
)
def test_arrays_that_are_no_pictures_are_refused(shape, dtype):
    with pytest.raises(ValueError, match="a picture"):
        from_array(np.zeros(shape, dtype))


def test_before_and_after_lie_side_by_side():
    before, after = PhotoFile(np.full((4, 6, 3), 10, np.uint8)), PhotoFile(np.full((8, 12, 3), 90, np.uint8))
    both = side_by_side(before, after).pixels
    assert both.shape == (8, 26, 3) and (both[:, :12] == 10).all() and (both[:, -12:] == 90).all()
    glass = PhotoFile(np.zeros((8, 12, 3), np.uint8), alpha=np.zeros((8, 12), np.uint8))
    assert (side_by_side(glass, after).pixels[:, :12] == 255).all()


def test_transparency_is_enlarged_with_the_photo():
    photo = PhotoFile(smooth(), alpha=smooth(channels=1)[..., 0])
    large = photo.restored(smooth(60, 82))
    assert large.alpha.shape == (60, 82) and abs(large.alpha.mean() - photo.alpha.mean()) < 2
