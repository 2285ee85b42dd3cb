_base_ = "evaluation.py"

# of class folders at 256x256, with the autoencoder of Stable Diffusion 1: 4 x 32 x 32
data_root = "data/latents256"
data_advice = "tools/cache_latents.py makes it (see its --help), or name yours with --data-root"
train_dataloader = dict(dataset=dict(type="LatentShards", root=f"{data_root}/train"), batch_size=256)
held_out = dict(type="LatentShards", root=f"{data_root}/val")
val_dataloader = dict(dataset=dict(dataset=held_out, num=2500))
test_dataloader = dict(dataset=dict(dataset=held_out))
