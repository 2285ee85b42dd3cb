import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mambavision.engine.photos import DatasetError
from mambavision.restoration import photo_sets
from mambavision.restoration.photo_sets import PHOTO_SETS, PhotoSet, check_disjoint, prepare
from tests.restoration.conftest import REPOSITORY, fetched

SETS = (
    PhotoSet("train/set", "owner/trains", ("*.jpg", "deep/*.bmp"), 3, leave_out=("known.jpg",)),
    PhotoSet("val/davis", "owner/frames", ("*/*.jpg",), 2, every=2),
    PhotoSet("test/set", "owner/tests", ("*.tif",), 1),
)


@pytest.fixture
def clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(photo_sets, "PHOTO_SETS", SETS)
    generator = np.random.default_rng(0)
    names = ["trains/a.jpg", "trains/b.jpg", "trains/known.jpg", "trains/deep/c.bmp", "tests/t.tif"]
    names += [f"frames/{scene}/{i}.jpg" for scene in "xy" for i in range(2)]
    for name in names:
        path = tmp_path / "clones" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path), cv2.resize(coarse, (80, 60), interpolation=cv2.INTER_CUBIC))
    return tmp_path / "clones"


def test_gathers_every_set(clones: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert prepare(clones, out) == {"train/set": 3, "val/davis": 2, "test/set": 1}
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    assert found == [
        "test/set/t.png",
        "train/set/a.jpg",
        "train/set/b.jpg",
        "train/set/c.png",
        "val/davis/x_0.jpg",
        "val/davis/y_0.jpg",
    ]
    assert (out / "train/set/a.jpg").read_bytes() == (clones / "trains/a.jpg").read_bytes()
    assert np.array_equal(cv2.imread(str(out / "test/set/t.png")), cv2.imread(str(clones / "tests/t.tif")))
    (out / "train/set/a.jpg").unlink()
    prepare(clones, out)
    assert not (out / "train/set/a.jpg").exists(), "what is there is left alone"


def test_says_what_is_missing(clones: Path, tmp_path: Path):
    (clones / "tests" / "t.tif").unlink()
    with pytest.raises(DatasetError, match=r"expected 1 photos for test/set in \*.tif, found 0"):
        prepare(clones, tmp_path / "out")
    (clones / "tests").rmdir()
    with pytest.raises(DatasetError, match="git clone https://github.com/owner/tests"):
        prepare(clones, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finds_a_test_photo_in_disguise(clones: Path, tmp_path: Path):
    test = cv2.imread(str(clones / "tests" / "t.tif"), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(clones / "trains" / "a.jpg"), cv2.resize(test, (50, 40), interpolation=cv2.INTER_AREA))
    with pytest.raises(DatasetError, match=r"a.jpg is the test photo .*t.png"):
        prepare(clones, tmp_path / "out")


def test_the_gathered_photos_are_whole():
    root = fetched("train").parent
    for photo_set in PHOTO_SETS:
        assert len(list((root / photo_set.folder).glob("*.*"))) == photo_set.count
    validation = {path.stem for path in (root / "test" / "bsd100").iterdir()}
    assert {path.stem for path in (root / "test" / "cbsd68").iterdir()} <= validation
    assert not validation & {path.stem for path in (root / "train" / "bsd400").iterdir()}
    check_disjoint(root / "train", root / "test")


def test_tool_fails_in_one_line(tmp_path: Path):
    command = [sys.executable, "tools/prepare_restoration_data.py", "--mirror", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "git clone" in done.stderr
    assert done.stderr.count("\n") == 1
