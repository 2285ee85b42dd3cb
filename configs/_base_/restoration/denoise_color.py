_base_ = "evaluation.py"

restores = "denoise_color"  # task of the weights
data_root = "data/restoration"
train_roots = [f"{data_root}/train/{name}" for name in ("bsd400", "t91", "coco128")]
train_dataloader = dict(
    photos=dict(type="CleanFolder", root=train_roots),
    degradation=dict(type="GaussianNoise", sigma=(0, 55), eight_bit=0.5),  # what is restored is a file
    schedule=[(20_000, 64, 32)],  # iterations, side of a crop, crops a batch
)

sets = [
    dict(
        type="EvaluationSet",
        name=f"{name}_s{sigma}",
        photos=dict(type="CleanFolder", root=f"{data_root}/test/{name}"),
        degradation=dict(type="GaussianNoise", sigma=(sigma, sigma)),
    )
    for name in ("cbsd68", "kodak24", "mcmaster", "urban100")
    for sigma in (15, 25, 50)
]
# photos that are neither trained on nor tested on
val_dataloader = dict(
    dataset=dict(
        sets=[
            dict(one, name="davis_s25", photos=dict(one["photos"], root=f"{data_root}/val/davis"))
            for one in sets
            if one["name"] == "kodak24_s25"
        ],
    ),
)
test_dataloader = dict(dataset=dict(sets=sets))
