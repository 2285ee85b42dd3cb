_base_ = [
    "../_base_/models/mamba_yolo_t.py",
    "../_base_/datasets/voc0712.py",
    "../_base_/schedule_300e.py",
    "../_base_/default_runtime.py",
]

model = dict(bbox_head=dict(num_classes=20))
optim_wrapper = dict(paramwise_cfg=dict(batch_size_per_gpu=32))
default_hooks = dict(checkpoint=dict(interval=5, save_best="pascal_voc/mAP"))
