_base_ = ["mamba_yolo_t_tinycoco.py"]

# Goes on from mamba_yolo_t_tinycoco (--load-from), half of the pictures enlarged up to four times: the smallest boxes
# are as small as a cell, and a prediction must overlap a box before the assigner lets it learn that box.
train_dataloader = dict(
    dataset=dict(
        dataset=dict(
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
train_cfg = dict(max_epochs=14, val_interval=2)
