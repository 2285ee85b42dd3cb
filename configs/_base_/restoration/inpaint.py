_base_ = "evaluation.py"

restores = "inpaint"  # task of the weights
data_root = "data/restoration"
train_roots = [f"{data_root}/train/{name}" for name in ("bsd400", "t91", "coco128")]
train_dataloader = dict(
    photos=dict(type="CleanFolder", root=train_roots),
    degradation=dict(type="InpaintingMask", strokes=(4, 12), width=(2.0, 12.0)),
    schedule=[(20_000, 128, 32)],  # iterations, side of a crop, crops a batch
)

sets = [
    dict(
        type="EvaluationSet",
        name=name,
        photos=dict(type="CleanFolder", root=f"{data_root}/test/{name}"),
        degradation=dict(type="InpaintingMask", strokes=(4, 12), width=(2.0, 12.0)),
    )
    for name in ("cbsd68", "kodak24")
]
# photos that are neither trained on nor tested on
val_dataloader = dict(
    dataset=dict(
        sets=[
            dict(one, name="davis", photos=dict(one["photos"], root=f"{data_root}/val/davis"))
            for one in sets
            if one["name"] == "kodak24"
        ],
    ),
)
test_dataloader = dict(dataset=dict(sets=sets))
