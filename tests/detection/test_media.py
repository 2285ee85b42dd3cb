import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

import mambavision.detection  # noqa: F401  makes mmdet importable
from mambavision.detection import build_mamba_yolo, media
from mambavision.detection.inferencer import DetInferencer
from mambavision.detection.photos import imread
from mambavision.detection.weights import save_weights
from mambavision.engine import video


class Camera:
    """A video file behind a webcam's number; its viewer presses Ctrl-C after the last frame."""

    def __init__(self, file):
        self.capture = cv2.VideoCapture(str(file))

    def __getattr__(self, name):
        return getattr(self.capture, name)

    def read(self):
        ok, frame = self.capture.read()
        if not ok:
            raise KeyboardInterrupt
        return ok, frame


@pytest.fixture
def inferencer(tmp_path):
    detector = build_mamba_yolo("debug", classes=["a", "b"])
    save_weights(detector, tmp_path / "w.safetensors", size="debug", variant="aaai", classes=["a", "b"], input_size=64)
    return DetInferencer.from_weights(tmp_path / "w.safetensors", score_thr=0.0)


def test_a_webcam_is_filmed_until_ctrl_c(tmp_path, inferencer, monkeypatch):
    film = tmp_path / "film.mp4"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for value in (40, 80, 120):
        writer.write(np.full((48, 64, 3), value, np.uint8))
    writer.release()
    camera, numbers = Camera(film), []
    opened = cv2.VideoCapture
    cameras = lambda source: numbers.append(source) or camera if isinstance(source, int) else opened(source)  # noqa: E731
    monkeypatch.setattr(video.cv2, "VideoCapture", cameras)
    media.detect_video(inferencer, 3, tmp_path / "out")
    assert numbers == [3]
    found = json.loads((tmp_path / "out" / "detections.json").read_text())["video"]
    assert len(found["frames"]) == 3 and found["width"] == 64 and all(found["frames"])
    assert (tmp_path / "out" / "webcam3.mp4").stat().st_size > 0


def test_no_webcam_is_one_plain_error(tmp_path, inferencer):
    with pytest.raises(FileNotFoundError, match="no webcam 97"):
        media.detect_video(inferencer, 97, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf8(tmp_path, inferencer, capsys):
    photo = tmp_path / os.fsdecode(b"caf\xe9.png")
    photo.write_bytes(cv2.imencode(".png", np.zeros((40, 60, 3), np.uint8))[1])
    media.detect_photos(inferencer, [(photo, photo.relative_to(tmp_path))], tmp_path / "out")
    (image,) = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert image["file"] == str(photo) and imread(tmp_path / "out" / photo.name).shape == (40, 60, 3)
    assert capsys.readouterr().err == ""


def test_further_pages_are_noted(tmp_path, inferencer, capsys):
    pages = [np.zeros((40, 60, 3), np.uint8)] * 2
    cv2.imwritemulti(str(tmp_path / "a.tif"), pages)
    media.detect_photos(inferencer, [(tmp_path / "a.tif", Path("a.tif"))], tmp_path / "out")
    assert "a.tif holds 2 pictures, boxes are found in the first alone" in capsys.readouterr().err


def test_a_picture_too_large_for_its_kind_is_one_plain_error(tmp_path):
    with pytest.raises(OSError, match="a .webp file of 17000x8 cannot be written"):
        media._write_picture(tmp_path / "a.webp", np.zeros((8, 17000, 3), np.uint8))
