"""Detection on files: photos, folders and videos in, annotated copies and one JSON of boxes out."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from mambavision.detection.inferencer import DetInferencer, draw
from mambavision.detection.photos import imread
from mambavision.engine.files import atomic_path, check_free
from mambavision.engine.photos import DatasetError, count_pictures
from mambavision.engine.video import Video, open_video, write_video

_WRITABLE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_JSON_NAME = "detections.json"


def detect_photos(
    inferencer: DetInferencer, photos: Sequence[tuple[Path, Path]], out_dir: str | Path, *, overwrite: bool = False
) -> None:
    """Detect on photos one by one, write annotated copies and ``detections.json``.

    Photos that cannot be read are left out, and listed under ``errors`` in the JSON.

    Args:
        inferencer: Finds the boxes.
        photos: (file, relative path of its copy), as :func:`find_photos` returns them.
        out_dir: Output folder, made when the first photo is done.
        overwrite: Replace files that are there already; never the photos themselves.

    Raises:
        FileExistsError: Before it begins, if a file is there already.
        DatasetError: At the end, if some photo could not be read.
    """
    out_dir = Path(out_dir)
    jobs = [(file, out_dir / _copy(relative)) for file, relative in photos]
    for file, target in jobs:
        if target.resolve() == file.resolve():
            raise DatasetError(f"{file}: the output folder is the input's own, the photo would be overwritten")
    if not overwrite:
        check_free([out_dir / _JSON_NAME, *(target for _, target in jobs)])
    images, errors = [], []
    for file, target in tqdm(jobs, unit="photo", disable=len(jobs) == 1):
        try:
            picture = imread(file)
        except DatasetError as error:
            errors.append(str(error))
            continue
        if (pictures := count_pictures(file)) > 1:
            tqdm.write(f"note: {file} holds {pictures} pictures, boxes are found in the first alone", file=sys.stderr)
        (found,) = inferencer([picture])
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


def _copy(relative: Path) -> Path:
    """Name of a photo's annotated copy."""
    suffix = "" if relative.suffix.lower() in _WRITABLE_SUFFIXES else ".png"
    return relative.with_name(relative.name + suffix)


def detect_video(
    inferencer: DetInferencer, video: str | Path | int, out_dir: str | Path, *, overwrite: bool = False
) -> None:
    """Detect on every frame of a video file or of a webcam (its number; until Ctrl-C).

    Writes ``<name>.mp4`` and ``detections.json``, both complete or not at all; ``overwrite`` replaces those that are
    there already.

    Raises:
        FileExistsError: If one is there already.
        FileNotFoundError: If there is no such file or webcam.
        DatasetError: If it cannot be decoded, or holds no frame.
    """
    name = f"webcam{video}" if isinstance(video, int) else Path(video).stem
    out_dir = Path(out_dir)
    target = out_dir / f"{name}.mp4"
    with open_video(video) as clip:
        if not isinstance(video, int) and target.resolve() == Path(video).resolve():
            raise DatasetError(f"{video}: the output folder is the input's own, the video would be overwritten")
        if not overwrite:
            check_free([out_dir / _JSON_NAME, target])
        results = _annotate(inferencer, clip, target)
    content = {"file": str(video), "width": clip.width, "height": clip.height, "fps": clip.rate, "frames": results}
    _write_json(out_dir, {**_header(inferencer), "video": content})
    print(f"{sum(map(len, results))} boxes in {len(results)} frames, written to {out_dir}{_origin(inferencer)}")


def _annotate(inferencer: DetInferencer, clip: Video, path: Path) -> list[list[dict]]:
    results = []
    progress = tqdm(clip.frames, total=clip.announced or None, unit="frame")
    with write_video(path, height=clip.height, width=clip.width, rate=clip.rate) as append, progress:
        try:
            for frame in progress:
                found = inferencer([frame])[0]
                append(draw(frame, found, inferencer.classes))
                results.append(found.as_dicts(inferencer.classes))
        except KeyboardInterrupt:  # the way to end a webcam: keep what there is
            pass
    return results


def _header(inferencer: DetInferencer) -> dict:
    return {"classes": list(inferencer.classes), "score_threshold": inferencer.score_thr}


def _origin(inferencer: DetInferencer) -> str:
    return f" (weights {inferencer.weights.name}, {len(inferencer.classes)} classes)" if inferencer.weights else ""


def _write_picture(path: Path, picture: np.ndarray) -> None:
    ok, data = cv2.imencode(path.suffix, picture)
    if not ok:
        height, width = picture.shape[:2]
        raise OSError(f"{path}: a {path.suffix} file of {width}x{height} cannot be written")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _write_json(out_dir: Path, content: dict) -> None:
    with atomic_path(out_dir / _JSON_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
