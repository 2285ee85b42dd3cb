_base_ = [
    "../_base_/models/mamba_yolo_t.py",
    "../_base_/datasets/coco_json.py",
    "../_base_/schedule_300e.py",
    "../_base_/default_runtime.py",
]

# tools/train.py --data-root --train-json --val-json set paths, classes and num_classes
model = dict(bbox_head=dict(num_classes=1))
train_cfg = dict(max_epochs=100, val_interval=5)
optim_wrapper = dict(paramwise_cfg=dict(batch_size_per_gpu=16))
default_hooks = dict(checkpoint=dict(save_best="coco/bbox_mAP"))
