import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mambavision.backbones.dim import dim_debug
from mambavision.backbones.dit import dit_debug
from mambavision.backbones.video_unet import video_unet_debug
from mambavision.diffusion import weights
from mambavision.diffusion.objectives import RectifiedFlow, VPrediction
from mambavision.engine.checkpoint import CheckpointError
from tests.diffusion.conftest import untrained_network


@pytest.mark.parametrize(("make", "size"), [(dim_debug, (8, 8)), (dit_debug, (8, 8)), (video_unet_debug, (3, 8, 8))])
@pytest.mark.parametrize("objective", [VPrediction("cosine", min_snr_gamma=5.0), RectifiedFlow("logit_normal")])
def test_file_rebuilds_network_and_objective(make, size, objective, tmp_path):
    net, path = untrained_network(make, size, num_classes=2).eval(), tmp_path / "w.safetensors"
    said = {"training_data": "none"}
    weights.save(net, path, objective=objective, class_names=["cat", "dog"], metadata=said, precision="fp32")
    loaded, same, metadata = weights.load(path)
    assert type(loaded) is type(net) and loaded.config == net.config and not loaded.training
    assert same.config() == objective.config()
    x, t, labels = torch.randn(2, 3, *size), torch.tensor([3.0, 900.0]), torch.tensor([0, 2])
    assert torch.equal(loaded(x, t, labels), net(x, t, labels))
    assert metadata["class_names"] == ["cat", "dog"] and metadata["training_data"] == "none"


def test_bad_weights_are_refused(tmp_path):
    net, objective = dim_debug((8, 8), in_channels=3), RectifiedFlow()
    with pytest.raises(ValueError, match="Linear cannot be rebuilt from a file"):
        weights.save(nn.Linear(1, 1), tmp_path / "w.safetensors", objective=objective)
    with pytest.raises(ValueError, match="1 class names for a network of 0 classes"):
        weights.save(net, tmp_path / "w.safetensors", objective=objective, class_names=["cat"])
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="no weights file"):
        weights.load(path)
    right = '{"input_size": [8, 8], "d_model": 32, "depth": 1, "headdim": 16}'
    fields = {"format": "mambavision-zoo/1", "task": "diffusion", "class": "DiM", "config": right}
    fields["objective"] = '{"type": "RectifiedFlow"}'
    for change, message in (
        ({"format": "other"}, "does not say how to rebuild its network"),
        ({"task": "jpeg", "class": "Serpent"}, r"holds a restoration network \(Serpent, jpeg\), not a diffusion"),
        ({"class": "Nessie"}, "is of a Nessie, which is not known here: networks are DiM, DiT"),
        ({"config": '{"wings": 2}'}, "cannot be built here"),
        ({"config": right.replace("[8, 8]", "[9, 8]")}, "cannot be built here"),
        ({"objective": '{"type": "Guess"}'}, "objective must be one of EpsilonPrediction"),
        ({}, "does not fit this network"),
    ):
        save_file({"x": torch.ones(1)}, path, metadata=fields | change)
        with pytest.raises(CheckpointError, match=message) as error:
            weights.load(path)
        assert "\n" not in str(error.value)
