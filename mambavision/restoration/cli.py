"""Restoration on files: photos, folders, patterns and videos in, restored files out."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mambavision.engine.files import check_folder
from mambavision.engine.photos import PHOTO_SUFFIXES, DatasetError, count_pictures, find_photos
from mambavision.engine.video import is_video, open_video, write_video
from mambavision.restoration.images import (
    WRITABLE_SUFFIXES,
    PhotoFile,
    check_writable,
    read_mask,
    read_photo_file,
    side_by_side,
    write_photo_file,
)
from mambavision.restoration.inferencer import RestorationInferencer, find_files


class Job(NamedTuple):
    """A photo or video to restore, the file to write, and the mask of what to fill, if any."""

    source: Path
    target: Path
    mask: Path | None = None


def plan(inputs: Sequence[str], out: str | os.PathLike, masks: str | os.PathLike | None = None) -> list[Job]:
    """Say which files are restored to which.

    Args:
        inputs: Photos, videos, folders of photos, glob patterns of photos and videos.
        out: File to write, for one photo or video; else a folder, in which names and subfolders are kept. A photo of
            a kind that cannot be written becomes a .png there, a video an .mp4.
        masks: A mask for all inputs, or a folder of masks of their names, whatever the suffix.

    Raises:
        FileNotFoundError: If there is nothing at an input, or no masks.
        NotADirectoryError: If ``out`` must be a folder and is a file.
        ValueError: If two files would be written to one, or ``out`` names a kind of file that cannot be written, or a
            file for several.
    """
    masks = None if masks is None else Path(masks)
    if masks and not masks.exists():
        raise FileNotFoundError(f"{masks}: no such mask or folder of masks")
    found = [pair for name in inputs for pair in _find(name, out)]
    (source, relative), target = found[0], Path(out)
    one_file = len(found) == 1 and not Path(inputs[0]).is_dir()
    names_folder = target.is_dir() or str(out).endswith(("/", os.sep))
    if not one_file and not names_folder and target.suffix.lower() in (*WRITABLE_SUFFIXES, ".mp4"):
        raise ValueError(f"{out}: several files are written to a folder; to name a folder so, end it with /")
    if one_file and target.suffix and not names_folder:
        kind, suffixes = ("video", (".mp4",)) if is_video(source) else ("photo", WRITABLE_SUFFIXES)
        if target.suffix.lower() not in suffixes:
            raise ValueError(f"{out}: a {kind} is written as {', '.join(suffixes)}; for a folder, end it with /")
        check_folder(target.parent, "--out")
        return [Job(source, target, _mask(masks, relative))]
    check_folder(out, "--out")
    jobs: dict[Path, Job] = {}
    for file, relative in found:
        target = Path(out, _writable(file, relative))
        other = jobs.setdefault(target, Job(file, target, _mask(masks, relative))).source
        if other != file:
            raise ValueError(f"{other} and {file} would both be written to {target}; restore them one by one")
    return list(jobs.values())


def _writable(file: Path, relative: Path) -> Path:
    if is_video(file):
        return relative.with_suffix(".mp4")
    return relative if relative.suffix.lower() in WRITABLE_SUFFIXES else relative.with_suffix(".png")


def _mask(masks: Path | None, relative: Path) -> Path | None:
    """The mask of an input, which need not be there; reading it says so."""
    if masks is None or not masks.is_dir():
        return masks
    named = [masks / relative.with_suffix(suffix) for suffix in PHOTO_SUFFIXES]
    return next((mask for mask in named if mask.is_file()), masks / relative)


def _find(name: str, out: str | os.PathLike) -> list[tuple[Path, Path]]:
    """Files of one input, each with its path below the output folder."""
    if has_magic(name) and not os.path.lexists(name):
        fixed = Path(*takewhile(lambda part: not has_magic(part), Path(name).parts))
        return [(file, file.relative_to(fixed)) for file in find_files(name)]
    if is_video(name):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such video")
        return [(Path(name), Path(Path(name).name))]
    return find_photos(name, exclude=out)


def restore_files(
    inferencer: RestorationInferencer, jobs: Sequence[Job], *, compare: bool = False, overwrite: bool = False
) -> None:
    """Restore files one by one; each is written whole or not at all.

    Files that cannot be restored are left out, and listed on stderr at the end. On a full disk nothing more is tried.

    Args:
        inferencer: Restores the pictures.
        jobs: What :func:`plan` returns.
        compare: Also write before and after next to each other, as ``*_before_after``.
        overwrite: Replace files that are there already; never the input itself.

    Raises:
        ValueError: Before it begins, if there are masks and the weights are not for inpainting, or a comparison would
            be written over another photo's result.
        DatasetError: At the end, if some file could not be restored.
    """
    if any(job.mask for job in jobs):
        inferencer.check_masks()
    source_of = {job.target: job.source for job in jobs}
    for job in jobs if compare else ():
        if other := source_of.get(_comparison(job.target)):
            raise ValueError(
                f"{other} and the comparison of {job.source} would both be written to {_comparison(job.target)}: "
                "restore them one by one"
            )
    failures: list[str] = []
    done = 0
    for job in tqdm(jobs, unit="file", disable=len(jobs) == 1):
        targets = [job.target] + [_comparison(job.target)] * compare
        try:
            _check_targets(job, targets, overwrite)
            restore = _restore_video if is_video(job.source) else _restore_photo
            restore(inferencer, job, targets, nested=len(jobs) > 1)
            done += 1
        except (ValueError, OSError, MemoryError) as error:
            message = _in_one_line(error)
            failures.append(message if str(job.source) in message else f"{job.source}: {message}")
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                break
    if done:
        folder = jobs[0].target if len(jobs) == 1 else os.path.commonpath([job.target.parent for job in jobs])
        used = ", ".join(sorted(path.name for path in inferencer.used))
        print(f"{done} of {len(jobs)} files restored, written to {folder} (weights {used})")
    untried = len(jobs) - done - len(failures)
    left = f"; {untried} more not tried" * (untried > 0)
    if len(failures) == 1:
        raise DatasetError(failures[0] + left)
    if failures:
        print(*(f"  {failure}" for failure in failures), sep="\n", file=sys.stderr)
        raise DatasetError(f"{len(failures)} of {len(jobs)} files could not be restored, they are listed above{left}")


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _comparison(target: Path) -> Path:
    return target.with_name(f"{target.stem}_before_after{target.suffix}")


def _check_targets(job: Job, targets: Sequence[Path], overwrite: bool) -> None:
    for path in targets:
        if path.exists() and path.samefile(job.source):
            raise DatasetError(f"{job.source}: would be overwritten by its own result; name another --out")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists already; pass --overwrite to replace it")


def _restore_photo(inferencer: RestorationInferencer, job: Job, targets: Sequence[Path], *, nested: bool) -> None:
    photo = read_photo_file(job.source)
    mask = read_mask(job.mask, photo) if job.mask else None
    for target in targets:
        check_writable(target, photo, inferencer.scale)
    pictures = count_pictures(job.source)
    if pictures > 1:
        tqdm.write(f"note: {job.source} holds {pictures} pictures, the first alone is restored", file=sys.stderr)
    options = dict(position=1, leave=False) if nested else {}
    with tqdm(unit="tile", desc=job.source.name, delay=1, **options) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)  # backwards where it begins anew with smaller tiles

        restored = inferencer.restore(photo, progress, mask=mask)
    write_photo_file(targets[0], restored)
    for target in targets[1:]:
        write_photo_file(target, side_by_side(photo, restored))


def _restore_video(inferencer: RestorationInferencer, job: Job, targets: Sequence[Path], *, nested: bool) -> None:
    options = dict(position=1, leave=False) if nested else {}
    with open_video(job.source) as video, ExitStack() as stack:
        writers, mask = [], None
        for frame in tqdm(video.frames, total=video.announced or None, unit="frame", desc=job.source.name, **options):
            before = PhotoFile(np.ascontiguousarray(frame[..., ::-1]))
            if job.mask and mask is None:
                mask = read_mask(job.mask, before)  # of all frames
            after = inferencer.restore(before, mask=mask)
            pictures = [after, side_by_side(before, after)][: len(targets)]
            if not writers:
                targets[0].parent.mkdir(parents=True, exist_ok=True)
                for target, picture in zip(targets, pictures, strict=True):
                    height, width = picture.pixels.shape[:2]
                    writer = write_video(target, height=height, width=width, rate=video.rate)
                    writers.append(stack.enter_context(writer))
            for append, picture in zip(writers, pictures, strict=True):
                append(np.ascontiguousarray(picture.pixels[..., ::-1]))
