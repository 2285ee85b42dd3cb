_base_ = ["mamba_yolo_t_custom.py"]

# A plain check that the network, its losses and its decoding fit together: it must learn 32 COCO photos by heart.
# 1280x1280: at 640 nine of the 284 boxes hold no centre of a stride-8 cell, so nothing could learn them. Half of the
# pictures are enlarged up to four times: the smallest boxes are as small as a cell, and a prediction must overlap a box
# before the assigner lets it learn that box.
data_root = "../shared/data/tinycoco"
ann_file = "annotations/instances_train2017.json"
photos = dict(data_root=data_root, ann_file=ann_file, data_prefix=dict(img="images/train2017"), cache="ram")
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="RepeatDataset",  # an epoch is 25 passes: two steps between restarts of the workers would wait for them
        times=25,
        dataset=dict(
            type="CocoDetDataset",
            **photos,
            pipeline=[
                dict(type="LoadPhoto", with_boxes=True),
                dict(type="LetterBox", size=1280),
                dict(
                    type="RandomApply",
                    prob=0.5,
                    transforms=[dict(type="RandomScaleTranslate", scale=(1.0, 4.0), translate=1.0)],
                ),
                dict(type="PackDetInputs"),
            ],
        ),
    ),
)
val_dataloader = dict(
    dataset=dict(
        **photos,
        pipeline=[
            dict(type="LoadPhoto"),
            dict(type="LetterBox", size=1280),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "pad_param"),
            ),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f"{data_root}/{ann_file}")
test_evaluator = val_evaluator

model = dict(bbox_head=dict(num_classes=80))
train_cfg = dict(max_epochs=32, val_interval=8)
