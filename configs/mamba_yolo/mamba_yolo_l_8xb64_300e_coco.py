_base_ = "./mamba_yolo_t_8xb64_300e_coco.py"

model = dict(backbone=dict(size="l"), neck=dict(size="l"), bbox_head=dict(in_channels=(192, 384, 576)))
