from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from PIL import Image

from mambavision.engine.photos import DatasetError
from mambavision.restoration.datasets import CleanFolder, EvaluationSet, EvaluationSets, PairedFolder, read_photo
from mambavision.restoration.degradations import Downsample, GaussianNoise


def _write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_a_photo_keeps_its_channels_and_bits(tmp_path: Path, colours: np.ndarray):
    rgb = colours[..., ::-1]
    assert np.array_equal(read_photo(_write(tmp_path / "a.png", colours)).pixels, rgb)
    deep = colours.astype(np.uint16) * 257
    assert np.array_equal(read_photo(_write(tmp_path / "deep.png", deep)).pixels, deep[..., ::-1])
    transparent = read_photo(_write(tmp_path / "alpha.png", np.dstack([colours, colours[..., 0]])))
    assert np.array_equal(transparent.pixels, rgb) and transparent.had_alpha
    gray = _write(tmp_path / "gray.png", colours[..., 0])
    assert np.array_equal(read_photo(gray, gray=True).pixels, colours[..., :1])
    assert np.array_equal(read_photo(gray).pixels, colours[..., :1].repeat(3, axis=2))


def test_gray_is_matlabs(tmp_path: Path, colours: np.ndarray):
    rgb = colours[..., ::-1].astype(float)
    path = _write(tmp_path / "a.png", colours)
    full = rgb @ [0.298936, 0.587043, 0.114021]
    limited = 16 + rgb @ [65.481, 128.553, 24.966] / 255
    for expected, gray_range in ((full, "full"), (limited, "limited")):
        got = read_photo(path, gray=True, gray_range=gray_range).pixels[..., 0]
        assert got.dtype == np.uint8 and np.abs(got - expected).max() < 0.51
    deep = read_photo(_write(tmp_path / "deep.png", colours.astype(np.uint16) * 257), gray=True, gray_range="limited")
    assert deep.pixels.dtype == np.uint16 and np.abs(deep.pixels[..., 0] - limited * 257).max() < 1


def test_exif_orientation_is_applied(tmp_path: Path, colours: np.ndarray):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(colours).save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").pixels.shape == (30, 20, 3)


def test_folders_are_searched_and_bad_files_named(tmp_path: Path, colours: np.ndarray):
    _write(tmp_path / "one" / "b.png", colours)
    _write(tmp_path / "one" / "deeper" / "a.jpg", colours)
    _write(tmp_path / "two" / "c.bmp", colours)
    (tmp_path / "one" / "notes.txt").write_text("no photo")
    photos = CleanFolder([tmp_path / "one", str(tmp_path / "two")])
    assert [path.name for path in photos.paths] == ["b.png", "a.jpg", "c.bmp"] and len(photos) == 3
    broken = tmp_path / "one" / "b.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DatasetError, match="b.png: truncated"):
        photos[0]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CleanFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: no photos"):
        CleanFolder(tmp_path / "empty")


def test_pairs_match_by_name_and_size(tmp_path: Path, colours: np.ndarray):
    _write(tmp_path / "blur" / "scene" / "1.jpg", colours)
    _write(tmp_path / "sharp" / "scene" / "1.png", colours)
    pair = PairedFolder(tmp_path / "blur", tmp_path / "sharp")[0]
    assert np.array_equal(pair.gt, colours[..., ::-1]) and pair.lq.shape == pair.gt.shape
    with pytest.raises(DatasetError, match=r"1.png: 30x20 pixels, expected 60x40 for .*1.jpg of 30x20 at scale 2"):
        PairedFolder(tmp_path / "blur", tmp_path / "sharp", scale=2)[0]
    _write(tmp_path / "sharp" / "scene" / "2.png", colours)
    with pytest.raises(DatasetError, match=r"sharp: 1 photos have no partner in .*blur, the first is scene/2"):
        PairedFolder(tmp_path / "blur", tmp_path / "sharp")


def test_evaluation_samples(tmp_path: Path, colours: np.ndarray):
    _write(tmp_path / "a.png", colours)
    photos = dict(type="CleanFolder", root=tmp_path)
    noisy = DATASETS.build(
        dict(type="EvaluationSet", photos=photos, degradation=dict(type="GaussianNoise", sigma=(25, 25)), name="noisy")
    )
    sample, again = noisy[0], noisy[0]
    assert sample["inputs"].shape == sample["gt"].shape == (3, 20, 30) and sample["set"] == "noisy"
    assert torch.equal(sample["inputs"], again["inputs"]) and sample["sigma"].item() == pytest.approx(25 / 255)
    np.testing.assert_allclose(sample["gt"].permute(1, 2, 0).numpy() * 255, colours[..., ::-1], atol=1e-4)
    small = EvaluationSet(CleanFolder(tmp_path), Downsample(8), name="small")
    assert small[0]["inputs"].shape == (3, 2, 3) and small[0]["gt"].shape == (3, 16, 24)
    both = EvaluationSets([noisy, small])
    assert [both[i]["set"] for i in range(len(both))] == ["noisy", "small"]
    paired = EvaluationSet(PairedFolder(tmp_path, tmp_path))
    assert torch.equal(paired[0]["inputs"], paired[0]["gt"])
    with pytest.raises(ValueError, match="CleanFolder needs a degradation"):
        EvaluationSet(CleanFolder(tmp_path))
    with pytest.raises(ValueError, match="PairedFolder takes no degradation"):
        EvaluationSet(PairedFolder(tmp_path, tmp_path), GaussianNoise((5, 5)))
