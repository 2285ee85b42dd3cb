import mambavision.detection  # noqa: F401  makes mmdet importable

# isort: split
import copy

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes, get_box_tensor
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from mambavision.detection.batches import stacked_collate

OPTIONS = dict(mean=[1.0, 2.0, 3.0], std=[255.0, 255.0, 51.0], bgr_to_rgb=True, pad_size_divisor=32, pad_value=114)


def instances(count):
    return InstanceData(bboxes=HorizontalBoxes(torch.rand(count, 4) * 32), labels=torch.randint(9, (count,)))


def make_samples(*sizes):
    torch.manual_seed(0)
    samples = []
    for number, size in enumerate(sizes):
        sample = DetDataSample(metainfo=dict(img_shape=size, img_id=number))
        sample.gt_instances, sample.ignored_instances = instances(number), instances(2 - number)
        samples.append(dict(inputs=torch.randint(256, (3, *size), dtype=torch.uint8), data_samples=sample))
    return samples


SIZES = {"one shape": [(40, 64)] * 3, "several": [(40, 64), (32, 32), (64, 40)]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("collate", [pseudo_collate, stacked_collate])
def test_batches_are_those_of_mmdet(sizes, collate):
    samples = make_samples(*sizes)
    expected = DetDataPreprocessor(**OPTIONS)(pseudo_collate(copy.deepcopy(samples)), training=True)
    batched = MODELS.build(dict(type="BatchedDetDataPreprocessor", **OPTIONS))
    for preprocessor in (batched, DetDataPreprocessor(**OPTIONS)):
        result = preprocessor(collate(copy.deepcopy(samples)), training=True)
        assert torch.equal(result["inputs"], expected["inputs"])
        for ours, theirs in zip(result["data_samples"], expected["data_samples"], strict=True):
            assert ours.metainfo == theirs.metainfo
            for field in ("gt_instances", "ignored_instances"):
                assert torch.equal(getattr(ours, field).bboxes, getattr(theirs, field).bboxes)
                assert torch.equal(getattr(ours, field).labels, getattr(theirs, field).labels)


def test_a_worker_hands_over_one_memory_for_all_boxes():
    samples = make_samples(*SIZES["one shape"])
    (batch,) = DataLoader(samples, 3, num_workers=1, collate_fn=stacked_collate)
    tensors = [get_box_tensor(sample.gt_instances.bboxes) for sample in batch["data_samples"]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert [len(tensor) for tensor in tensors] == [0, 1, 2]
