_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_10k.py",
    "../_base_/diffusion/default_runtime.py",
]

# drawn when the run begins
clips = (32, 32, 32)
speed = (0.1, 0.6)  # pixels a frame; a layer over time looks at one place, so that colours must stay there
model = dict(
    network=dict(type="video_unet_t", in_channels=3, input_size=clips, num_classes=3),
    objective=dict(mean=1.6, std=1.4),  # paths and colours show through much noise: they are learnt there
)
train_dataloader = dict(dataset=dict(type="BouncingShapes", num=8000, size=clips, speed=speed), batch_size=8)
held_out = dict(type="BouncingShapes", num=128, size=clips, speed=speed, seed=1)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
