import pytest
import torch

from mambavision.engine.checkpoint import CheckpointError
from mambavision.restoration.lpips import LPIPS, load_lpips
from mambavision.restoration.metrics import RestorationMetric


@pytest.fixture
def files(tmp_path):
    """Made-up weights of AlexNet, under torchvision's and the authors' names."""
    torch.manual_seed(0)
    made = LPIPS("alex")
    features = {f"features.{name}": value for name, value in made.features.state_dict().items()}
    torch.save({**features, "classifier.1.bias": torch.zeros(4)}, tmp_path / "alexnet.pth")
    heads = {f"lin{i}.model.1.weight": torch.rand(1, len(head), 1, 1) for i, head in enumerate(made.heads)}
    torch.save(heads, tmp_path / "alex.pth")
    return dict(network="alex", features=tmp_path / "alexnet.pth", heads=tmp_path / "alex.pth")


def slow_lpips(files, x, y):
    """The definition, pixel by pixel of each tap's features; x and y (3, H, W)."""
    weights, heads = torch.load(files["features"]), torch.load(files["heads"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    both = [((p - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None] for p in (x, y)]
    total = 0.0
    for tap, (layer, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
        if tap in (1, 2):
            both = [torch.max_pool2d(p, 3, 2) for p in both]
        kernel, bias = weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"]
        both = [torch.conv2d(p, kernel, bias, stride=stride, padding=padding).clamp(min=0) for p in both]
        head = heads[f"lin{tap}.model.1.weight"].flatten()
        _, _, height, width = both[0].shape
        for i in range(height):
            for j in range(width):
                a, b = (p[0, :, i, j] for p in both)
                total += (head * (a / a.norm() - b / b.norm()) ** 2).sum().item() / (height * width)
    return total


def test_it_is_the_definition(files):
    x = torch.rand(3, 65, 70)
    y = (x + 0.1 * torch.randn(3, 65, 70)).clamp(0, 1)
    measure = load_lpips(**files)
    distances = measure(torch.stack([x, y, x]), torch.stack([y, x, x]))
    # the authors' shift and scale are ImageNet's, rounded
    assert distances[:2].tolist() == pytest.approx([slow_lpips(files, x, y)] * 2, rel=0.01)
    assert distances[0] > 0 and distances[2] == 0
    with pytest.raises(ValueError, match="at least 32 x 32"):
        measure(torch.rand(1, 3, 31, 40), torch.rand(1, 3, 31, 40))


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_it_is_what_the_package_of_its_authors_says(network):
    lpips = pytest.importorskip("lpips", reason="the package lpips is not installed")
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    ours = LPIPS(network).eval()
    states = {name.rpartition(".slice")[2].partition(".")[2]: v for name, v in theirs.net.state_dict().items()}
    ours.features.load_state_dict(states, strict=False)
    for head, layer in zip(ours.heads, theirs.lins, strict=True):
        head.data.copy_(layer.model[-1].weight.flatten())
    x, y = torch.rand(2, 2, 3, 64, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), theirs(x, y, normalize=True).flatten(), rtol=1e-4, atol=1e-6)


def test_the_metric_measures_it_beside_the_others(files):
    gt = torch.rand(1, 40, 48)  # gray: three equal channels
    restored = (gt + 0.05 * torch.randn(1, 40, 48)).clamp(0, 1)
    values = RestorationMetric(lpips=files).measure(restored, gt)
    x, y = (p.mul(255).round().div(255).expand(1, 3, -1, -1) for p in (restored, gt))
    assert values["LPIPS"] == pytest.approx(load_lpips(**files)(x, y).item()) and values["LPIPS"] > 0
    assert list(values) == ["PSNR", "SSIM", "NMSE", "LPIPS"]


def test_other_files_are_refused(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_lpips(**files | dict(features=tmp_path / "gone.pth"))
    with pytest.raises(CheckpointError, match=r"alexnet\.pth: not torchvision's weights of vgg"):
        load_lpips(**files | dict(network="vgg"))
    with pytest.raises(CheckpointError, match=r"alexnet\.pth: not LPIPS' weights for alex, of which tap 0 has 64"):
        load_lpips(**files | dict(heads=files["features"]))
    with pytest.raises(ValueError, match="alex or vgg"):
        LPIPS("squeeze")
