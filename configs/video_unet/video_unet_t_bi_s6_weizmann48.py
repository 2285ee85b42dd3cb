_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

# four actions of nine people
data_root = "data/weizmann"
data_advice = "configs/video_unet/README.md says how to make it, or name yours with --data-root"
clips = (48, 32, 32)
model = dict(network=dict(type="video_unet_t", in_channels=3, input_size=clips, temporal="bi_s6", num_classes=4))
train_dataloader = dict(
    dataset=dict(type="VideoFolder", root=f"{data_root}/train", size=clips, classes=True), batch_size=8
)
held_out = dict(type="VideoFolder", root=f"{data_root}/val", size=clips, classes=True)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))

train_cfg = dict(max_iters=1500)
