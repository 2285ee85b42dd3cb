import json

import pytest
import torch
from safetensors.torch import save_file

from mambavision.detection import build_mamba_yolo
from mambavision.detection.weights import load_detector, read_metadata, save_weights
from mambavision.engine.weights import FORMAT

CLASSES = ["cell", "Zelle ä"]


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_mamba_yolo("debug", variant="released", classes=CLASSES)


def save(detector, path, **changes):
    options = dict(size="debug", variant="released", classes=CLASSES, input_size=96) | changes
    save_weights(detector, path, **options)
    return path


def test_file_rebuilds_the_detector_without_a_config(detector, tmp_path):
    path = save(detector, tmp_path / "w.safetensors", extra={"trained_on": "nothing"})
    loaded = load_detector(path)
    assert loaded.dataset_meta["classes"] == tuple(CLASSES)
    assert loaded.input_size == 96 and not loaded.training
    own = detector.state_dict()
    for name, value in loaded.state_dict().items():
        expected = own[name].half().float() if value.is_floating_point() else own[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)
    metadata = read_metadata(path)
    assert (metadata["task"], metadata["size"], metadata["variant"]) == ("detection", "debug", "released")
    assert json.loads(metadata["classes"]) == CLASSES and metadata["trained_on"] == "nothing"
    floats = sum(value.numel() for value in own.values() if value.is_floating_point())
    assert path.stat().st_size < 2.3 * floats + 100_000  # two bytes a number


def test_values_beyond_half_precision_survive(detector, tmp_path):
    changed = build_mamba_yolo("debug", variant="released", classes=CLASSES)
    changed.load_state_dict(detector.state_dict())
    name = next(name for name in changed.state_dict() if name.endswith("running_var"))
    changed.state_dict()[name].fill_(1e6)
    loaded = load_detector(save(changed, tmp_path / "w.safetensors"))
    assert torch.equal(loaded.state_dict()[name], changed.state_dict()[name])


def test_weights_that_are_not_finite_are_not_saved(detector, tmp_path):
    changed = build_mamba_yolo("debug", variant="released", classes=CLASSES)
    next(changed.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        save(changed, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused_in_one_line(detector, tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_detector(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_detector(tmp_path / "text.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not say how to rebuild"):
        load_detector(tmp_path / "foreign.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "jpeg.safetensors", metadata={"format": FORMAT, "task": "jpeg"})
    with pytest.raises(ValueError, match=r"holds a restoration network \(jpeg\), not a detector: it is for tools/rest"):
        load_detector(tmp_path / "jpeg.safetensors")
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="of a training checkpoint tools/publish.py makes one"):
        load_detector(tmp_path / "x.pth")
    wrong = save(detector, tmp_path / "wrong.safetensors", variant="aaai")
    with pytest.raises(ValueError, match=r"does not fit this network: 0 tensors missing, \d+ unknown") as error:
        load_detector(wrong)
    assert "\n" not in str(error.value)
