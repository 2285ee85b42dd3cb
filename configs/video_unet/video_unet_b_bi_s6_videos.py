_base_ = [
    "../_base_/diffusion/evaluation.py",
    "../_base_/diffusion/flow_1k.py",
    "../_base_/diffusion/default_runtime.py",
]

# the recipe of the paper's versions 4 and 5 (epsilon, cosine schedule, lr 1e-4, batch 8, 100,000 steps, EMA 0.9999),
# with our 1000 steps of noise, warm-up, clipped gradients and AdamW's betas, on videos of yours:
# data/videos/{train,val}, at least 64 frames each
data_root = "data/videos"
clips = (64, 32, 32)
model = dict(
    network=dict(type="video_unet_b", in_channels=3, input_size=clips, temporal="bi_s6"),
    objective=dict(_delete_=True, type="EpsilonPrediction", schedule="cosine"),
)
train_dataloader = dict(
    dataset=dict(type="VideoFolder", root=f"{data_root}/train", size=clips, flip=False), batch_size=8
)
held_out = dict(type="VideoFolder", root=f"{data_root}/val", size=clips, flip=False)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))

train_cfg = dict(max_iters=100_000, val_interval=5000)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
custom_hooks = [
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=1e-4, update_buffers=True),  # decay 0.9999
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=500),
]
