"""Frames of video files and webcams, and videos written whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mambavision.engine.files import atomic_path
from mambavision.engine.photos import DatasetError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")


def is_video(path: str | os.PathLike) -> bool:
    """Whether a path has a video's suffix."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Video:
    """An open video.

    Attributes:
        frames: uint8 BGR (H, W, 3), each once, in order.
        height, width: Of a frame, pixels.
        rate: Frames a second.
        announced: Number of frames the file says it has; 0 where it does not say, as a webcam.
    """

    frames: Iterator[np.ndarray]
    height: int
    width: int
    rate: float
    announced: int


@contextmanager
def open_video(source: str | os.PathLike | int) -> Iterator[Video]:
    """Open a video file, or a webcam by its number, and close it at the end.

    A file of which fewer frames can be read than it announces is noted on stderr.

    Raises:
        FileNotFoundError: If there is no such file or webcam.
        DatasetError: If it cannot be decoded, or holds no frame.
    """
    camera = isinstance(source, int)
    if not camera and not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such video")
    with _silent():
        capture = cv2.VideoCapture(source if camera else _name(source))
    try:
        if not capture.isOpened():
            if camera:
                raise FileNotFoundError(f"no webcam {source}")
            raise DatasetError(f"{source}: not a video that OpenCV can decode")
        announced = 0 if camera else max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        rate = capture.get(cv2.CAP_PROP_FPS)
        ok, first = capture.read()
        if not ok:
            raise DatasetError(f"{source}: holds no frame that can be decoded")
        height, width = first.shape[:2]
        frames = _frames(capture, first, announced, source)
        yield Video(frames, height, width, rate if 0 < rate < 1000 else 25.0, announced)
    finally:
        capture.release()


def _name(path: str | os.PathLike) -> str:
    """A path as OpenCV takes it, which a name that is not UTF-8 would end the process."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{name}: OpenCV opens videos of UTF-8 names only; rename it, or its folder") from None
    return name


@contextmanager
def _silent() -> Iterator[None]:
    """Open in this block without the lines of OpenCV and FFmpeg on stderr: what is wrong is said in one of ours."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet; read once, at the first opening of a process
    logging = cv2.utils.logging
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _frames(
    capture: cv2.VideoCapture, first: np.ndarray, announced: int, source: str | os.PathLike | int
) -> Iterator[np.ndarray]:
    count, ok, frame = 0, True, first
    while ok:
        count += 1
        yield frame
        ok, frame = capture.read()
    if count < announced:
        print(f"note: {source} announces {announced} frames, {count} could be read", file=sys.stderr)


@contextmanager
def write_video(path: str | os.PathLike, *, height: int, width: int, rate: float) -> Iterator[Callable]:
    """Yield a function that appends a uint8 BGR (H, W, 3) frame to a new MPEG-4 video; on an error there is no file.

    Raises:
        OSError: If OpenCV cannot write such a video, or not all frames have reached the disk.
    """
    count = 0

    def append(frame: np.ndarray) -> None:
        nonlocal count
        writer.write(frame)
        count += 1

    with atomic_path(path) as temporary:
        with _silent():
            writer = cv2.VideoWriter(_name(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
        if not writer.isOpened():
            raise OSError(f"{path}: this OpenCV cannot write a {Path(path).suffix} video of {width}x{height}")
        try:
            yield append
        finally:
            writer.release()
        with _silent():
            written = cv2.VideoCapture(str(temporary))  # the writer does not say that the disk is full
        whole = int(written.get(cv2.CAP_PROP_FRAME_COUNT)) >= count
        written.release()
        if not whole:
            raise OSError(f"{path}: the video could not be written whole; is the disk full?")
