"""Detection on files: photos, folders and videos in, annotated copies and one JSON of boxes out."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from mambavision.detection.files import atomic_path
from mambavision.detection.inferencer import DetInferencer, draw
from mambavision.detection.photos import PHOTO_SUFFIXES, DatasetError, imread

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts")
_WRITABLE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_JSON_NAME = "detections.json"


def is_video(path: str | Path) -> bool:
    """Whether a path has a video's suffix."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def find_photos(path: str | Path, *, exclude: str | Path | None = None) -> list[tuple[Path, Path]]:
    """List the photos of a path: itself, or all in a folder and its subfolders, except those in ``exclude``.

    Returns:
        (file, path relative to the folder) of each photo, sorted.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        DatasetError: If the folder holds no photo.
    """
    path = Path(path)
    if path.is_file():
        return [(path, Path(path.name))]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such photo, folder or video")
    excluded = Path(exclude).resolve() if exclude else None
    photos = [
        (file, file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file() and excluded not in file.resolve().parents
    ]
    if not photos:
        raise DatasetError(f"{path}: no photos in this folder (looked for {', '.join(PHOTO_SUFFIXES)})")
    return photos


def detect_photos(inferencer: DetInferencer, photos: Sequence[tuple[Path, Path]], out_dir: str | Path) -> None:
    """Detect on photos one by one, write annotated copies and ``detections.json``.

    Photos that cannot be read are left out, and listed under ``errors`` in the JSON.

    Args:
        inferencer: Finds the boxes.
        photos: (file, relative path of its copy), as :func:`find_photos` returns them.
        out_dir: Output folder, made when the first photo is done.

    Raises:
        DatasetError: At the end, if some photo could not be read.
    """
    out_dir = Path(out_dir)
    images, errors = [], []
    for file, relative in tqdm(photos, unit="photo", disable=len(photos) == 1):
        try:
            picture = imread(file)
        except DatasetError as error:
            errors.append(str(error))
            continue
        suffix = "" if relative.suffix.lower() in _WRITABLE_SUFFIXES else ".png"
        target = out_dir / relative.with_name(relative.name + suffix)
        if target.resolve() == file.resolve():
            raise DatasetError(f"{file}: the output folder is the input's own, the photo would be overwritten")
        (found,) = inferencer([picture])
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_picture(target, draw(picture, found, inferencer.classes))
        height, width = picture.shape[:2]
        boxes = found.as_dicts(inferencer.classes)
        images.append({"file": str(file), "width": width, "height": height, "boxes": boxes})
    if images:
        _write_json(out_dir, {**_header(inferencer), "images": images, "errors": errors})
        count = sum(len(image["boxes"]) for image in images)
        print(f"{count} boxes in {len(images)} photos, written to {out_dir}{_origin(inferencer)}")
    if errors:
        others = f" (and {len(errors) - 1} more of {len(photos)}, see {_JSON_NAME})" if len(errors) > 1 else ""
        raise DatasetError(errors[0] + others)


def detect_video(inferencer: DetInferencer, video: str | Path | int, out_dir: str | Path) -> None:
    """Detect on every frame of a video file or of a webcam (its number; until Ctrl-C).

    Writes ``<name>.mp4`` and ``detections.json``, both complete or not at all.

    Raises:
        FileNotFoundError: If there is no such file or webcam.
        DatasetError: If it cannot be decoded, or holds no frame.
    """
    name = f"webcam{video}" if isinstance(video, int) else Path(video).stem
    if not isinstance(video, int) and not Path(video).is_file():
        raise FileNotFoundError(f"{video}: no such video")
    capture = cv2.VideoCapture(video if isinstance(video, int) else str(video))
    try:
        if not capture.isOpened():
            if isinstance(video, int):
                raise FileNotFoundError(f"no webcam {video}")
            raise DatasetError(f"{video}: not a video that OpenCV can decode")
        announced = 0 if isinstance(video, int) else max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 25.0
        frames = _frames(capture)
        first = next(frames, None)
        if first is None:
            raise DatasetError(f"{video}: holds no frame that can be decoded")
        out_dir = Path(out_dir)
        target = out_dir / f"{name}.mp4"
        if not isinstance(video, int) and target.resolve() == Path(video).resolve():
            raise DatasetError(f"{video}: the output folder is the input's own, the video would be overwritten")
        out_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            results = _annotate(inferencer, first, frames, temporary, rate, announced)
        height, width = first.shape[:2]
        content = {"file": str(video), "width": width, "height": height, "fps": rate, "frames": results}
        _write_json(out_dir, {**_header(inferencer), "video": content})
    finally:
        capture.release()
    if len(results) < announced:
        print(f"note: {video} announces {announced} frames, {len(results)} could be read", file=sys.stderr)
    print(f"{sum(map(len, results))} boxes in {len(results)} frames, written to {out_dir}{_origin(inferencer)}")


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        yield frame


def _annotate(
    inferencer: DetInferencer, first: np.ndarray, rest: Iterator[np.ndarray], path: Path, rate: float, announced: int
) -> list[list[dict]]:
    height, width = first.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    if not writer.isOpened():
        raise OSError(f"this OpenCV cannot write an mp4 video of {width}x{height}")
    results = []
    with tqdm(total=announced or None, unit="frame") as progress:
        try:
            frame: np.ndarray | None = first
            while frame is not None:
                found = inferencer([frame])[0]
                writer.write(draw(frame, found, inferencer.classes))
                results.append(found.as_dicts(inferencer.classes))
                progress.update()
                frame = next(rest, None)
        except KeyboardInterrupt:  # the way to end a webcam: keep what there is
            pass
        finally:
            writer.release()
    return results


def _header(inferencer: DetInferencer) -> dict:
    return {"classes": list(inferencer.classes), "score_threshold": inferencer.score_thr}


def _origin(inferencer: DetInferencer) -> str:
    return f" (weights {inferencer.weights.name}, {len(inferencer.classes)} classes)" if inferencer.weights else ""


def _write_picture(path: Path, picture: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), picture):
            raise OSError(f"{path}: cannot be written")


def _write_json(out_dir: Path, content: dict) -> None:
    with atomic_path(out_dir / _JSON_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
