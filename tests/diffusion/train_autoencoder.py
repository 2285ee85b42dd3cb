"""Trains the tiny autoencoder of the tests, which lies in tests/diffusion/autoencoder (some minutes on two CPU cores).

python tests/diffusion/train_autoencoder.py data/cifar10/train tests/diffusion/autoencoder
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm


def main() -> None:
    """Squared error and a little of the KL divergence; the latents' scale is measured at last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of 32x32 photos, in class folders or not")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    args = parser.parse_args()
    paths = sorted([*args.photos.rglob("*.jpg"), *args.photos.rglob("*.png")])[::2]
    if not paths:
        parser.error(f"no photos in {args.photos}")
    photos = np.stack([cv2.imread(str(path))[..., ::-1] for path in tqdm(paths, "reading")])
    photos = torch.from_numpy(photos).permute(0, 3, 1, 2)
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, mid_block_add_attention=False,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.05)
    progress = tqdm(range(args.steps), "training")
    for step in progress:
        x = photos[torch.randint(len(photos), (32,))].float() / 127.5 - 1
        latents = network.encode(x).latent_dist
        restored = network.decode(latents.sample()).sample
        loss = F.mse_loss(restored, x) + 1e-5 * latents.kl().mean() / latents.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.5f}")
    with torch.no_grad():
        latents = network.eval().encode(photos[::50].float() / 127.5 - 1).latent_dist.mode()
    network.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    network.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
