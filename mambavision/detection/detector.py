"""The Mamba-YOLO detector."""

from collections.abc import Sequence

from mmdet.models.detectors import SingleStageDetector
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.registry import DefaultScope
from torch import Tensor

from mambavision.backbones.mamba_yolo import Size, Variant, mamba_yolo_size, set_batch_norm
from mambavision.detection.batches import BatchedDetDataPreprocessor
from mambavision.engine.cuda_graphs import CudaGraphs


@MODELS.register_module()
class MambaYOLO(SingleStageDetector):
    """Mamba-YOLO: a state-space backbone and neck with YOLOv8's head.

    mmdet's ``SingleStageDetector`` with every BatchNorm at eps 1e-3 and momentum 0.03, whatever the parts. Arguments,
    ``loss``, ``predict`` and data samples are mmdet's. On a GPU, pictures of a shape that comes again are predicted
    from a CUDA graph, and :class:`~mambavision.engine.cuda_graphs.CudaGraphHook` trains through one.

    Wang et al., 2025, Mamba YOLO: A Simple Baseline for Object Detection with State Space Model.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        set_batch_norm(self)
        self.graphs = CudaGraphs(self, "maps")

    def maps(self, batch_inputs: Tensor) -> tuple:
        """The head's raw maps: the part of the detector whose work depends on the shape of the pictures alone."""
        return self.bbox_head(self.extract_feat(batch_inputs))

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of a batch (B, 3, H, W) against the ground truth of its data samples."""
        gt_instances, ignored, metas = unpack_gt_instances(batch_data_samples)
        return self.bbox_head.loss_by_feat(*self.graphs(batch_inputs), gt_instances, metas, ignored)

    def predict(self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True) -> SampleList:
        """The data samples with ``pred_instances``, by default in pixels of the original pictures."""
        metas = [sample.metainfo for sample in batch_data_samples]
        found = self.bbox_head.predict_by_feat(*self.graphs(batch_inputs), batch_img_metas=metas, rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, found)


def build_mamba_yolo(size: Size, *, variant: Variant = "aaai", classes: Sequence[str]) -> MambaYOLO:
    """Build a detector that is ready to train or predict.

    Args:
        size: "t", "b", "l", or "debug".
        variant: "aaai" (the paper's form) or "released" (the public code's).
        classes: names of the classes, in the order of the labels.

    Returns:
        The detector with random weights, in training mode. It takes BGR pictures in 0 .. 255 through its data
        preprocessor (RGB / 255, padded to multiples of 32 with 114); ``dataset_meta["classes"]`` holds the names.

    Raises:
        ValueError: for an unknown size or variant, or no class.
    """
    if len(classes) == 0:
        raise ValueError("classes must name at least one class")
    channels = mamba_yolo_size(size).channels[1:]
    with DefaultScope.overwrite_default_scope("mmdet"):  # whatever the process did before
        detector = MambaYOLO(
            backbone={"type": "MambaYOLOBackbone", "size": size, "variant": variant},
            neck={"type": "MambaYOLOPAFPN", "size": size, "variant": variant},
            bbox_head={"type": "MambaYOLOHead", "num_classes": len(classes), "in_channels": channels},
            data_preprocessor=BatchedDetDataPreprocessor(
                mean=[0.0, 0.0, 0.0],
                std=[255.0, 255.0, 255.0],
                bgr_to_rgb=True,
                pad_size_divisor=32,
                pad_value=114 / 255,  # mmdet pads after it has normalised
            ),
        )
    detector.dataset_meta = {"classes": tuple(classes)}
    return detector
