_base_ = [
    "../_base_/models/mamba_yolo_t.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedule_300e.py",
    "../_base_/default_runtime.py",
]

# 8 GPUs x 64 images = batch 512
model = dict(bbox_head=dict(num_classes=80))
default_hooks = dict(checkpoint=dict(interval=5, save_best="coco/bbox_mAP"))
