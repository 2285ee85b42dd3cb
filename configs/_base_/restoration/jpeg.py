_base_ = "evaluation.py"

restores = "jpeg"  # task of the weights
data_root = "data/restoration"
train_roots = [f"{data_root}/train/{name}" for name in ("bsd400", "t91", "coco128")]
train_dataloader = dict(
    photos=dict(type="CleanFolder", root=train_roots),
    degradation=dict(type="JPEG", quality=(5, 95)),
    schedule=[(20_000, 96, 32)],  # iterations, side of a crop, crops a batch
)

sets = [
    dict(
        type="EvaluationSet",
        name=f"{name}_q{quality}",
        photos=dict(type="CleanFolder", root=f"{data_root}/test/{name}"),
        degradation=dict(type="JPEG", quality=(quality, quality)),
    )
    for name in ("live1",)
    for quality in (10, 20, 30, 40)
]
# photos that are neither trained on nor tested on
val_dataloader = dict(
    dataset=dict(
        sets=[
            dict(one, name="davis_q10", photos=dict(one["photos"], root=f"{data_root}/val/davis"))
            for one in sets
            if one["name"] == "live1_q10"
        ],
    ),
)
test_dataloader = dict(dataset=dict(sets=sets))
val_evaluator = dict(psnr_b=True)
test_evaluator = dict(psnr_b=True)
