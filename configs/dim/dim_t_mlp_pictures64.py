_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_10k.py",
    "../_base_/diffusion/default_runtime.py",
]

# pictures of yours, without classes: data/pictures/{train,val}, cut to squares and resized
data_root = "data/pictures"
data_advice = "put pictures into train and val there, or name a folder that has both with --data-root"
model = dict(
    network=dict(
        type="DiM",
        orders="cross",
        d_model=192,
        depth=5,
        mlp_ratio=3.75,
        input_size=(64, 64),
        patch_size=4,
        in_channels=3,
        num_classes=0,
    ),
    compile=True,
)
train_dataloader = dict(dataset=dict(type="ImageFolder", root=f"{data_root}/train", size=(64, 64)), batch_size=128)
held_out = dict(type="ImageFolder", root=f"{data_root}/val", size=(64, 64))
val_dataloader = dict(dataset=dict(dataset=held_out, num=1000))
test_dataloader = dict(dataset=dict(dataset=held_out))
