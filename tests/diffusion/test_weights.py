import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mambavision.backbones.dim import dim_debug
from mambavision.backbones.dit import dit_debug
from mambavision.diffusion import weights
from mambavision.diffusion.objectives import RectifiedFlow, VPrediction
from mambavision.engine.checkpoint import CheckpointError


@pytest.mark.parametrize("make", [dim_debug, dit_debug])
@pytest.mark.parametrize("objective", [VPrediction("cosine", min_snr_gamma=5.0), RectifiedFlow("logit_normal")])
def test_file_rebuilds_network_and_objective(make, objective, tmp_path):
    torch.manual_seed(0)
    net = make((8, 8), in_channels=3, num_classes=2).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    said = {"training_data": "none", "class_names": ["cat", "dog"]}
    weights.save(net, tmp_path / "w.safetensors", objective=objective, **said_as_arguments(said), precision="fp32")
    loaded, same, metadata = weights.load(tmp_path / "w.safetensors")
    assert type(loaded) is type(net) and loaded.config == net.config and not loaded.training
    assert same.config() == objective.config()
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 2])
    assert torch.equal(loaded(x, t, labels), net(x, t, labels))
    assert {name: metadata[name] for name in said} == said


def said_as_arguments(said):
    return {"class_names": said["class_names"], "metadata": {"training_data": said["training_data"]}}


def test_bad_weights_are_refused(tmp_path):
    net, objective = dim_debug((8, 8), in_channels=3), RectifiedFlow()
    with pytest.raises(ValueError, match="Linear cannot be rebuilt from a file"):
        weights.save(nn.Linear(1, 1), tmp_path / "w.safetensors", objective=objective)
    with pytest.raises(ValueError, match="w.pth: published weights end in .safetensors"):
        weights.save(net, tmp_path / "w.pth", objective=objective)
    next(net.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        weights.save(net, tmp_path / "w.safetensors", objective=objective)
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        weights.load(path)
    right = '{"input_size": [8, 8], "d_model": 32, "depth": 1, "headdim": 16}'
    fields = {"format": "mambavision-zoo/1", "task": "diffusion", "class": "DiM", "config": right}
    fields["objective"] = '{"type": "RectifiedFlow"}'
    for change, message in (
        ({"format": "other"}, "does not say how to rebuild its diffusion network"),
        ({"task": "jpeg", "class": "Serpent"}, "is for jpeg: weights of a diffusion network are wanted"),
        ({"class": "Nessie"}, "is of a Nessie with arguments .* the networks are DiM, DiT"),
        ({"config": '{"wings": 2}'}, "cannot be built here"),
        ({"config": right.replace("[8, 8]", "[9, 8]")}, "9 x 8 cannot be cut into patches of 2 x 2"),
        ({"objective": '{"type": "Guess"}'}, "objective must be one of EpsilonPrediction"),
        ({}, "does not fit this network"),
    ):
        save_file({"x": torch.ones(1)}, path, metadata=fields | change)
        with pytest.raises(CheckpointError, match=message) as error:
            weights.load(path)
        assert "\n" not in str(error.value)
