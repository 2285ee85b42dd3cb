_base_ = "evaluation.py"

data_root = "data/tinyimagenet"
data_advice = "tools/tinyimagenet.py pack makes it (see its --help), or name yours with --data-root"
classes = [
    "goldfish", "koala", "king penguin", "golden retriever", "tabby", "lion", "brown bear", "ladybug", "monarch",
    "African elephant", "bison", "lesser panda", "school bus", "sports car", "teapot", "orange", "pizza", "alp",
    "seashore", "brain coral",
]  # fmt: skip
train_dataloader = dict(
    dataset=dict(
        type="ImageArrays",
        images=f"{data_root}/train_photos.npy",
        labels=f"{data_root}/train_labels.npy",
        names=f"{data_root}/names.json",
        classes=classes,
        bgr=True,
    ),
    batch_size=256,
)
held_out = dict(
    type="ImageArrays",
    images=f"{data_root}/val_photos.npy",
    labels=f"{data_root}/val_labels.npy",
    names=f"{data_root}/names.json",
    classes=classes,
    bgr=True,
)
val_dataloader = dict(dataset=dict(dataset=held_out))
test_dataloader = dict(dataset=dict(dataset=held_out))
