import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from mambavision.diffusion import features
from mambavision.diffusion.features import (
    FeatureExtractor,
    SmallClassifier,
    SmallVideoClassifier,
    extract,
    find_features,
    load_features,
    save,
)
from mambavision.diffusion.inception import resized
from mambavision.diffusion.metrics import FeatureSet
from mambavision.engine.checkpoint import CheckpointError

BATCH = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLIPS = BATCH[:, :, None].repeat(1, 1, 4, 1, 1)


def small(kind=SmallClassifier):
    torch.manual_seed(0)
    return kind(4, dims=(4, 8), input_size=16).eval()


@pytest.mark.parametrize(("kind", "batch"), [(SmallClassifier, BATCH), (SmallVideoClassifier, CLIPS)])
def test_own_features_come_back_from_their_file(kind, batch, tmp_path):
    net, path = small(kind), tmp_path / "f.safetensors"
    save(net, path, classes="abcd", metadata={"test_accuracy": "0.9"})
    extractor = load_features(path)
    found = extractor(batch)
    assert extractor.name.startswith(f"{kind.__name__} f (") and extractor.modality == net.modality
    assert found.shape == (3, 8) and found.dtype == torch.float32
    torch.testing.assert_close(found, net.features(batch.float() / 127.5 - 1), atol=2e-3, rtol=2e-3)  # saved in fp16
    loaded, metadata = features.load_classifier(path)
    assert loaded(batch.float() / 127.5 - 1).shape == (3, 4) and metadata["test_accuracy"] == "0.9"


def test_a_shipped_size_stays_below_a_megabyte(tmp_path):
    save(SmallClassifier(10), tmp_path / "f.safetensors", classes=list("0123456789"))
    assert (tmp_path / "f.safetensors").stat().st_size < 1e6


def test_other_sizes_are_resized():
    x = torch.rand(2, 3, 40, 24)
    assert small().features(x).shape == (2, 8)
    assert small(SmallVideoClassifier).features(x[:, :, None].expand(-1, -1, 5, -1, -1)).shape == (2, 8)


def test_the_name_tells_files_apart(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    for name in "ac":
        save(SmallClassifier(4, dims=(4, 8)), tmp_path / name / "f.safetensors", classes="abcd")
    shutil.copy(tmp_path / "a" / "f.safetensors", tmp_path / "b")
    a, b, c = (load_features(tmp_path / name / "f.safetensors").name for name in "abc")
    assert a == b != c


class Pixels(nn.Module):
    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return img.float().mean((2, 3)) if return_features else img.float()


class Clips(nn.Module):
    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        return x.float().mean((2, 3, 4)) * (2 if rescale and resize and return_features else 1)


class Plain(nn.Module):
    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img.float()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(tmp_path):
    for net in (Pixels(), Clips(), Plain()):
        torch.jit.script(net).save(str(tmp_path / f"{type(net).__name__}.pt"))
    pictures, clips = load_features(tmp_path / "Pixels.pt"), load_features(tmp_path / "Clips.pt")
    torch.testing.assert_close(pictures(BATCH), BATCH.float().mean((2, 3)))
    torch.testing.assert_close(clips(CLIPS), 2 * CLIPS.float().mean((2, 3, 4)))
    assert (pictures.modality, clips.modality) == ("image", "video") and "TorchScript Pixels" in pictures.name
    with pytest.raises(ValueError, match=r"returns \(3, 3, 16, 16\) for 3 images, features \(B, D\) are wanted"):
        load_features(tmp_path / "Plain.pt")(BATCH)


def test_efficientnet_lite0_by_the_names_of_its_package(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    torch.save({f"_blocks.{i}": value for i, value in enumerate(net.state_dict().values())}, tmp_path / "e.pth")
    extractor = load_features(tmp_path / "e.pth")
    big = torch.full((1, 3, 224, 224), 200, dtype=torch.uint8)
    big[..., :100, :] = 30
    with torch.inference_mode():
        want = net.forward_features((big.float() - 127) / 128).mean((2, 3))
    assert extractor(big).shape == (1, 1280) and extractor.name.startswith("EfficientNet-Lite0 e (")
    torch.testing.assert_close(extractor(big), want, atol=1e-4, rtol=1e-4)
    assert extractor(BATCH).shape == (3, 1280)


@pytest.fixture(scope="module")
def inception():
    """torchvision's, with 1008 outputs and means and variances that keep its values near 1."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(2, 3, 299, 299))
    return net.eval()


def test_inception_by_its_weights(inception, tmp_path, monkeypatch):
    # some converters leave the counters of batch norm out
    state = {name: value for name, value in inception.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "i.pth")
    extractor = load_features(tmp_path / "i.pth")
    assert extractor.name.startswith("Inception of 2015 i (") and extractor.modality == "image"
    big = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert extractor(BATCH).shape == (3, 2048)
    found, kept = extractor(big), []
    # torchvision's own blocks, their pools replaced in the library
    mean, inside = F.avg_pool2d, []

    def pool(x, **options):
        if inside:
            return F.max_pool2d(x, **options)
        return mean(x, **options, count_include_pad=False)

    monkeypatch.setattr("torchvision.models.inception.F.avg_pool2d", pool)
    inception.Mixed_7c.register_forward_pre_hook(lambda *_: inside.append(1))
    inception.avgpool.register_forward_hook(lambda module, x, y: kept.append(y.flatten(1)))
    with torch.inference_mode():
        inception((big.float() - 128) / 128)
    assert found.shape == (2, 2048) and float(kept[0].std()) > 0.01
    torch.testing.assert_close(found, kept[0], rtol=1e-4, atol=1e-5)


def test_inception_of_other_classes_is_refused(inception, tmp_path):
    state = inception.state_dict()
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "i.pth")
    with pytest.raises(CheckpointError, match="an Inception v3 of 1000 outputs: that of the FID, .* has 1008"):
        load_features(tmp_path / "i.pth")
    del state["Mixed_6a.branch3x3.conv.weight"]
    torch.save(state, tmp_path / "i.pth")
    with pytest.raises(CheckpointError, match=r"i.pth: Missing key.* \"Mixed_6a.branch3x3.conv.weight\""):
        load_features(tmp_path / "i.pth")


@pytest.mark.parametrize("length, side", [(32, 299), (299, 299), (512, 299)])
def test_pictures_are_resized_as_by_tensorflow_1(length, side):
    ramp = torch.arange(length, dtype=torch.float32).expand(1, 3, 7, length)
    want = (torch.arange(side, dtype=torch.float64) * length / side).clamp_max(length - 1)
    torch.testing.assert_close(resized(ramp, side)[0, 1, 5].double(), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(resized(ramp.mT, side)[0, 1, :, 5].double(), want, rtol=0, atol=1e-4)


def test_files_that_hold_no_features(tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature network at"):
        load_features(tmp_path / "gone.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="tensors of FID's Inception or the 296 of EfficientNet-Lite0"):
        load_features(tmp_path / "other.pth")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(CheckpointError):
        load_features(tmp_path / "text.pt")
    said = {"format": "mambavision-zoo/1", "task": "jpeg", "class": "Serpent", "config": "{}", "classes": "[]"}
    save_file({"x": torch.ones(1)}, tmp_path / "s.safetensors", metadata=said)
    with pytest.raises(CheckpointError, match="holds a restoration network .*, not a feature network: it is for"):
        load_features(tmp_path / "s.safetensors")


def test_own_features_are_found_by_what_they_compare(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="no features of videos in .* --features"):
        find_features("video")
    save_file(
        {"x": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "mambavision-zoo/1", "task": "jpeg"}
    )
    save(small(), tmp_path / "b.safetensors", classes="abcd")
    save(small(SmallVideoClassifier), tmp_path / "c.safetensors", classes="abcd")
    assert find_features("image").name == "b.safetensors" and find_features("video").name == "c.safetensors"


def test_pictures_features_of_clips_are_means_over_frames():
    pictures = FeatureExtractor("e", "image", torch.device("cpu"), lambda x: x.float().amax((2, 3)))
    clips = torch.stack([BATCH, BATCH.flip(0)], 2)
    want = (pictures(BATCH) + pictures(BATCH.flip(0))) / 2
    torch.testing.assert_close(features.over_frames(pictures)(clips), want)


def test_batches_of_another_kind_are_refused():
    extractor = FeatureExtractor("e", "image", torch.device("cpu"), lambda x: x.float().mean((2, 3)))
    assert extract(extractor, [BATCH, BATCH[:1]]).shape == (4, 3)
    for wrong in (CLIPS, BATCH.float(), BATCH[:, :1]):
        with pytest.raises(ValueError, match=r"e takes images as uint8 \(B, 3, H, W\)"):
            extractor(wrong)
    with pytest.raises(ValueError, match="no pictures"):
        extract(extractor, [])
    broken = FeatureExtractor("e", "image", torch.device("cpu"), lambda x: torch.full((len(x), 2), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        extract(broken, [BATCH])


def test_what_ships_belongs_together():
    pictures, clips = load_features(find_features("image")), load_features(find_features("video"))
    assert pictures(BATCH).shape == (3, 128) and clips(CLIPS).shape == (3, 64)
    reference = FeatureSet.load(features.WEIGHTS_FOLDER / "features_cifar10_train.npz")
    assert reference.extractor == pictures.name and reference.count == 50_000 and len(reference.mean) == 128
