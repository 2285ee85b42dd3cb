_base_ = "evaluation.py"

restores = "motion_deblur"  # task of the weights
data_root = "data/gopro"  # train/blur, train/sharp, test/blur, test/sharp: photos of the same name are pairs
train_dataloader = dict(
    photos=dict(type="PairedFolder", lq_root=f"{data_root}/train/blur", gt_root=f"{data_root}/train/sharp"),
    # iterations, side of a crop, crops a batch: progressive patches
    schedule=[(8000, 128, 32), (8000, 192, 16), (4000, 256, 8)],
)

sets = [
    dict(
        type="EvaluationSet",
        name="gopro",
        photos=dict(type="PairedFolder", lq_root=f"{data_root}/test/blur", gt_root=f"{data_root}/test/sharp"),
    )
]
val_dataloader = dict(dataset=dict(sets=sets))
test_dataloader = dict(dataset=dict(sets=sets))
