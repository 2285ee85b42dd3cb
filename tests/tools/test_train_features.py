import cv2
import numpy as np
import pytest

from mambavision.diffusion.features import load_classifier, load_features
from tests.tools.running import refusal, run_tool


@pytest.fixture
def train(monkeypatch, capfd):
    return lambda *args: run_tool(monkeypatch, capfd, "train_features", *args, "--device", "cpu")


def test_pictures_that_differ_in_colour_are_told_apart(train, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 5)):
        for name, colour in (("blue", (200, 30, 30)), ("red", (30, 30, 200))):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture = np.clip(rng.normal(colour, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(tmp_path / split / name / f"{i}.png"), picture)
    out = tmp_path / "new" / "f.safetensors"
    code, text, err = train("pictures", tmp_path, out, "--epochs", 15, "--batch-size", 16, "--lr", 0.05)
    assert code == 0 and "test accuracy 1.0000" in text, err
    _, metadata = load_classifier(out)
    assert metadata["classes"] == '["blue", "red"]' and metadata["test_accuracy"] == "1.0000"
    assert load_features(out).modality == "image"


def test_clips(train, tmp_path):
    code, text, err = train("clips", tmp_path / "f.safetensors", "--num", 8, "--steps", 2, "--batch-size", 22)
    assert code == 0 and "0.36 M parameters, test accuracy 0." in text, err
    assert load_features(tmp_path / "f.safetensors").modality == "video"
    limited = ("--num", 8, "--steps", 100_000, "--batch-size", 22, "--max-seconds", 1)
    code, text, err = train("clips", tmp_path / "g.safetensors", *limited)
    assert code == 0 and (tmp_path / "g.safetensors").is_file(), err


def test_bad_input_is_refused_in_one_line(train, tmp_path):
    (tmp_path / "train").mkdir()
    for place in ("train/a", "train/b", "test/a"):
        (tmp_path / "other" / place).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "other" / place / "0.png"), np.zeros((8, 8, 3), np.uint8))
    for arguments, message in (
        (["pictures", tmp_path / "gone", tmp_path / "f.safetensors"], "no such photo, folder or video"),
        (["pictures", tmp_path / "other", tmp_path / "f.safetensors", "--epochs", 1], "the classes a, b, test has a"),
        (["pictures", tmp_path, tmp_path / "f.safetensors"], "no photos in this folder"),
        (["pictures", tmp_path, tmp_path / "f.safetensors", "--epochs", 0], "must be at least 1"),
    ):
        assert message in refusal(train(*arguments))
