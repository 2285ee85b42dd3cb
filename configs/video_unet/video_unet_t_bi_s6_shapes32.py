_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_10k.py",
    "../_base_/diffusion/default_runtime.py",
]

# drawn when the run begins
clips = (32, 32, 32)
model = dict(
    network=dict(type="video_unet_t", in_channels=3, input_size=clips, num_classes=3),
    objective=dict(mean=2.0, std=1.5),  # paths and colours show through much noise: they are learnt there
)
train_dataloader = dict(dataset=dict(type="BouncingShapes", num=4000, size=clips), batch_size=8)
held_out = dict(type="BouncingShapes", num=128, size=clips, seed=1)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
optim_wrapper = dict(optimizer=dict(lr=6e-4))
