"""Latents in place of pixels: encoded once, in shards, the same after an interruption."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from mambavision.diffusion import latents
from mambavision.diffusion.batches import NoisyBatches
from mambavision.diffusion.datasets import ImageFolder, VideoFolder
from mambavision.diffusion.latents import LatentShards, cache_latents, decode, encode, load_autoencoder
from mambavision.engine.photos import DatasetError
from tests.diffusion.drawn import Drawn
from tests.diffusion.test_batches import Broken


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()  # fmt: skip


def test_latents_are_scaled_modes_and_come_back(autoencoder):
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    z = encode(autoencoder, x)
    mode = autoencoder.encode(x).latent_dist.mode()
    assert z.shape == (2, 2, 4, 4) and not z.requires_grad
    torch.testing.assert_close(z, (mode - 0.25) * 0.5)
    torch.testing.assert_close(decode(autoencoder, z), autoencoder.decode(mode).sample)
    video = torch.stack([x, -x, x], 2)
    of_video = encode(autoencoder, video)
    assert of_video.shape == (2, 2, 3, 4, 4)
    torch.testing.assert_close(of_video[:, :, 0], z)
    assert decode(autoencoder, of_video).shape == video.shape


def test_a_trained_autoencoder_gives_the_photo_back(tiny_autoencoder):
    photo = cv2.imread(str(Path(__file__).parents[2] / "demo/cells/val/smear_001.jpg"))[:128, :128]
    x = torch.from_numpy(photo[None, ..., ::-1] / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    z = encode(tiny_autoencoder, x)
    assert z.shape == (1, 4, 64, 64) and 0.5 < z.std() < 2
    assert (decode(tiny_autoencoder, z) - x).square().mean() < 4 * 10 ** (-26 / 10)  # over 26 dB


def test_shards_hold_every_item_and_its_mirror_image(autoencoder, tmp_path):
    dataset = Drawn(10, flip=True)
    assert cache_latents(dataset, autoencoder, tmp_path, batch_size=3, shard_items=4) == []
    found = LatentShards(tmp_path)
    assert (found.size, found.channels, found.class_names) == ((4, 4), 2, dataset.class_names) and not found.flip
    assert len(found) == 20 and len(list(tmp_path.glob("shard_*.safetensors"))) == 3
    pixels = dataset.x_0(torch.from_numpy(dataset[7].frames))
    for i, x in ((14, pixels), (15, pixels.flip(-1))):
        assert found[i].label == 1 and found[i].frames.dtype == np.float16
        np.testing.assert_allclose(found[i].frames, encode(autoencoder, x).numpy(), atol=2e-3)
    batch = NoisyBatches(found, 4, device="cpu").batch(0)
    assert batch["inputs"].shape == (4, 2, 4, 4) and batch["inputs"].dtype == torch.float32


def test_clips_of_latents(autoencoder, tmp_path):
    cache_latents(Drawn(3, (2, 8, 8), frames=5), autoencoder, tmp_path)
    found = LatentShards(tmp_path)
    assert found.size == (2, 4, 4) and found[0].frames.shape == (5, 2, 4, 4)
    assert NoisyBatches(found, 3, device="cpu").batch(0)["inputs"].shape == (3, 2, 2, 4, 4)


def test_an_interrupted_run_goes_on(autoencoder, tmp_path, monkeypatch):
    cache_latents(Broken(12), autoencoder, tmp_path / "whole", shard_items=4)
    calls = []

    def dies(*args):
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(latents, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        cache_latents(Broken(12), autoencoder, tmp_path / "cut", shard_items=4)
    with pytest.raises(DatasetError, match="no whole set of latents, make it with tools/cache_latents.py"):
        LatentShards(tmp_path / "cut")
    skipped = cache_latents(Broken(12), autoencoder, tmp_path / "cut", shard_items=4)
    assert len(calls) == 4 and skipped == [f"{i}.png: truncated photo" for i in (0, 3, 6, 9)]
    whole, cut = LatentShards(tmp_path / "whole"), LatentShards(tmp_path / "cut")
    assert len(whole) == len(cut) == 8
    assert all(np.array_equal(whole[i].frames, cut[i].frames) and whole[i].label == cut[i].label for i in range(8))
    assert not list(tmp_path.glob("*/.*"))
    other = copy.deepcopy(autoencoder)
    next(other.parameters()).data[0] += 1e-3
    scaled = copy.deepcopy(autoencoder)
    scaled.register_to_config(scaling_factor=0.25)
    for changed in ((Broken(11), autoencoder), (Broken(12), other), (Broken(12), scaled)):
        with pytest.raises(ValueError, match="holds latents of another set, or by another autoencoder"):
            cache_latents(*changed, tmp_path / "cut", shard_items=4)


def test_latents_of_other_photos_of_the_same_number_are_refused(tiny_autoencoder, tmp_path):
    for folder, names in (("a", "12"), ("moved", "12"), ("b", "13")):
        for name in names:
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(path), np.full((16, 16), 9, np.uint8))
    for folder in ("a", "moved"):
        cache_latents(ImageFolder(tmp_path / folder, (16, 16)), tiny_autoencoder, tmp_path / "out")
    with pytest.raises(ValueError, match="holds latents of another set"):
        cache_latents(ImageFolder(tmp_path / "b", (16, 16)), tiny_autoencoder, tmp_path / "out")


def test_latents_of_a_folder_whose_frames_changed_are_refused(tiny_autoencoder, tmp_path):
    folder = tmp_path / "videos" / "one"
    folder.mkdir(parents=True)
    for count in (2, 3):
        for i in range(count):
            cv2.imwrite(str(folder / f"{i}.png"), np.full((16, 16), i, np.uint8))
        videos = VideoFolder(tmp_path / "videos", (2, 16, 16))
        if count == 2:
            cache_latents(videos, tiny_autoencoder, tmp_path / "out")
    with pytest.raises(ValueError, match="holds latents of another set"):
        cache_latents(videos, tiny_autoencoder, tmp_path / "out")


def test_a_photo_that_is_not_there_is_left_out(tiny_autoencoder, tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), np.full((16, 16), 9, np.uint8))
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "nowhere.png")
    (left_out,) = cache_latents(ImageFolder(tmp_path / "in", (16, 16)), tiny_autoencoder, tmp_path / "out")
    assert "b.png" in left_out


def test_an_autoencoder_that_lacks_tensors_is_refused(tiny_autoencoder, tmp_path):
    tiny_autoencoder.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: v for name, v in tensors.items() if not name.startswith("decoder.conv_in")}, path)
    with pytest.raises(ValueError, match=r"lack 2 tensors of the autoencoder, first decoder\.conv_in"):
        load_autoencoder(tmp_path)


def test_what_does_not_fit_is_refused(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "ae")
    again = load_autoencoder(tmp_path / "ae")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), autoencoder.parameters(), strict=True))
    colour = Drawn()
    colour.channels = 3
    with pytest.raises(ValueError, match="the data set has 3 channels, the autoencoder takes 1"):
        cache_latents(colour, autoencoder, tmp_path / "x")
    odd = Drawn()
    odd.size = (8, 7)
    with pytest.raises(ValueError, match="8 x 7 pixels: sides must be multiples of 2"):
        cache_latents(odd, autoencoder, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(DatasetError, match="none of 1 items can be used; 0.png"):
        cache_latents(Broken(1), autoencoder, tmp_path / "y")
    with pytest.raises(FileNotFoundError, match="no folder of an autoencoder"):
        load_autoencoder(tmp_path / "gone")
    weights = next((tmp_path / "ae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not an AutoencoderKL with safetensors weights"):
        load_autoencoder(tmp_path / "ae")
    (tmp_path / "z").mkdir()
    (tmp_path / "z/index.json").write_text(json.dumps({"size": [4, 4]}))
    with pytest.raises(DatasetError, match="no whole set of latents"):
        LatentShards(tmp_path / "z")
