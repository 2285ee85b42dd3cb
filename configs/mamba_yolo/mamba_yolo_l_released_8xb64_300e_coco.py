_base_ = "./mamba_yolo_l_8xb64_300e_coco.py"

# the form of the published code: LSBlock, repeats 3, 3, 9, 3
model = dict(backbone=dict(variant="released"), neck=dict(variant="released"))
