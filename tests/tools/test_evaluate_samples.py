import json

import cv2
import numpy as np
import pytest
import torch

from mambavision.diffusion import features
from mambavision.diffusion.features import SmallClassifier, SmallVideoClassifier
from mambavision.diffusion.outputs import write_mp4
from tests.tools.running import refusal, run_tool

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_features(tmp_path, monkeypatch):
    """Random features in place of those that ship."""
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    for kind in (SmallClassifier, SmallVideoClassifier):
        features.save(kind(3, dims=(4, 6), input_size=16), folder / f"{kind.__name__}.safetensors", classes="abc")
    monkeypatch.setattr(features, "WEIGHTS_FOLDER", folder)
    return folder


@pytest.fixture
def evaluate(monkeypatch, capfd):
    return lambda *args: run_tool(monkeypatch, capfd, "evaluate_samples", *args, "--device", "cpu")


def noise(count, low=0, high=255, size=(16, 16)):
    return RNG.integers(low, high, (count, *size, 3), np.uint8)


def save_pictures(folder, pictures):
    folder.mkdir()
    for i, picture in enumerate(pictures):
        cv2.imwrite(str(folder / f"{i}.png"), picture[..., ::-1])
    return folder


def test_a_nearer_set_is_nearer(evaluate, tmp_path):
    reference = save_pictures(tmp_path / "real", noise(40, 50, 200, size=(20, 24)))
    distances = {}
    for name, samples in (("near", noise(30, 50, 200)), ("far", noise(30, 0, 20))):
        np.savez(tmp_path / f"{name}.npz", arr_0=samples)
        out = tmp_path / "new" / f"{name}.json"
        code, text, err = evaluate(tmp_path / f"{name}.npz", "--reference", reference, "--out", out)
        assert code == 0, err
        distances[name] = json.loads(out.read_text())
        assert f"30 samples against 40 of {reference}, features: SmallClassifier" in text and "FID" not in text
    near, far = distances["near"], distances["far"]
    assert near["frechet_distance"] < 0.1 * far["frechet_distance"]
    assert abs(near["kernel_distance"]) < 0.1 * far["kernel_distance"]
    assert far["samples"] == 30 and far["reference"] == 40


def test_features_of_a_reference_are_kept(evaluate, tmp_path):
    samples = save_pictures(tmp_path / "samples", noise(12))
    cv2.imwrite(str(samples / "grid.png"), np.zeros((90, 90, 3), np.uint8))
    np.savez(tmp_path / "real.npz", arr_0=noise(20))
    kept = tmp_path / "cache" / "kept.npz"
    _, first, err = evaluate(samples, "--reference", tmp_path / "real.npz", "--save-reference", kept)
    assert kept.is_file(), err
    code, again, err = evaluate(samples, "--reference", kept)
    assert code == 0 and again.splitlines()[:2] == first.splitlines()[:2], err
    np.savez(tmp_path / "large.npz", arr_0=noise(12, size=(32, 24)))
    for reference in (kept, tmp_path / "real.npz"):
        line = refusal(evaluate(tmp_path / "large.npz", "--reference", reference))
        assert "holds samples of 32x24" in line and "of 16x16: bring both to one size" in line
    torch.manual_seed(1)
    features.save(SmallClassifier(3, dims=(4, 6)), tmp_path / "other.safetensors", classes="abc")
    line = refusal(evaluate(samples, "--reference", kept, "--features", tmp_path / "other.safetensors"))
    assert "compute both by one" in line


def test_clips(evaluate, own_features, tmp_path):
    clips = np.stack([noise(6) for _ in range(8)])
    np.savez(tmp_path / "a.npz", arr_0=clips)
    (tmp_path / "real").mkdir()
    for i in range(5):
        write_mp4(tmp_path / "real" / f"{i}.mp4", noise(9, size=(32, 32)))
    code, text, err = evaluate(tmp_path / "a.npz", "--reference", tmp_path / "real", "--num", 7)
    assert code == 0 and "7 samples against 5 of" in text and "SmallVideoClassifier" in text, err
    frames = ("--features", own_features / "SmallClassifier.safetensors")
    code, text, err = evaluate(tmp_path / "a.npz", "--reference", tmp_path / "a.npz", *frames)
    assert code == 0 and "mean over frames" in text and "distance   0.0000" in text, err


def test_training_set_of_a_config_is_a_reference(evaluate, tmp_path):
    real = save_pictures(tmp_path / "real", noise(6))
    (tmp_path / "c.py").write_text(
        f"train_dataloader = dict(dataset=dict(type='ImageFolder', root={str(real)!r}, size=(16, 16)))\n"
        "model = test_dataloader = optim_wrapper = dict()\n"
    )
    np.savez(tmp_path / "a.npz", arr_0=noise(6))
    code, text, err = evaluate(tmp_path / "a.npz", "--reference", tmp_path / "c.py")
    assert code == 0 and "6 samples against 6 of" in text, err


def test_what_cannot_be_read_is_left_out_and_counted(evaluate, tmp_path):
    real = save_pictures(tmp_path / "real", noise(6))
    (real / "2.png").write_bytes((real / "2.png").read_bytes()[:100])
    np.savez(tmp_path / "a.npz", arr_0=noise(6))
    code, text, err = evaluate(tmp_path / "a.npz", "--reference", real)
    assert code == 0 and "6 samples against 5 of" in text
    assert f"note: 1 of {real} cannot be read, first {real / '2.png'}: truncated" in err


def test_bad_input_is_refused_in_one_line(evaluate, tmp_path, own_features):
    good, empty = tmp_path / "good.npz", tmp_path / "empty"
    np.savez(good, arr_0=noise(4))
    np.savez(tmp_path / "floats.npz", arr_0=noise(4) / 255)
    np.savez(tmp_path / "clips.npz", arr_0=noise(4)[None])
    (tmp_path / "text.npz").write_text("nothing")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:100])
    empty.mkdir()
    mixed = save_pictures(tmp_path / "mixed", [noise(1)[0], noise(1, size=(8, 8))[0]])
    for arguments, message in (
        ([tmp_path / "gone.npz", "--reference", good], "gone.npz: no such file or folder of samples"),
        ([good, "--reference", tmp_path / "gone"], "gone: no such file or folder of samples"),
        ([tmp_path / "text.npz", "--reference", good], "text.npz: not an .npz file of samples, or a damaged one"),
        ([tmp_path / "floats.npz", "--reference", good], "arr_0 is float64 (4, 16, 16, 3); uint8"),
        ([good, "--reference", tmp_path / "clips.npz"], "holds videos, SmallClassifier"),
        ([empty, "--reference", good], "no photos in this folder"),
        ([mixed, "--reference", good], "compare those of one size"),
        ([good, "--reference", good, "--num", 5], "holds 4, fewer than the 5 that are asked for"),
        ([good, "--reference", good, "--num", 1], "--num at least 2"),
        ([good, "--reference", good, "--batch-size", 0], "--batch-size must be at least 1"),
        ([good, "--reference", good, "--features", tmp_path / "gone.pt"], "no feature network at"),
        ([good, "--reference", good, "--out", good / "m.json"], "is a file, a folder is wanted"),
        ([good, "--reference", good, "--save-reference", tmp_path / "r.txt"], "r.txt: features are written as .npz"),
        ([good, "--reference", tmp_path / "cut.npz"], "cut.npz: not an .npz file of samples, or a damaged one"),
    ):
        assert message in refusal(evaluate(*arguments)), arguments
    for path in own_features.iterdir():
        path.unlink()
    assert "no features of images in" in refusal(evaluate(good, "--reference", good))


def test_what_is_compared_is_not_overwritten(evaluate, tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=noise(12))
    before = (tmp_path / "b.npz").read_bytes()
    for option, name in (("--save-reference", "b"), ("--save-reference", "a"), ("--out", "b")):
        arguments = (tmp_path / "a.npz", "--reference", tmp_path / "b.npz", option, tmp_path / f"{name}.npz")
        assert f"{name}.npz: this file is to be read; name another" in refusal(evaluate(*arguments))
    assert (tmp_path / "b.npz").read_bytes() == before


def test_damaged_and_misnamed_files_are_refused_in_one_line(evaluate, tmp_path):
    good = tmp_path / "good.npz"
    np.savez(good, arr_0=noise(12))
    np.savez_compressed(tmp_path / "damaged.npz", arr_0=noise(12))
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[300:700] = bytes(400)
    (tmp_path / "damaged.npz").write_bytes(data)
    np.save(tmp_path / "array.npy", noise(12))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("damaged", "array"):
        for samples, reference in ((tmp_path / f"{name}.npz", good), (good, tmp_path / f"{name}.npz")):
            line = refusal(evaluate(samples, "--reference", reference))
            assert f"{name}.npz: not an .npz file of samples, or a damaged one" in line
    assert evaluate(good, "--reference", good, "--save-reference", tmp_path / "kept.npz")[0] == 0
    data = bytearray((tmp_path / "kept.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    (tmp_path / "kept.npz").write_bytes(data)
    assert "kept.npz: " in refusal(evaluate(good, "--reference", tmp_path / "kept.npz"))


def test_the_grid_of_a_folder_of_samples_is_no_sample(evaluate, tmp_path):
    folder = save_pictures(tmp_path / "reference", noise(5))
    cv2.imwrite(str(folder / "grid.png"), noise(1, size=(50, 50))[0])
    np.savez(tmp_path / "ours.npz", arr_0=noise(4))
    for counted in (6, 5):  # as photos of any folder, then as what tools/sample.py writes
        code, text, err = evaluate(tmp_path / "ours.npz", "--reference", folder)
        assert code == 0, err
        assert f"4 samples against {counted} of" in text
        (folder / "samples.json").touch()
