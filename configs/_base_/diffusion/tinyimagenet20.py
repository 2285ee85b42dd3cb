_base_ = "tinyimagenet64.py"

classes = [
    "goldfish", "koala", "king penguin", "golden retriever", "tabby", "lion", "brown bear", "ladybug", "monarch",
    "African elephant", "bison", "lesser panda", "school bus", "sports car", "teapot", "orange", "pizza", "alp",
    "seashore", "brain coral",
]  # fmt: skip
train_dataloader = dict(dataset=dict(classes=classes))
val_dataloader = dict(dataset=dict(dataset=dict(classes=classes)))
test_dataloader = dict(dataset=dict(dataset=dict(classes=classes)))
