"""The Mamba-YOLO detector."""

from collections.abc import Sequence

from mmdet.models.detectors import SingleStageDetector
from mmdet.registry import MODELS

from mambavision.backbones.mamba_yolo import Size, Variant, mamba_yolo_size, set_batch_norm
from mambavision.detection.batches import BatchedDetDataPreprocessor


@MODELS.register_module()
class MambaYOLO(SingleStageDetector):
    """Mamba-YOLO: a state-space backbone and neck with YOLOv8's head.

    mmdet's ``SingleStageDetector`` with every BatchNorm at eps 1e-3 and momentum 0.03, whatever the parts.
    Arguments, ``loss``, ``predict`` and data samples are mmdet's.

    Wang et al., 2025, Mamba YOLO: A Simple Baseline for Object Detection with State Space Model.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        set_batch_norm(self)


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
