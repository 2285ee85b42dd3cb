import json

import pytest
import torch
from torch import nn

from mambavision.backbones.serpent import Serpent
from mambavision.detection.detector import build_mamba_yolo
from mambavision.detection.head import TEST_CFG, select_boxes
from mambavision.detection.weights import load_detector, save_weights
from mambavision.restoration import weights as restoration
from tests.tools.running import ROOT, refusal

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra 'export')")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (the extra 'export')")


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def detector(tmp_path):
    """A published file of random weights."""
    torch.manual_seed(3)
    path = tmp_path / "detector.safetensors"
    classes = ("ring", "disc", "rod")
    net = build_mamba_yolo("debug", classes=classes).eval()
    save_weights(net, path, size="debug", variant="aaai", classes=classes, input_size=96)
    return path


def test_a_detector_finds_the_same_boxes(tool, tmp_path, detector):
    code, text, err = tool("export", tmp_path / "x.onnx", "--weights", detector, "--size", 64, 96, "--batch", 1)
    assert code == 0, err
    assert "images to boxes and scores" in text and "largest difference to the network" in text
    session, net = session_of(tmp_path / "x.onnx"), load_detector(detector)
    said = session.get_modelmeta().custom_metadata_map
    assert said["task"] == "detection" and said["input_size"] == "96"
    assert json.loads(said["classes"]) == ["ring", "disc", "rod"]
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    boxes, scores = (torch.from_numpy(y)[0] for y in session.run(None, {"images": images.numpy()}))
    with torch.no_grad():
        (wanted,) = net.bbox_head.predict_by_feat(*net.maps(images), [{"img_shape": (64, 96)}])
    found = select_boxes(boxes, scores, TEST_CFG)
    assert len(found) == len(wanted) > 10
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(found.scores, wanted.scores)


def test_a_restoration_network_takes_pictures_of_other_sizes(tool, tmp_path):
    path = tmp_path / "w.safetensors"
    net = Serpent(dims=[4], depths=[1], d_state=[2], strides=[2], sigma_input=True)
    nn.init.normal_(net.head.weight, std=0.03)
    restoration.save(net, path, task="denoise_color")
    code, text, err = tool("export", tmp_path / "x.onnx", "--weights", path)
    assert code == 0, err
    assert "images and sigma to restored" in text
    session, (net, _) = session_of(tmp_path / "x.onnx"), restoration.load(path)
    for batch, height, width in ((3, 44, 28), (1, 64, 120)):
        images, sigma = torch.rand(batch, 3, height, width), torch.rand(batch)
        (y,) = session.run(None, {"images": images.numpy(), "sigma": sigma.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), net(images, sigma), rtol=0, atol=1e-5)


def test_a_checkpoint_with_its_config(tool, tmp_path, in_the_repository):
    arguments = dict(in_channels=1, dims=[4], depths=[1], d_state=[1], strides=[1])
    state = {f"network.{name}": value for name, value in Serpent(**arguments).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "iter_1.pth")
    config = tmp_path / "gray.py"
    base = f'_base_ = ["{ROOT}/configs/serpent/serpent_debug.py"]'
    config.write_text(f'{base}\nmodel = dict(network=dict(_delete_=True, type="Serpent", **{arguments}))')
    out = tmp_path / "x.pt2"
    options = ("--config", config, "--size", 7, 9, "--batch", 2)
    code, _, err = tool("export", out, "--weights", tmp_path / "iter_1.pth", *options)
    assert code == 0, err
    assert torch.export.load(out).module()(torch.rand(2, 1, 7, 9)).shape == (2, 1, 7, 9)


def test_what_cannot_be_exported_is_said_in_a_line(tool, tmp_path, detector):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "raw.pth").write_text("no checkpoint")
    out, weights = tmp_path / "x.onnx", ("--weights", detector)
    diffusion = ROOT / "weights" / "dim_t_mlp_cifar10.safetensors"
    cases = [
        ((tmp_path / "x.tflite", *weights), "end in .onnx or .pt2"),
        ((tmp_path / "none" / "x.onnx", *weights), "there is no folder"),
        ((tmp_path / "file" / "x.onnx", *weights), "is a file, a folder is wanted"),
        ((out, "--weights", tmp_path / "none.safetensors"), "no weights at"),
        ((out, "--weights", tmp_path / "raw.pth"), "pass its --config too"),
        ((out, "--weights", tmp_path / "raw.pth", "--config", tmp_path / "none.py"), "no config at"),
        ((out, "--weights", diffusion), "detectors and restoration networks are exported, not diffusion"),
        ((out, *weights, "--size", 0, 64), "size must be at least 1"),
        ((out, *weights, "--size", 64, 64, "--batch", 0), "batch must be at least 1"),
        ((out, *weights, "--size", 64, 65), "multiples of 32, got 64 x 65"),
    ]
    before = sorted(tmp_path.iterdir())
    for arguments, message in cases:
        assert message in refusal(tool("export", *arguments)), arguments
    assert sorted(tmp_path.iterdir()) == before
