_base_ = "evaluation.py"

data_root = "data/tinyimagenet"
data_advice = "tools/tinyimagenet.py pack makes it (see its --help), or name yours with --data-root"
train_dataloader = dict(
    dataset=dict(
        type="ImageArrays",
        images=f"{data_root}/train_photos.npy",
        labels=f"{data_root}/train_labels.npy",
        names=f"{data_root}/names.json",
        bgr=True,
    ),
    batch_size=256,
)
held_out = dict(
    type="ImageArrays",
    images=f"{data_root}/val_photos.npy",
    labels=f"{data_root}/val_labels.npy",
    names=f"{data_root}/names.json",
    bgr=True,
)
val_dataloader = dict(dataset=dict(dataset=held_out, num=2500))
test_dataloader = dict(dataset=dict(dataset=held_out))
