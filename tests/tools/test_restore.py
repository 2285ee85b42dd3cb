import errno
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mambavision.restoration import inferencer
from mambavision.restoration.datasets import read_photo
from mambavision.restoration.images import PhotoFile, read_photo_file, write_photo_file
from tests.restoration.test_inferencer import save
from tests.tools.running import refusal, run_tool
from tests.tools.toy_data import make_video

RNG = np.random.default_rng(0)


@pytest.fixture
def restore(monkeypatch, capfd, tmp_path):
    """Run tools/restore.py with random weights on the CPU; returns exit code, stdout and stderr."""
    weights = save(tmp_path / "w.safetensors", sigma_input=True, sigma_range=[0, 50])

    def call(*arguments):
        options = [] if "--weights" in arguments else ["--weights", weights]
        return run_tool(monkeypatch, capfd, "restore", *arguments, "--device", "cpu", *options)

    return call


def write(path, height=40, width=56, dtype=np.uint8, **changes):
    coarse = RNG.uniform(0.1, 0.9, (4, 5, 3))
    pixels = (cv2.resize(coarse, (width, height)) * np.iinfo(dtype).max).astype(dtype)
    write_photo_file(path, PhotoFile(pixels, **changes))
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder of photos, of which two cannot be read."""
    folder = tmp_path / "photos"
    for name in ("a.jpg", "b.png", "deep/c.webp"):
        write(folder / name)
    write(folder / "tiny.png", 1, 1)
    write(folder / "small.png", 3, 5)
    write(folder / "wide.tif", dtype=np.uint16)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:400])
    (folder / "text.png").write_text("this is no photo")
    (folder / "notes.txt").write_text("neither")
    return folder


def five_channels(path):
    """A TIFF of one pixel with five channels, as satellites' photos have."""
    tags = [(256, 1), (257, 1), (258, 138), (259, 1), (262, 1), (273, 148), (277, 5), (278, 1), (279, 5), (284, 1)]
    entries = [struct.pack("<HHII", tag, 3, 5 if tag == 258 else 1, value) for tag, value in tags]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + struct.pack("<I", 0)
    path.write_bytes(head.ljust(138, b"\0") + struct.pack("<5H", *[8] * 5) + bytes(5))


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_photo_to_a_file(restore, tmp_path):
    photo = write(tmp_path / "a.png", alpha=np.full((40, 56), 77, np.uint8))
    out = tmp_path / "new" / "b.png"
    code, text, err = restore(photo, "-o", out, "--sigma", 25)
    assert code == 0, err
    assert f"1 of 1 files restored, written to {out} (weights w.safetensors)" in text
    restored = read_photo_file(out)
    assert (restored.alpha == 77).all() and not np.array_equal(restored.pixels, read_photo_file(photo).pixels)


def test_a_photo_alone_goes_to_a_folder_here(restore, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = write(tmp_path / "a.png")
    code, text, err = restore(photo)
    assert code == 0 and written(tmp_path / "restored") == ["a.png"], err
    assert "written to restored/a.png" in text
    assert "restored/a.png exists already" in refusal(restore(photo))


def test_a_folder_leaves_out_what_cannot_be_read(restore, photos, tmp_path):
    out = tmp_path / "out"
    code, text, err = restore(photos, "-o", out, "--tile", 64)
    assert written(out) == ["a.jpg", "b.png", "deep/c.webp", "small.png", "tiny.png", "wide.tif"]
    assert "6 of 8 files restored" in text
    line = refusal((code, text, err))
    assert "2 of 8 files could not be restored, they are listed above" in line
    assert "cut.jpg: truncated" in err and "text.png: not a photo" in err
    assert read_photo_file(out / "tiny.png").pixels.shape == (1, 1, 3)
    assert read_photo_file(out / "wide.tif").pixels.dtype == np.uint16
    with Image.open(out / "a.jpg") as image:
        assert image.format == "JPEG"


def test_patterns_and_several_inputs(restore, photos, tmp_path):
    code, _, err = restore(photos / "**" / "*.webp", photos / "b.png", "-o", tmp_path / "out")
    assert code == 0 and written(tmp_path / "out") == ["b.png", "deep/c.webp"], err
    same = write(tmp_path / "other" / "b.png")
    line = refusal(restore(photos / "b.png", same, "-o", tmp_path / "two"))
    assert "would both be written to" in line and not (tmp_path / "two").exists()


def test_what_is_there_is_not_overwritten_unless_asked(restore, photos, tmp_path):
    out = tmp_path / "b.png"
    out.write_bytes(b"mine")
    assert "b.png exists already; pass --overwrite" in refusal(restore(photos / "b.png", "-o", out))
    assert out.read_bytes() == b"mine"
    assert restore(photos / "b.png", "-o", out, "--overwrite")[0] == 0
    assert read_photo_file(out).pixels.shape == (40, 56, 3)
    before = (photos / "b.png").read_bytes()
    line = refusal(restore(photos / "b.png", "-o", photos, "--overwrite"))
    assert "would be overwritten by its own result" in line and (photos / "b.png").read_bytes() == before


def test_side_by_side(restore, photos, tmp_path):
    assert restore(photos / "b.png", "-o", tmp_path / "out", "--side-by-side", "--self-ensemble")[0] == 0
    assert written(tmp_path / "out") == ["b.png", "b_before_after.png"]
    both = read_photo_file(tmp_path / "out" / "b_before_after.png").pixels
    assert np.array_equal(both[:, :56], read_photo_file(photos / "b.png").pixels)
    assert np.array_equal(both[:, -56:], read_photo_file(tmp_path / "out" / "b.png").pixels)


def test_a_comparison_takes_no_photos_name(restore, photos, tmp_path):
    write(photos / "b_before_after.png")
    line = refusal(restore(photos, "-o", tmp_path / "out", "--side-by-side"))
    assert "b_before_after.png and the comparison of" in line and not (tmp_path / "out").exists()


def test_enlarging(restore, photos, tmp_path):
    weights = save(tmp_path / "x2.safetensors", task="sr_x2", scale=2)
    code, _, err = restore(photos / "b.png", "-o", tmp_path / "b.png", "--task", "sr_x2", "--weights", weights)
    assert code == 0 and read_photo_file(tmp_path / "b.png").pixels.shape == (80, 112, 3), err


def test_kinds_that_are_not_written_become_png(restore, tmp_path):
    still, *turned = (Image.fromarray(RNG.integers(0, 255, (24, 32, 3), np.uint8)) for _ in range(3))
    still.save(tmp_path / "still.gif")
    for name in ("moving.gif", "pages.tif"):
        still.save(tmp_path / name, save_all=True, append_images=turned)
    code, _, err = restore(tmp_path / "*.gif", tmp_path / "pages.tif", "-o", tmp_path / "out")
    assert code == 0 and written(tmp_path / "out") == ["moving.png", "pages.tif", "still.png"], err
    notes = [line for line in err.splitlines() if line.startswith("note: ") and "holds 3 pictures, the first" in line]
    assert len(notes) == 2 and "moving.gif" in notes[0] and "pages.tif" in notes[1]
    assert read_photo_file(tmp_path / "out" / "still.png").pixels.shape == (24, 32, 3)
    line = refusal(restore(tmp_path / "still.gif", tmp_path / "pages.tif", "-o", tmp_path / "one.png"))
    assert "one.png: several files are written to a folder" in line and not (tmp_path / "one.png").exists()
    assert restore(tmp_path / "still.gif", tmp_path / "pages.tif", "-o", f"{tmp_path}/one.png/")[0] == 0


def test_masks(restore, photos, tmp_path):
    weights = save(tmp_path / "inpaint.safetensors", task="inpaint")
    white = np.zeros((40, 56, 1), np.uint8)
    white[10:20, 30:40] = 255
    for name in ("one.png", "masks/b.png", "masks/deep/c.png", "masks/wide.jpg"):
        write_photo_file(tmp_path / name, PhotoFile(white))
    options = ["--task", "inpaint", "--weights", weights, "--mask"]
    assert restore(photos / "b.png", "-o", tmp_path / "b.png", *options, tmp_path / "one.png")[0] == 0
    before, after = (read_photo_file(path).pixels for path in (photos / "b.png", tmp_path / "b.png"))
    changed = (before != after).any(2)
    assert changed[10:20, 30:40].all() and changed.sum() == 100

    code, _, err = restore(photos, "-o", tmp_path / "out", *options, tmp_path / "masks")
    assert code == 2 and written(tmp_path / "out") == ["b.png", "deep/c.webp", "wide.tif"]
    assert np.array_equal(read_photo_file(tmp_path / "out" / "b.png").pixels, after)
    assert "masks/a.jpg: no such file" in err and "5 of 8 files could not be restored" in err
    line = refusal(restore(photos / "tiny.png", "-o", tmp_path / "no", *options, tmp_path / "one.png"))
    assert "one.png: a mask of 56x40 pixels for a photo of 1x1" in line
    line = refusal(restore(photos / "b.png", "-o", tmp_path / "no", *options, tmp_path / "gone"))
    assert "gone: no such mask or folder of masks" in line
    line = refusal(restore(photos / "b.png", "-o", tmp_path / "no", "--mask", tmp_path / "one.png"))
    assert "a mask is for the task inpaint, w.safetensors is for denoise_color" in line
    assert not (tmp_path / "no").exists()


def test_a_video(restore, tmp_path):
    clip = make_video(tmp_path / "clip.mp4", frames=3)
    code, _, err = restore(clip, "-o", tmp_path / "out", "--side-by-side")
    assert code == 0, err
    for name, width in (("clip.mp4", 96), ("clip_before_after.mp4", 194)):
        capture = cv2.VideoCapture(str(tmp_path / "out" / name))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.read()[1].shape == (64, width, 3)


def test_bad_inputs_are_refused(restore, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "file").write_text("a file")
    cv2.imwrite(str(tmp_path / "float.tif"), np.zeros((4, 4, 3), np.float32))
    five_channels(tmp_path / "five.tif")
    write(tmp_path / "wide.png", dtype=np.uint16)
    write(tmp_path / "glass.png", alpha=np.zeros((40, 56), np.uint8))
    out = tmp_path / "out"
    for source, target, message in (
        ("gone.png", out, "gone.png: no such photo, folder or video"),
        ("gone/", out, "no such photo, folder or video"),
        ("gone.mp4", out, "gone.mp4: no such video"),
        (tmp_path / "*.gif", out, "no file is named like this"),
        (tmp_path / "empty", out, "no photos in this folder"),
        (photos / "cut.jpg", out, "cut.jpg: truncated"),
        (photos / "notes.txt", out, "notes.txt: not a photo"),
        (tmp_path / "text.mp4", out, "text.mp4: not a video"),
        (tmp_path / "float.tif", out, "float32 pixels"),
        (tmp_path / "five.tif", out, "five.tif: not a photo of 1 to 4 channels"),
        (tmp_path / "wide.png", out / "wide.jpg", "16 bits a channel"),
        (tmp_path / "glass.png", out / "glass.jpg", "JPEG holds no alpha"),
        (photos / "b.png", out / "b.gif", "a photo is written as .jpg"),
        (photos / "b.png", tmp_path / "file" / "b.png", "is a file, a folder is wanted"),
        (photos, tmp_path / "file", "is a file, a folder is wanted"),
    ):
        line = refusal(restore(source, "-o", target))
        assert message in line, line
        assert not out.exists(), (source, written(out))


def test_help_names_the_tiles_there_are(tool):
    code, text, _ = tool("restore", "--help")
    assert code == 0 and "0: no tiles; default: auto, as memory allows" in " ".join(text.split())


def test_bad_options_are_refused(restore, photos, tmp_path):
    gray = save(tmp_path / "gray.safetensors", task="denoise_gray", in_channels=1)
    (tmp_path / "cut.safetensors").write_bytes(gray.read_bytes()[:1000])
    for options, message in (
        (["--sigma", 70], "sigma 70 is outside the 0 to 50"),
        (["--sigma", -1], "sigma -1 is outside"),
        (["--sigma", 25, "--weights", gray], "takes no noise level"),
        (["--weights", gray], "b.png: the picture is in colour"),
        (["--task", "deblur"], "is for denoise_color, not for deblur"),
        (["--weights", tmp_path / "gone.safetensors"], "gone.safetensors"),
        (["--weights", tmp_path / "cut.safetensors"], "cut.safetensors"),
        (["--tile", -64], "tile -64 is too small"),
        (["--overlap", -1], "overlap -1"),
        (["--luminance"], "luminance is denoised with the task denoise_color and the weights that come along"),
        (["--tile", 64, "--overlap", 100], "smaller than the tile"),
    ):
        line = refusal(restore(photos / "b.png", "-o", tmp_path / "out", *options))
        assert message in line, line
        assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_it_with_nothing_half_written(restore, photos, tmp_path, monkeypatch):
    write_whole, count = Path.write_bytes, []

    def full(path, data):
        count.append(path)
        if len(count) == 1:
            return write_whole(path, data)
        write_whole(path, data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refusal(restore(photos, "-o", tmp_path / "out"))
    assert written(tmp_path / "out") == ["a.jpg"] and len(count) == 2
    assert "b.png: cannot be written (No space left on device); 6 more not tried" in line


@pytest.mark.parametrize("task, scale, degradation", [("denoise_color", 1, None), ("sr_x2", 2, "Downsample")])
def test_tiles_are_measured(monkeypatch, capfd, tmp_path, task, scale, degradation):
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))  # the same photo whatever tests ran before
    write(tmp_path / "photos" / "a.png", 140, 181)
    metadata = dict(degradation=dict(type=degradation, scale=scale)) if degradation else {}
    weights = save(tmp_path / "w.safetensors", task=task, scale=scale, **metadata)
    options = ["--sigma", 25] if task == "denoise_color" else []
    options += ["--tile", 64, "--overlap", 0, 32, "--precision", "bf16", "--device", "cpu"]
    arguments = [tmp_path / "photos", "--weights", weights, *options]
    code, out, err = run_tool(monkeypatch, capfd, "benchmark_tiles", *arguments)
    assert code == 0, err
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "│ fp32" in line or "│ bf16" in line]
    assert [row[:3] for row in rows] == [
        ["fp32", "whole", "0"],
        ["bf16", "whole", "0"],
        *(["fp32", "64", o] for o in ("0", "32")),
    ]
    numbers = [[float(cell) for cell in row[3:]] for row in rows]
    assert numbers[0][1:] == [0, 0, 0] and all(5 < row[0] < 50 and row[3] == 0 for row in numbers)
    assert all(0 < row[2] < 1 and abs(row[1]) <= row[2] for row in numbers[1:])
    if task != "denoise_color":
        assert "--sigma is for weights against noise" in refusal(
            run_tool(monkeypatch, capfd, "benchmark_tiles", *arguments, "--sigma", 5)
        )


def test_before_and_after(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(inferencer, "WEIGHTS_FOLDER", tmp_path)
    save(tmp_path / "serpent_s_jpeg.safetensors", task="jpeg")
    save(tmp_path / "serpent_s_sr_x4.safetensors", task="sr_x4", scale=4)
    save(tmp_path / "serpent_s_denoise_gray.safetensors", task="denoise_gray", in_channels=1)
    photo, out = write(tmp_path / "a.png", 80, 100), tmp_path / "out.png"
    options = ["--tasks", "jpeg", "sr_x4", "denoise_gray", "--corner", 8, 20, "--side", 60, "--device", "cpu"]
    code, text, err = run_tool(monkeypatch, capfd, "before_after", photo, out, *options)
    assert code == 0 and "sr_x4" in text, err
    picture = read_photo_file(out).pixels
    assert picture.shape == (3 * 64, 3 * 64, 3)
    for row in (2, 66):
        assert np.array_equal(picture[row : row + 60, 130:190], read_photo_file(photo).pixels[8:68, 20:80])
    gray = read_photo(photo, gray=True).pixels[8:68, 20:80]
    assert np.array_equal(picture[130:190, 130:190], gray.repeat(3, 2))
    for options, message in (
        (["--side", 100], "a crop of 100 pixels at 0 0 is not within the 96x72"),
        (["--tasks", "deblur", "--side", 60], "no weights for deblur"),
    ):
        assert message in refusal(run_tool(monkeypatch, capfd, "before_after", photo, tmp_path / "no.png", *options))
        assert not (tmp_path / "no.png").exists()
