import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mambavision.backbones.conv_unet import conv_unet
from mambavision.backbones.dncnn import dncnn
from mambavision.backbones.serpent import serpent_debug
from mambavision.backbones.window_transformer import window_transformer
from mambavision.engine.checkpoint import CheckpointError
from mambavision.restoration import weights


@pytest.mark.parametrize("make", [serpent_debug, dncnn, conv_unet, window_transformer])
def test_file_rebuilds_the_network_without_a_config(make, tmp_path):
    torch.manual_seed(0)
    net = make(in_channels=1, sigma_input=True).eval()
    said = {"degradation": {"type": "GaussianNoise", "sigma": [0, 55]}, "sigma_range": [0, 55], "training_data": "none"}
    weights.save(net, tmp_path / "w.safetensors", task="denoise_gray", metadata=said, precision="fp32")
    loaded, metadata = weights.load(tmp_path / "w.safetensors")
    assert type(loaded) is type(net) and loaded.config == net.config and not loaded.training
    x, sigma = torch.rand(1, 1, 16, 16), torch.tensor([0.1])
    assert torch.equal(loaded(x, sigma), net(x, sigma))
    assert {name: metadata[name] for name in said} == said
    assert metadata["task"] == "denoise_gray" and metadata["config"] == net.config


def test_half_precision_is_the_default(tmp_path):
    net = serpent_debug()
    weights.save(net, tmp_path / "w.safetensors", task="sr_x2")
    loaded, _ = weights.load(tmp_path / "w.safetensors")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, net.state_dict()[name].half().float()), name


def test_bad_weights_are_refused(tmp_path):
    path, net = tmp_path / "w.safetensors", serpent_debug()
    for wrong, options, message in (
        (net, dict(task="sharpen"), "task must be one of denoise_color"),
        (nn.Linear(1, 1), dict(task="jpeg"), "Linear cannot be rebuilt from a file"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.save(wrong, path, **options)
    with pytest.raises(ValueError, match="w.pth: published weights end in .safetensors"):
        weights.save(net, tmp_path / "w.pth", task="jpeg")
    net.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        weights.save(net, path, task="jpeg")
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        weights.load(path)
    fields = {"format": "mambavision-zoo/1", "task": "jpeg", "class": "Serpent", "config": "{}"}
    for change, message in (
        ({"format": "other"}, "does not say how to rebuild its network"),
        ({"class": "Nessie"}, "is of a Nessie, which is not known here: networks are Serpent, DnCNN"),
        (
            {"task": "diffusion", "class": "DiM"},
            r"holds a diffusion model \(DiM\), not a .* tools/sample.py",
        ),
        ({"task": "detection"}, r"holds a detector .*: it is for tools/detect.py --weights"),
        (
            {"config": '{"wings": 2}'},
            "is of a Serpent that cannot be built here: .*argument 'wings'",
        ),
    ):
        save_file({"x": torch.ones(1)}, path, metadata=fields | change)
        with pytest.raises(CheckpointError, match=message) as error:
            weights.load(path)
        assert "\n" not in str(error.value)
    weights.save(serpent_debug(), path, task="jpeg")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        weights.load(path)
