"""The whole network T, B and L: parity with the official one, and parameter counts."""

import pytest
import torch
from torch import Tensor

from mambavision.detection import build_mamba_yolo
from mambavision.detection.convert import from_official
from tests.parity import load

LAYERS = {
    "feat_1": "backbone.stages.0",
    "feat_3": "backbone.stages.1",
    "feat_5": "backbone.stages.2",
    "feat_8": "backbone.sppf",
    "feat_11": "neck.top_down4",
    "feat_14": "neck.top_down3",
    "feat_17": "neck.bottom_up4",
    "feat_20": "neck.bottom_up5",
}
COUNTS = {
    ("t", "released", 80): 6_131_704,
    ("b", "released", 80): 21_828_000,
    ("l", "released", 80): 57_631_024,
    ("t", "aaai", 80): 5_442_612,
    ("b", "aaai", 80): 19_168_164,
    ("l", "aaai", 80): 49_227_952,
    ("t", "released", 2): 5_985_742,
}
PROJECTION = 16  # the published counts include the fixed bins 0..15 of the box distribution


def decode(reg: list[Tensor], cls: list[Tensor], strides: tuple[int, ...]) -> Tensor:
    """xywh in pixels and class probabilities (B, 4 + C, anchors), written out from the facts page, not by our head."""
    levels = []
    for r, c, stride in zip(reg, cls, strides, strict=True):
        height, width = r.shape[2:]
        x = torch.arange(width) + 0.5
        y = torch.arange(height)[:, None] + 0.5
        sides = (r.unflatten(1, (4, 16)).softmax(2) * torch.arange(16.0)[:, None, None]).sum(2)  # left top right bottom
        x1, y1, x2, y2 = x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]
        boxes = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1) * stride
        levels.append(torch.cat([boxes, c.sigmoid()], 1).flatten(2))
    return torch.cat(levels, 2)


@pytest.mark.parametrize("name", ["myolo_T", "myolo_T_ssm8"])
def test_network_t_is_the_official_one(name):
    fixture = load(name)
    detector = from_official(fixture.weights())
    features = {}
    for key, layer in LAYERS.items():
        hook = lambda _module, _x, out, key=key: features.__setitem__(key, out)  # noqa: E731
        detector.get_submodule(layer).register_forward_hook(hook)
    with torch.inference_mode():
        reg, cls = detector.bbox_head(detector.extract_feat(fixture.input()))
    for key, feature in features.items():
        fixture.check(key, feature, tol=1e-4)
    for i, (r, c) in enumerate(zip(reg, cls, strict=True)):
        fixture.check(f"map_{i}", torch.cat([r, c], 1), tol=3e-4)
    fixture.check("decoded", decode(reg, cls, detector.bbox_head.strides), tol=1e-5)


@pytest.mark.parametrize(("size", "variant", "classes"), COUNTS)
def test_parameter_counts_are_the_published_ones(size, variant, classes):
    with torch.device("meta"):
        detector = build_mamba_yolo(size, variant=variant, classes=[str(i) for i in range(classes)])
    counted = sum(p.numel() for p in detector.parameters())
    assert counted + PROJECTION == COUNTS[size, variant, classes]
