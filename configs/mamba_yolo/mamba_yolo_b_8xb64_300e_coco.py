_base_ = "./mamba_yolo_t_8xb64_300e_coco.py"

model = dict(backbone=dict(size="b"), neck=dict(size="b"), bbox_head=dict(in_channels=(128, 256, 512)))
