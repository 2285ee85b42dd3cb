import copy

import pytest
import torch
from mmdet.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mambavision.detection import build_mamba_yolo
from mambavision.detection.optim import split_parameters
from mambavision.engine.optim import FusedExpMomentumEMA


@pytest.fixture(scope="module")
def detector():
    return build_mamba_yolo("debug", classes=["a", "b"])


def construct(detector, **changes):
    cfg = dict(
        type="OptimWrapper",
        optimizer=dict(type="SGD", lr=0.01, momentum=0.937, weight_decay=5e-4, nesterov=True),
    )
    cfg.update(changes)
    return OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type="MambaYOLOOptimWrapperConstructor",
            optim_wrapper_cfg=cfg,
            paramwise_cfg=dict(batch_size_per_gpu=512),
        )
    )(detector)


def test_every_parameter_has_one_group(detector):
    groups = split_parameters(detector)
    ids = [id(param) for group in groups.values() for param in group]
    assert sorted(ids) == sorted(id(param) for param in detector.parameters())


def test_scan_parameters_are_decayed_and_biases_and_norms_are_not(detector):
    kind_of = {id(param): kind for kind, group in split_parameters(detector).items() for param in group}
    kinds = {name: kind_of[id(param)] for name, param in detector.named_parameters()}
    assert {kind for name, kind in kinds.items() if "bias" in name} == {"bias"}
    assert any(name.endswith("dt_projs_bias") for name in kinds)
    for ending in ("A_logs", "Ds", "x_proj_weight", "dt_projs_weight", "in_proj.weight"):
        assert {kind for name, kind in kinds.items() if name.endswith(ending)} == {"weight"}, ending
    norms = [name for name, module in detector.named_modules() if isinstance(module, nn.BatchNorm2d | nn.LayerNorm)]
    assert norms
    assert {kinds[f"{name}.weight"] for name in norms} == {"norm"}


def test_weight_decay_scales_with_the_images_of_an_update(detector):
    groups = {group["kind"]: group for group in construct(detector).optimizer.param_groups}
    assert groups["weight"]["weight_decay"] == pytest.approx(4e-3)  # 5e-4 * 512 / 64
    assert groups["bias"]["weight_decay"] == groups["norm"]["weight_decay"] == 0
    accumulated = construct(detector, accumulative_counts=2).optimizer.param_groups
    assert max(group["weight_decay"] for group in accumulated) == pytest.approx(8e-3)
    assert {group["initial_lr"] for group in accumulated} == {0.01}


@pytest.mark.parametrize("paramwise", [None, {}, {"batch_size_per_gpu": 0}, {"batch_size_per_gpu": 4, "lr_mult": 2}])
def test_batch_size_is_required(paramwise):
    with pytest.raises(ValueError, match="batch_size_per_gpu"):
        OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(
                type="MambaYOLOOptimWrapperConstructor",
                optim_wrapper_cfg=dict(optimizer=dict(type="SGD", lr=0.01)),
                paramwise_cfg=paramwise,
            )
        )


@pytest.mark.parametrize("update_buffers", [True, False])
def test_fused_average_is_mmdets(detector, update_buffers):
    options = dict(momentum=1e-3, gamma=5, update_buffers=update_buffers)
    fused, plain = (cls(detector, **options) for cls in (FusedExpMomentumEMA, MODELS.get("ExpMomentumEMA")))
    source = copy.deepcopy(detector)
    torch.manual_seed(0)
    for _ in range(4):
        for tensor in (*source.parameters(), *source.buffers()):
            tensor.data += torch.randn_like(tensor) if tensor.is_floating_point() else 1
        fused.update_parameters(source)
        plain.update_parameters(source)
    expected = plain.state_dict()
    for name, value in fused.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name], msg=name)
        elif name != "steps":
            assert torch.equal(value, source.state_dict()[name.removeprefix("module.")]), name
    assert fused.steps == 4
