_base_ = [
    "../_base_/models/mamba_yolo_t.py",
    "../_base_/datasets/bccd.py",
    "../_base_/schedule_300e.py",
    "../_base_/default_runtime.py",
]

# 205 photos / 16 = 13 iterations an epoch
model = dict(bbox_head=dict(num_classes=3))
train_cfg = dict(max_epochs=100, val_interval=5)
optim_wrapper = dict(paramwise_cfg=dict(batch_size_per_gpu=16))
default_hooks = dict(logger=dict(interval=13), checkpoint=dict(interval=5, save_best="coco/bbox_mAP"))
