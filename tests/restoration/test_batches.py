import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mambavision.engine.photos import DatasetError
from mambavision.restoration.batches import CropLoader
from mambavision.restoration.datasets import CleanFolder, PairedFolder, read_photo, to_tensor
from mambavision.restoration.degradations import JPEG, Downsample, GaussianBlur, GaussianNoise

NOISE = GaussianNoise((0, 50))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, shape in (("a.png", (70, 50, 3)), ("b.png", (40, 90, 3)), ("small.png", (9, 11, 3))):
        assert cv2.imwrite(str(tmp_path / name), generator.integers(0, 256, shape, dtype=np.uint8))
    return tmp_path


def _loader(folder: Path, degradation=NOISE, **kwargs) -> CropLoader:
    kwargs = dict(schedule=[(1, 16, 8)], device="cpu") | kwargs
    return CropLoader(CleanFolder(folder), degradation, **kwargs)


def _symmetries(picture: Tensor) -> list[Tensor]:
    return [turned for x in (picture, picture.flip(-1)) for turned in (x.rot90(k, (-2, -1)) for k in range(4))]


def _place(crop: Tensor, photo: Tensor) -> tuple[int, int] | None:
    """Where a crop was cut: photos of noise have no two equal corners of 4 x 4 pixels."""
    windows = photo.unfold(1, 4, 1).unfold(2, 4, 1)
    found = (windows == crop[:, None, None, :4, :4]).all(0).flatten(2).all(-1).nonzero().tolist()
    for top, left in found:
        if torch.equal(photo[:, top : top + crop.shape[1], left : left + crop.shape[2]], crop):
            return top, left
    return None


def test_crops_are_parts_of_photos_in_all_symmetries(folder: Path):
    (folder / "small.png").unlink()
    photos = [to_tensor(read_photo(folder / name).pixels) for name in ("a.png", "b.png")]
    batch = _loader(folder, schedule=[(1, 16, 64)]).batch(0)
    seen = set()
    for crop in batch["gt"]:
        found = [
            (number, symmetry)
            for number, photo in enumerate(photos)
            for symmetry, turned in enumerate(_symmetries(crop))
            if _place(turned, photo) is not None
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 16  # every photo in every symmetry
    assert batch["inputs"].shape == batch["gt"].shape == (64, 3, 16, 16) and batch["gt"].dtype == torch.float32


def test_iterations_are_the_same_after_a_resume(folder: Path):
    whole = list(itertools.islice(_loader(folder, schedule=[(3, 16, 4), (3, 32, 2)]), 9))
    resumed = _loader(folder, schedule=[(3, 16, 4), (3, 32, 2)])
    resumed.iteration = 2
    for expected, got in zip(whole[2:], resumed, strict=False):
        assert all(torch.equal(expected[key], got[key]) for key in expected)
    assert resumed.iteration >= 9 and [len(batch["gt"]) for batch in whole] == [4] * 3 + [2] * 6
    assert not torch.equal(whole[0]["gt"], whole[1]["gt"])
    other = _loader(folder, seed=1).batch(0)["gt"]
    assert not torch.equal(other, _loader(folder, seed=0).batch(0)["gt"])


def test_processes_share_one_batch(folder: Path):
    whole = _loader(folder).batch(5)
    parts = [_loader(folder, rank=rank, world_size=4).batch(5) for rank in range(4)]
    for key in whole:
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])


@pytest.mark.parametrize("degradation", [Downsample(4), GaussianBlur(noise=0)], ids=str)
def test_lq_is_a_part_of_the_degraded_photo(tmp_path: Path, degradation):
    pixels = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    gt = to_tensor(read_photo(tmp_path / "a.png").pixels)
    lq = degradation(gt[None], torch.Generator())["lq"][0]
    scale, compared = degradation.scale, 0
    tolerance = 1.01 / 255 if scale > 1 else 1e-6  # rounded to bytes after the columns: a turned crop after its rows
    batch = _loader(tmp_path, degradation, schedule=[(1, 32, 64)]).batch(0)
    for crop, crop_lq in zip(batch["gt"], batch["inputs"], strict=True):
        for turned, turned_lq in zip(_symmetries(crop), _symmetries(crop_lq), strict=True):
            place = _place(turned, gt)
            if place is not None and place[0] % scale == place[1] % scale == 0:
                top, left = (corner // scale for corner in place)
                expected = lq[:, top : top + 32 // scale, left : left + 32 // scale]
                torch.testing.assert_close(turned_lq, expected, rtol=0, atol=tolerance)
                compared += 1
    assert compared


def test_pairs_are_cropped_at_one_place(tmp_path: Path):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        small = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        for root, pixels in (("lq", small), ("gt", small.repeat(3, 0).repeat(3, 1))):
            (tmp_path / root).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / root / f"{name}.png"), pixels)
    pairs = PairedFolder(tmp_path / "lq", tmp_path / "gt", scale=3)
    batch = CropLoader(pairs, schedule=[(1, 24, 16)], device="cpu").batch(0)
    assert batch["inputs"].shape == (16, 3, 8, 8)
    assert torch.equal(batch["inputs"].repeat_interleave(3, 2).repeat_interleave(3, 3), batch["gt"])


def test_photos_smaller_than_a_patch_are_mirrored(folder: Path):
    for name in ("a.png", "b.png"):
        (folder / name).unlink()
    gt = _loader(folder, schedule=[(1, 32, 16)]).batch(0)["gt"]
    photo = to_tensor(read_photo(folder / "small.png").pixels).numpy()
    expected = torch.from_numpy(np.pad(photo, ((0, 0), (0, 23), (0, 21)), mode="reflect"))
    assert all(any(torch.equal(turned, expected) for turned in _symmetries(crop)) for crop in gt)


def test_bad_photos_are_skipped_and_counted(folder: Path):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "empty.jpg").touch()
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 64, 4), dtype=np.uint16)
    cv2.imwrite(str(folder / "deep.png"), pixels)
    loader = _loader(folder)
    assert len(loader.skipped) == 2 and "a.png: truncated" in loader.skipped[0] and loader.transparent == 1
    assert torch.isfinite(loader.batch(0)["gt"]).all()
    for name in ("b.png", "small.png", "deep.png"):
        (folder / name).unlink()
    with pytest.raises(DatasetError, match="none of 2 photos can be used"):
        _loader(folder)


def test_gray_and_wrong_schedules(folder: Path):
    loader = CropLoader(CleanFolder(folder, gray=True), JPEG((10, 40)), schedule=[(1, 16, 2)], device="cpu")
    assert loader.batch(0)["inputs"].shape == (2, 1, 16, 16)
    for wrong in (dict(schedule=[(1, 18, 4)]), dict(schedule=[(1, 16, 3)], rank=0, world_size=2)):
        with pytest.raises(ValueError, match="multiple of"):
            _loader(folder, Downsample(4), **wrong)


def test_works_inside_a_torch_loader(folder: Path):
    batch = next(iter(DataLoader(_loader(folder), batch_size=None)))
    assert torch.equal(batch["inputs"], _loader(folder).batch(0)["inputs"]) and batch["sigma"].shape == (8,)


@pytest.mark.gpu
def test_gpu_cuts_what_the_cpu_cuts(folder: Path):
    for degradation in (NOISE, Downsample(4)):
        cpu, gpu = (_loader(folder, degradation, device=device).batch(7) for device in ("cpu", "cuda"))
        torch.testing.assert_close(cpu["gt"], gpu["gt"].cpu(), rtol=0, atol=1e-7)  # a GPU divides by 255 in its own way
    levels = ((cpu["inputs"] - gpu["inputs"].cpu()) * 255).abs()  # of 8 bits: halves may be rounded the other way
    assert levels.max() < 1.001 and (levels > 0.5).float().mean() < 1e-3
