import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mambavision.engine.photos import DatasetError
from mambavision.engine.video import is_video, open_video, write_video


def test_frames_go_in_and_come_out(tmp_path, capsys):
    path = tmp_path / "a.mp4"
    with write_video(path, height=48, width=64, rate=10) as append:
        for value in (40, 80, 120):
            append(np.full((48, 64, 3), value, np.uint8))
    assert is_video(path) and list(tmp_path.iterdir()) == [path]
    with open_video(path) as video:
        assert (video.height, video.width, video.rate, video.announced) == (48, 64, 10, 3)
        means = [frame.mean() for frame in video.frames]
    np.testing.assert_allclose(means, [40, 80, 120], atol=3)
    assert capsys.readouterr().err == ""


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video")
    for source, error, message in (
        (tmp_path / "gone.mp4", FileNotFoundError, "gone.mp4: no such video"),
        (tmp_path / "text.mp4", DatasetError, "text.mp4: not a video"),
        (97, FileNotFoundError, "no webcam 97"),
    ):
        with pytest.raises(error, match=message), open_video(source):
            pass


def test_openings_that_fail_print_nothing(tmp_path):
    whole = tmp_path / "whole1.mp4"
    with write_video(whole, height=48, width=64, rate=10) as append:
        for value in range(5):
            append(np.full((48, 64, 3), value, np.uint8))
    for name, data in (("text1.mp4", b"this is no video"), ("cut1.mp4", whole.read_bytes()[:400])):
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys; from mambavision.engine.video import open_video\n"
        "for source in (sys.argv[1], sys.argv[2], 97):\n"
        "    try:\n"
        "        open_video(source).__enter__()\n"
        "    except (OSError, ValueError) as error:\n"
        "        print(type(error).__name__)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "text1.mp4"), str(tmp_path / "cut1.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # FFmpeg's level is one of a process
    assert done.stdout.split() == ["DatasetError", "DatasetError", "FileNotFoundError"] and not done.stderr


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path, frame = tmp_path / "a.mp4", np.zeros((48, 64, 3), np.uint8)

    class FullDisk:
        def __init__(self, path, *_):
            Path(path).write_bytes(b"some")

        def __getattr__(self, name):  # as OpenCV: without a word
            return lambda *_: True

    with pytest.raises(KeyError), write_video(path, height=48, width=64, rate=10) as append:
        append(frame)
        raise KeyError("anything")
    assert not list(tmp_path.iterdir())
    gone = tmp_path / "a.nothing"
    with pytest.raises(OSError, match="cannot write"), write_video(gone, height=48, width=64, rate=10):
        pass
    monkeypatch.setattr(cv2, "VideoWriter", FullDisk)
    with pytest.raises(OSError, match="disk full"), write_video(path, height=48, width=64, rate=10) as append:
        append(frame)
    assert not list(tmp_path.iterdir())


def test_names_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(b"0")
    with pytest.raises(DatasetError, match="UTF-8 names only; rename it"), open_video(path):
        pass
    folder = tmp_path / os.fsdecode(b"\xe9")
    with pytest.raises(DatasetError, match="UTF-8"), write_video(folder / "a.mp4", height=48, width=64, rate=10):
        pass
