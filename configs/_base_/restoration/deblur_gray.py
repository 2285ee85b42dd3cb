_base_ = "evaluation.py"

restores = "deblur_gray"  # task of the weights
data_root = "data/restoration"
train_roots = [f"{data_root}/train/{name}" for name in ("bsd400", "t91", "coco128")]
train_dataloader = dict(
    photos=dict(type="CleanFolder", root=train_roots, gray=True),
    degradation=dict(type="GaussianBlur", taps=61, sigma=3.0, noise=0.05),
    schedule=[(20_000, 128, 32)],  # iterations, side of a crop, crops a batch
)

sets = [
    dict(
        type="EvaluationSet",
        name=name,
        photos=dict(type="CleanFolder", root=f"{data_root}/test/{name}", gray=True),
        degradation=dict(type="GaussianBlur", taps=61, sigma=3.0, noise=0.05),
    )
    for name in ("bsd68", "set12", "urban100")
]
# photos that are neither trained on nor tested on
val_dataloader = dict(
    dataset=dict(
        sets=[
            dict(one, name="davis", photos=dict(one["photos"], root=f"{data_root}/val/davis"))
            for one in sets
            if one["name"] == "set12"
        ],
    ),
)
test_dataloader = dict(dataset=dict(sets=sets))
