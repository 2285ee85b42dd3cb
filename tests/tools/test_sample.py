import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mambavision.diffusion import cli, weights
from mambavision.diffusion.objectives import RectifiedFlow
from tests.diffusion.conftest import untrained, untrained_network
from tests.tools.running import refusal, run_tool


@pytest.fixture
def sample(monkeypatch, capfd, tmp_path):
    """Run tools/sample.py with random weights on the CPU, two steps; returns exit code, stdout and stderr."""
    folder = tmp_path / "weights"
    untrained().save_pretrained(folder)

    def call(*arguments):
        given = {"--weights": folder, "--steps": 2, "--num": 3, "--out-dir": tmp_path / "out"}
        options = [part for name, value in given.items() if name not in arguments for part in (name, value)]
        return run_tool(monkeypatch, capfd, "sample", *options, "--device", "cpu", *arguments)

    return call


def written(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def save_video(path, size=(4, 8, 8)):
    weights.save(untrained_network(size=size), path, objective=RectifiedFlow())
    return path


def test_pictures_and_a_grid(sample, tmp_path):
    code, text, err = sample("--classes", "fox", "0", "--guidance", 2, "--seed", 5)
    assert code == 0, err
    assert f"3 samples of weights: {tmp_path / 'out' / 'grid.png'} and 4 more files" in text and "sampling: 100%" in err
    assert written(tmp_path / "out") == ["00000.png", "00001.png", "00002.png", "grid.png", "samples.json"]
    assert Image.open(tmp_path / "out" / "grid.png").size == (22, 22)
    said = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert said["samples"] == [{"seed": 5, "class": "fox"}, {"seed": 6, "class": "cat"}, {"seed": 7, "class": "fox"}]
    assert (said["guidance_scale"], said["num_inference_steps"]) == (2, 2)
    assert (said["scheduler"], said["precision"]) == ("euler", "fp32") and said["weights"].endswith("weights")


def test_same_pictures_again_and_whatever_the_batch(sample, tmp_path):
    for out, options in (("a", []), ("b", ["--batch-size", 1]), ("c", ["--batch-size", 2]), ("d", ["--seed", 1])):
        assert sample("--out-dir", tmp_path / out, "--classes", "dog", *options)[0] == 0
    a, b, c, d = (pictures(tmp_path / name) for name in "abcd")
    assert np.array_equal(a, b) and np.array_equal(a, c)
    assert np.array_equal(a[1:], d[:2]) and not np.array_equal(a[0], a[1])


def test_an_archive_for_evaluators(sample, tmp_path):
    code, _, err = sample("--num", 5, "--save", "npz", "--batch-size", 2)
    assert code == 0 and written(tmp_path / "out") == ["samples.json", "samples.npz"], err
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1]
        archive = file["arr_0"]
    assert sample("--num", 5, "--out-dir", tmp_path / "single")[0] == 0
    assert np.array_equal(archive, pictures(tmp_path / "single"))


def test_clips(sample, tmp_path):
    path = save_video(tmp_path / "v.safetensors")
    code, _, err = sample("--video", "--num", 2, "--weights", path, "--save", "grid", "single", "npz", "--rate", 5)
    names = [f"{name}.{kind}" for name in ("00000", "00001", "grid") for kind in ("gif", "mp4")]
    assert code == 0 and written(tmp_path / "out") == sorted([*names, "samples.json", "samples.npz"]), err
    with Image.open(tmp_path / "out" / "grid.gif") as gif:
        assert gif.n_frames <= 4 and gif.size == (22, 12)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 4, 8, 8, 3) and file.files == ["arr_0"]


def test_default_weights_are_those_of_the_modality(sample, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(cli, "WEIGHTS_FOLDER", shipped)
    for video, kind in ((False, "pictures"), (True, "clips")):
        with pytest.raises(FileNotFoundError, match=f"no weights that sample {kind} in .* --weights"):
            cli.find_weights(video=video)
    save_file(
        {"x": torch.ones(1)}, shipped / "a.safetensors", metadata={"format": "mambavision-zoo/1", "task": "sr_x2"}
    )
    save_video(shipped / "b.safetensors")
    weights.save(untrained_network(in_channels=4), shipped / "c.safetensors", objective=RectifiedFlow())  # of latents
    weights.save(untrained_network(), shipped / "d.safetensors", objective=RectifiedFlow())
    assert cli.find_weights(video=True).name == "b.safetensors"
    assert cli.find_weights(video=False).name == "d.safetensors"


def test_pictures_come_right_after_installation(monkeypatch, capfd, tmp_path):
    code, text, err = run_tool(
        monkeypatch, capfd, "sample", "--num", 2, "--steps", 2, "--out-dir", tmp_path, "--device", "cpu"
    )
    assert code == 0, err
    assert "2 samples of dim_t_mlp_cifar10.safetensors" in text
    assert written(tmp_path) == ["00000.png", "00001.png", "grid.png", "samples.json"]
    assert [p.shape for p in pictures(tmp_path)] == [(32, 32, 3)] * 2
    said = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert said == [{"seed": 0, "class": "airplane"}, {"seed": 1, "class": "automobile"}]
    assert json.loads((tmp_path / "samples.json").read_text())["guidance_scale"] == 1.5


def test_a_training_checkpoint_with_its_config(sample, tmp_path, monkeypatch, capfd):
    config, path = tmp_path / "c.py", tmp_path / "iter_2.pth"
    config.write_text(
        "task = 'diffusion'\ncustom_imports = dict(imports=['mambavision.diffusion.register'])\n"
        "model = dict(type='Diffusion', objective=dict(type='RectifiedFlow'), compile=True,\n"
        "    network=dict(type='dim_debug', input_size=(8, 8), in_channels=3, num_classes=3))\n"
        "train_dataloader = test_dataloader = optim_wrapper = dict()\n"
    )
    state = {f"network.{name}": value for name, value in untrained_network(num_classes=3).state_dict().items()}
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ["cat", "dog", "fox"]}}}, path)
    code, _, err = sample("--config", config, "--weights", path, "--classes", "fox")
    assert code == 0, err
    assert sample("--classes", "fox", "--out-dir", tmp_path / "published")[0] == 0
    assert np.array_equal(pictures(tmp_path / "out"), pictures(tmp_path / "published"))
    assert "name the config it was trained by with --config" in refusal(sample("--weights", path))
    without = run_tool(monkeypatch, capfd, "sample", "--config", config, "--out-dir", tmp_path / "x")
    assert "--config is for a training checkpoint: name it with --weights" in refusal(without)
    config.write_text(config.read_text().replace("num_classes=3", "num_classes=2"))
    assert "does not fit this network" in refusal(sample("--config", config, "--weights", path))
    config.write_text(config.read_text().replace("input_size=(8, 8)", "input_size=(9, 8)"))
    assert "9 x 8 cannot be cut into patches" in refusal(sample("--config", config, "--weights", path))
    config.write_text(config.read_text().replace("'diffusion'\n", "'restoration'\n"))
    assert "is a config for restoration, not for diffusion" in refusal(sample("--config", config, "--weights", path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "3"], "class 3 is out of range: there are 3, from 0 to 2"),
        (["--classes=-1"], "class -1 is out of range"),
        (["--num", 1, "--classes", "cat", "cow"], "there is no class 'cow'"),
        (["--classes", "cow"], "there is no class 'cow': classes are cat, dog, fox"),
        (["--steps", 0], "0 steps cannot be taken: 1 to 1000 can"),
        (["--num", 0], "0 samples are asked for"),
        (["--guidance", -1], "guidance -1.0 must be at least 0"),
        (["--guidance", "inf"], "guidance inf must be at least 0, and at most 1000"),
        (["--seed", 2**64], "seed 18446744073709551616 is out of range: 64 bits hold"),
        (["--batch-size", 0], "a batch of 0"),
        (["--scheduler", "ddim"], "scheduler 'ddim' cannot sample a RectifiedFlow; those that can: euler"),
        (["--video"], "samples pictures, not clips: leave out --video"),
        (["--rate", 0], "0 frames a second"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
        (["--weights", "gone.safetensors"], "no weights file at gone.safetensors"),
        (["--autoencoder", "gone"], "gone: no folder of an autoencoder"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else "",
)
def test_bad_input_is_refused_in_one_line(arguments, message, sample, tmp_path):
    assert message in refusal(sample("--out-dir", tmp_path / "new" / "out", *arguments))
    assert not (tmp_path / "new").exists()


def test_what_fails_on_the_way_leaves_no_empty_folder(sample, tmp_path):
    network = untrained_network()
    next(network.parameters()).data.fill_(1e30)  # finite, but not what it gives
    weights.save(network, tmp_path / "w.safetensors", objective=RectifiedFlow(), precision="fp32")
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (tmp_path / "new" / "out", mine / "out", mine):
        line = refusal(sample("--weights", tmp_path / "w.safetensors", "--out-dir", out))
        assert "not finite in fp32: the weights are broken" in line
    assert not (tmp_path / "new").exists() and mine.is_dir() and not list(mine.iterdir())


def test_weights_of_another_task_or_size_are_refused(sample, tmp_path):
    fields = {"format": "mambavision-zoo/1", "task": "sr_x2", "class": "Serpent", "config": "{}"}
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors", metadata=fields)
    line = refusal(sample("--weights", tmp_path / "other.safetensors"))
    assert "holds a restoration network (Serpent, sr_x2), not a diffusion model: it is for tools/restore.py" in line
    path = save_video(tmp_path / "v.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = metadata["config"].replace('"d_model": 32', '"d_model": 64')
    save_file(load_file(path), path, metadata=metadata)
    assert "does not fit this network" in refusal(sample("--weights", path))
    metadata["config"] = metadata["config"].replace("[4, 8, 8]", "[4, 9, 8]")
    save_file(load_file(path), path, metadata=metadata)
    assert "cannot be built here" in refusal(sample("--weights", path))


def test_the_output_folder_must_be_free_and_writable(sample, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert "is a file, a folder is wanted" in refusal(sample("--out-dir", tmp_path / "file" / "out"))
    assert sample()[0] == 0
    before = (tmp_path / "out" / "00000.png").read_bytes()
    line = refusal(sample("--seed", 9))
    assert "exists already: name another --out-dir, or pass --overwrite" in line
    assert (tmp_path / "out" / "00000.png").read_bytes() == before
    assert sample("--seed", 9, "--overwrite")[0] == 0
    assert (tmp_path / "out" / "00000.png").read_bytes() != before
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests run as root too, who may write anywhere
    assert "out cannot be written into; name another" in refusal(sample("--overwrite"))


def test_too_little_memory_says_what_is_needed(sample, monkeypatch, tmp_path):
    from mambavision.diffusion import pipeline

    monkeypatch.setattr(pipeline, "measure_peak", lambda call, device: 10**9)
    monkeypatch.setattr(pipeline, "free_memory", lambda device: 10**9)
    line = refusal(sample())
    assert "one 8x8 picture needs about 1.00 GB on cpu, 1.00 GB are free" in line and not (tmp_path / "out").exists()


def test_files_that_a_new_run_does_not_write_are_removed(sample, tmp_path):
    assert sample("--save", "grid", "single", "npz")[0] == 0
    for name in ("00001.gif", "grid.mp4"):  # of clips
        (tmp_path / "out" / name).touch()
    assert sample("--num", 1, "--save", "single", "--overwrite")[0] == 0
    assert written(tmp_path / "out") == ["00000.png", "samples.json"]


def test_single_files_of_more_samples_before_are_removed(sample, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/12345.txt").touch()
    for num in (4, 2):
        code, _, err = sample("--num", num, "--overwrite")
        assert code == 0, err
    assert written(tmp_path / "out") == ["00000.png", "00001.png", "12345.txt", "grid.png", "samples.json"]
