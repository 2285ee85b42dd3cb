model = dict(
    type="MambaYOLO",
    data_preprocessor=dict(
        type="BatchedDetDataPreprocessor",
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
        pad_value=114 / 255,  # mmdet pads after it has normalised
    ),
    backbone=dict(type="MambaYOLOBackbone", size="t", variant="aaai"),
    neck=dict(type="MambaYOLOPAFPN", size="t", variant="aaai"),
    bbox_head=dict(type="MambaYOLOHead", num_classes=80, in_channels=(64, 128, 256)),
    test_cfg=dict(
        score_thr=0.001,
        nms_pre=30000,
        multi_label=True,
        nms=dict(type="nms", iou_threshold=0.7),
        max_per_img=300,
    ),
)
