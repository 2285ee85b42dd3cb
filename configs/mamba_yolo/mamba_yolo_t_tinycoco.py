_base_ = ["mamba_yolo_t_custom.py"]

# A plain check that the network, its losses and its decoding fit together: it must learn 32 COCO photos by heart.
# Trained and tested on the same photos, mirrored at most.
data_root = "../shared/data/tinycoco"
ann_file = "annotations/instances_train2017.json"
photos = dict(data_root=data_root, ann_file=ann_file, data_prefix=dict(img="images/train2017"), cache="ram")
train_dataloader = dict(
    dataset=dict(
        **photos,
        pipeline=[
            dict(type="LoadPhoto", with_boxes=True),
            dict(type="LetterBox", size=640),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(dataset=photos)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f"{data_root}/{ann_file}")
test_evaluator = val_evaluator

model = dict(bbox_head=dict(num_classes=80))
train_cfg = dict(max_epochs=800, val_interval=100)
default_hooks = dict(logger=dict(interval=100), checkpoint=dict(interval=100))
