"""The detector whole: construction, mmdet's data flow, training parity, and data-parallel losses."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData

from mambavision.detection import MambaYOLO, build_mamba_yolo
from mambavision.detection.convert import from_official, to_official
from tests.parity import load

REPOSITORY = Path(__file__).resolve().parents[2]


def debug() -> MambaYOLO:
    torch.manual_seed(0)
    return build_mamba_yolo("debug", classes=["a", "b", "c"])


def batch(images: int = 2, boxes: int = 2) -> dict:
    g = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(images):
        corner = torch.rand(boxes, 2, generator=g) * 30
        gt = InstanceData(bboxes=torch.cat((corner, corner + 20), 1), labels=torch.randint(0, 3, (boxes,), generator=g))
        meta = {"img_shape": (64, 60), "ori_shape": (128, 120), "scale_factor": (0.5, 0.5)}
        samples.append(DetDataSample(gt_instances=gt, metainfo=meta))
    inputs = [torch.randint(0, 256, (3, 64, 60), dtype=torch.uint8, generator=g) for _ in range(images)]
    return {"inputs": inputs, "data_samples": samples}


def test_every_batch_norm_has_the_constants_of_the_recipe():
    norms = [m for m in debug().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 20 and all(m.eps == 1e-3 and m.momentum == 0.03 for m in norms)


def test_mmengines_init_weights_leaves_the_first_biases():
    detector = debug()
    detector.init_weights()
    assert all((tower[-1].bias == 1).all() for tower in detector.bbox_head.reg_towers)
    assert all((tower[-1].bias < -4).all() for tower in detector.bbox_head.cls_towers)


def test_pictures_enter_as_rgb_over_255_padded_with_gray():
    data = batch(1)
    seen = debug().data_preprocessor(data, training=False)["inputs"]
    assert seen.shape == (1, 3, 64, 64)
    torch.testing.assert_close(seen[0, :, :, :60], data["inputs"][0].flip(0) / 255)
    assert (seen[0, :, :, 60:] == 114 / 255).all()


@pytest.mark.parametrize("stacked", [True, False])
def test_pictures_of_several_shapes_are_padded_with_the_same_gray(stacked):
    """Validation batches hold letterboxed pictures of different shapes."""
    cfg = Config.fromfile(REPOSITORY / "configs/_base_/models/mamba_yolo_t.py")
    pictures = [torch.full((3, 32, 64), 114, dtype=torch.uint8), torch.full((3, 64, 64), 114, dtype=torch.uint8)]
    data = {"inputs": pictures[:1] if stacked else pictures, "data_samples": None}
    for preprocessor in (debug().data_preprocessor, MODELS.build(cfg.model.data_preprocessor)):
        seen = preprocessor(data, training=False)["inputs"]
        torch.testing.assert_close(seen, torch.full_like(seen, 114 / 255), atol=0, rtol=1e-6)


def test_a_config_builds_the_same_detector():
    config = {
        "_scope_": "mmdet",
        "type": "MambaYOLO",
        "backbone": {"type": "MambaYOLOBackbone", "size": "debug", "variant": "released"},
        "neck": {"type": "MambaYOLOPAFPN", "size": "debug", "variant": "released"},
        "bbox_head": {
            "type": "MambaYOLOHead",
            "num_classes": 3,
            "in_channels": [16, 24, 32],
            "assigner": {"type": "TaskAlignedCIoUAssigner", "topk": 10, "alpha": 0.5, "beta": 6.0},
            "loss_cls": {"type": "SoftTargetBCELoss", "loss_weight": 0.5},
            "loss_bbox": {"type": "CompleteIoULoss", "loss_weight": 7.5},
            "loss_dfl": {"type": "SideMeanDistributionFocalLoss", "loss_weight": 1.5},
        },
        "data_preprocessor": {"type": "DetDataPreprocessor", "mean": [0] * 3, "std": [255] * 3, "bgr_to_rgb": True},
        "test_cfg": {"score_thr": 0.2, "nms": {"type": "nms", "iou_threshold": 0.6}},
    }
    from_config = MODELS.build(config)
    built = build_mamba_yolo("debug", variant="released", classes=["a", "b", "c"])
    assert from_config.state_dict().keys() == built.state_dict().keys()
    assert from_config.bbox_head.test_cfg["score_thr"] == 0.2


def test_unknown_size_variant_and_no_class_are_refused():
    with pytest.raises(ValueError, match="'x'"):
        build_mamba_yolo("x", classes=["a"])
    with pytest.raises(ValueError, match="variant"):
        build_mamba_yolo("debug", variant="new", classes=["a"])
    with pytest.raises(ValueError, match="at least one class"):
        build_mamba_yolo("debug", classes=[])


@pytest.mark.parametrize("boxes", [2, 0])
def test_a_training_step_through_mmdets_data_flow(boxes):
    detector = debug()
    losses = detector(**detector.data_preprocessor(batch(boxes=boxes), training=True), mode="loss")
    assert set(losses) == {"loss_cls", "loss_bbox", "loss_dfl"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_gpu():
    detector, data = debug().cuda(), batch()

    def step():
        losses = detector(**detector.data_preprocessor(copy.deepcopy(data), training=True), mode="loss")
        sum(losses.values()).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(detector: MambaYOLO) -> list[bool]:
    """Whether a training (True) or an inference graph, for each graph kept."""
    return [key[0] for key in detector.graphs._recorded]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_predictions_from_a_cuda_graph(dtype):
    detector, data = debug().cuda().eval(), [batch(), batch(1)]
    with torch.inference_mode(), torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        pictures = [detector.data_preprocessor(copy.deepcopy(d), training=False)["inputs"] for d in data]
        pictures += [pictures[0].flip(0)]
        for _ in range(5):
            for x in pictures:
                for replayed, eager in zip(sum(detector.graphs(x), []), sum(detector.maps(x), []), strict=True):
                    torch.testing.assert_close(replayed, eager)
    assert recorded(detector) == [False, False]
    with torch.inference_mode():
        detector.double()  # other memory: the recordings must not be used
        assert detector.graphs(pictures[0].double())[0][0].dtype == torch.float64 and recorded(detector) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_through_cuda_graphs_is_training(dtype):
    eager, graphed = debug().cuda(), debug().cuda()
    graphed.graphs.record_training = True
    batches = [batch(), batch(boxes=5), batch(), batch(1), batch(boxes=0), batch(boxes=3), batch()]
    history = []
    for detector in (eager, graphed):
        optimizer, losses = torch.optim.SGD(detector.parameters(), lr=1e-3), []
        for data in batches:
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                inputs = detector.data_preprocessor(copy.deepcopy(data), training=True)
                loss = sum(detector(**inputs, mode="loss").values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        history.append(torch.stack(losses))
    assert recorded(graphed) == [True] and recorded(eager) == []
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype is None else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(history[1], history[0], **tolerance)
    for one, other in zip(graphed.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.gpu
def test_a_copy_of_a_detector_runs_its_own_weights():
    detector, x = debug().cuda().eval(), torch.rand(1, 3, 64, 64, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            before = detector.graphs(x)[0][0].clone()
        other = copy.deepcopy(detector)
        for p in other.parameters():
            p.zero_()
        assert not torch.equal(other.graphs(x)[0][0], before)
        torch.testing.assert_close(detector.graphs(x)[0][0], before)


def test_without_a_gpu_nothing_is_recorded():
    detector = debug().eval()
    with torch.no_grad():
        for _ in range(4):
            detector.graphs(torch.rand(1, 3, 64, 64))
    assert recorded(detector) == [] and copy.deepcopy(detector).graphs.owner is not detector


def test_predictions_come_in_pixels_of_the_original_picture():
    detector = debug().eval()
    detector.bbox_head.test_cfg = {"score_thr": 0.0}
    with torch.no_grad():
        for sample in detector.test_step(batch()):
            found = sample.pred_instances
            assert 0 < len(found) <= 300 and found.bboxes.shape == (len(found), 4)
            assert found.bboxes.min() >= 0 and (found.bboxes.amax(0) <= torch.tensor([120.0, 128, 120, 128])).all()
            assert found.bboxes.max() > 64
            assert (found.scores.diff() <= 0).all()


def test_one_training_step_of_the_published_t():
    fixture = load("myolo_T_loss")
    detector = from_official(fixture.weights()).train()
    names = dict(zip(detector.state_dict(), to_official(detector), strict=False))
    size = torch.tensor(fixture.meta["input_shape"][:1:-1] * 2)
    gt = []
    for i in range(2):
        rows = torch.tensor([r for r in fixture.meta["boxes_img_cls_xywh_relative"] if r[0] == i])
        centre, half = rows[:, 2:4].repeat(1, 2), rows[:, 4:].repeat(1, 2) / 2
        boxes = (centre + half * torch.tensor([-1.0, -1, 1, 1])) * size
        gt.append(InstanceData(bboxes=boxes, labels=rows[:, 1].long()))

    maps = detector.bbox_head(detector.neck(detector.backbone(fixture.input())))
    for level, (reg, cls) in enumerate(zip(*maps, strict=True)):
        fixture.check(f"map_{level}", torch.cat((reg, cls), 1), tol=3e-4)
    losses = detector.bbox_head.loss_by_feat(*maps, gt, [{}, {}])
    items = fixture.meta["loss_items"]
    for key, name in (("loss_bbox", "box"), ("loss_cls", "cls"), ("loss_dfl", "dfl")):
        assert losses[key].item() / 2 == pytest.approx(items[name], rel=5e-6), name
    total = sum(losses.values())
    assert total.item() == pytest.approx(fixture.meta["total_loss"], rel=5e-6)

    total.backward()
    noise = set(fixture.meta["mathematically_zero_grads"])
    norms = {names[n]: p.grad.norm().item() for n, p in detector.named_parameters()}
    assert norms.keys() == fixture.meta["grad_l2"].keys() and len(norms) == 404 and len(noise) == 44
    expected = fixture.meta["grad_l2"]
    wrong = {n: (v, expected[n]) for n, v in norms.items() if n not in noise and abs(v / expected[n] - 1) > 1e-4}
    assert not wrong
    assert all(norms[n] < 1e-6 * max(expected.values()) for n in noise)

    running = fixture.meta["running_after"]
    state = {names[n]: b.float().norm().item() for n, b in detector.state_dict().items() if names[n] in running}
    assert state.keys() == running.keys()
    assert all(state[n] == pytest.approx(running[n], rel=1e-5) for n in running)


WORKER = """
import sys, torch
from mmengine.dist import all_reduce, get_rank
from mmengine.structures import InstanceData
from mambavision.detection.head import MambaYOLOHead

torch.manual_seed(0)
head = MambaYOLOHead(3, (8, 16, 24)).eval()
x = [torch.randn(3, c, n, n) for c, n in ((8, 8), (16, 4), (24, 2))]
boxes = [[[4., 6, 40, 60], [30, 8, 62, 30]], [], [[10., 10, 50, 50], [0, 0, 20, 20], [8, 8, 30, 40]]]
gt = [InstanceData(bboxes=torch.tensor(b).view(-1, 4), labels=torch.arange(len(b))) for b in boxes]

def step(start, stop):
    head.zero_grad()
    losses = head.loss_by_feat(*head([f[start:stop] for f in x]), gt[start:stop], [{}] * (stop - start))
    sum(losses.values()).backward()
    values = torch.cat([*(v.detach().view(1) for v in losses.values()), *(p.grad.flatten() for p in head.parameters())])
    all_reduce(values, "mean")
    return values

results = [step(0, 3)]
torch.distributed.init_process_group("gloo")
for cut in (2, 1):
    results.append(step(0, cut) if get_rank() == 0 else step(cut, 3))
if get_rank() == 0:
    torch.save(results, sys.argv[1])
"""


def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path: Path):
    script, out = tmp_path / "worker.py", tmp_path / "results.pt"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    one, *two = torch.load(out)
    for result in two:
        torch.testing.assert_close(result, one, rtol=1e-4, atol=1e-5)
