import pytest
import torch

from mambavision.detection import build_mamba_yolo
from mambavision.detection.convert import from_official, identify, to_official
from mambavision.detection.weights import load_detector
from tests.parity import load
from tests.tools.running import refusal, run_tool


def official(size="debug", variant="released", classes=3, seed=0):
    torch.manual_seed(seed)
    return to_official(build_mamba_yolo(size, variant=variant, classes=[f"c{i}" for i in range(classes)]))


def test_names_and_shapes_of_t_are_the_official_ones():
    fixture = load("myolo_T")
    detector = build_mamba_yolo("t", variant="released", classes=[str(i) for i in range(80)])
    ours = {name: list(tensor.shape) for name, tensor in to_official(detector).items()}
    assert ours == {row[0]: row[1] for row in fixture.meta["state_dict"]}


@pytest.mark.parametrize(
    ("size", "variant"), [("debug", "released"), ("debug", "aaai"), ("t", "aaai"), ("b", "released"), ("l", "released")]
)
def test_round_trip_keeps_every_tensor(size, variant):
    torch.manual_seed(1)
    detector = build_mamba_yolo(size, variant=variant, classes=["a", "b"])
    names = to_official(detector)
    back = from_official({"model": names}, classes=["a", "b"])
    assert identify(names) == (size, variant, 2)
    assert back.dataset_meta["classes"] == ("a", "b")
    expected = detector.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in back.state_dict().items())


def test_layer_indices_of_l_follow_the_official_rule():
    names = official("l", "released", 80)
    assert "model.5.5.op.A_logs" in names and "model.5.6.op.A_logs" not in names
    assert "model.11.ss2d.1.A_logs" in names and "model.11.ss2d.2.A_logs" not in names


def test_default_class_names():
    assert from_official(official()).dataset_meta["classes"] == ("0", "1", "2")
    assert from_official(official(classes=80)).dataset_meta["classes"][:2] == ("person", "bicycle")
    with pytest.raises(ValueError, match="3 classes, 2 names"):
        from_official(official(), classes=["a", "b"])


def test_half_precision_checkpoint_loads_as_float32():
    state = {k: v.half() if v.is_floating_point() else v for k, v in official().items()}
    assert {p.dtype for p in from_official(state).parameters()} == {torch.float32}


def test_missing_and_remaining_keys_are_named():
    state = official()
    state["model.99.weight"] = state.pop("model.8.cv1.conv.weight")
    del state["model.3.op.Ds"]
    with pytest.raises(ValueError, match=r"2 \(model\.3\.op\.Ds, model\.8\.cv1.* missing, 1 \(model\.99\.weight\) rem"):
        from_official(state)


def test_wrong_shape_is_named():
    state = official()
    state["model.1.op.A_logs"] = state["model.1.op.A_logs"][:, :8]
    with pytest.raises(ValueError, match=r"model\.1\.op\.A_logs \(64, 8\), not \(64, 16\)"):
        from_official(state)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"epoch": 3}, "no state dict"),
        ({}, "no state dict"),
        ({"backbone.conv1.weight": torch.zeros(1)}, "is missing"),
        ({"state_dict": {}, "message_hub": {}}, "a checkpoint of tools/train.py.* tools/publish.py is for it"),
    ],
)
def test_other_checkpoints_are_refused(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        from_official(checkpoint)


def test_tool_writes_a_file_that_rebuilds_the_detector(tmp_path, monkeypatch, capfd):
    source, target, classes = tmp_path / "t.pth", tmp_path / "t.safetensors", tmp_path / "names.txt"
    state = official()
    torch.save({"model": state}, source)
    classes.write_text("cell\nplatelet\ndust\n\n")
    options = ["--classes", classes, "--input-size", 320]
    code, _, err = run_tool(monkeypatch, capfd, "convert", source, target, *options)
    assert code == 0, err
    detector = load_detector(target)
    assert detector.dataset_meta["classes"] == ("cell", "platelet", "dust")
    assert detector.input_size == 320
    torch.testing.assert_close(to_official(detector), state, rtol=1e-3, atol=1e-3)


def test_tool_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capfd):
    source, target = tmp_path / "t.pth", tmp_path / "t.safetensors"
    torch.save({"state": torch.zeros(3)}, source)
    assert refusal(run_tool(monkeypatch, capfd, "convert", source, target))
    assert not target.exists()
