_base_ = "evaluation.py"

restores = "sr_x3"  # task of the weights
data_root = "data/restoration"
train_roots = [f"{data_root}/train/{name}" for name in ("bsd400", "t91", "coco128")]
train_dataloader = dict(
    photos=dict(type="CleanFolder", root=train_roots),
    degradation=dict(type="Downsample", scale=3),
    schedule=[(20_000, 144, 32)],  # iterations, side of a crop of the large photo, crops a batch
)

sets = [
    dict(
        type="EvaluationSet",
        name=name,
        photos=dict(type="CleanFolder", root=f"{data_root}/test/{name}"),
        degradation=dict(type="Downsample", scale=3),
    )
    for name in ("set5", "set14", "bsd100", "urban100")
]
# photos that are neither trained on nor tested on
val_dataloader = dict(
    dataset=dict(
        sets=[
            dict(one, name="davis", photos=dict(one["photos"], root=f"{data_root}/val/davis"))
            for one in sets
            if one["name"] == "set5"
        ],
    ),
)
test_dataloader = dict(dataset=dict(sets=sets))
val_evaluator = dict(y_only=True, crop_border=3)
test_evaluator = dict(y_only=True, crop_border=3)
