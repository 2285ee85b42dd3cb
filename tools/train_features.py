#!/usr/bin/env python
"""Train the small classifier whose features pictures are compared by (tools/evaluate_samples.py).

    python tools/train_features.py CIFAR-10-images weights/features_cifar10.safetensors --data-name "CIFAR-10, JPEGs"

The folder holds train/CLASS/*.jpg and test/CLASS/*.jpg (or .png, ...), all of one size.
"""

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mambavision.diffusion import features
from mambavision.engine.cli import choose_device, run
from mambavision.engine.files import check_folder
from mambavision.engine.photos import DatasetError, find_photos, imread_unchanged

PAD = 4  # pixels by which crops of training pictures are moved at most


def read_classes(folder: Path, classes: list[str] | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures uint8 RGB (N, 3, H, W) and labels (N,) of a folder with one folder a class; and the class names."""
    photos = find_photos(folder)
    classes = classes or sorted({relative.parts[0] for _, relative in photos if len(relative.parts) > 1})
    wrong = [file for file, relative in photos if relative.parts[0] not in classes]
    if wrong:
        raise DatasetError(f"{wrong[0]} lies in no folder of a class ({', '.join(classes[:5])}, ...)")
    with ThreadPoolExecutor() as pool:
        pictures = list(tqdm(pool.map(lambda pair: imread_unchanged(pair[0]), photos), folder.name, len(photos)))
    for (file, _), picture in zip(photos, pictures, strict=True):
        if picture.shape != pictures[0].shape or picture.ndim != 3 or picture.dtype != np.uint8:
            raise DatasetError(f"{file}: {picture.dtype} {picture.shape}; all must be of one size, in 8-bit colour")
    labels = [classes.index(relative.parts[0]) for _, relative in photos]
    pixels = torch.from_numpy(np.stack(pictures)[..., 2::-1].transpose(0, 3, 1, 2).copy())
    return pixels, torch.tensor(labels), classes


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Floats in [-1, 1] of uint8 pictures (B, 3, H, W), moved by up to ``PAD`` pixels and mirrored at random."""
    count, _, height, width = pixels.shape
    top, left = torch.randint(2 * PAD + 1, (2, count, 1), device=pixels.device, generator=generator)
    mirrored = torch.rand(count, 1, device=pixels.device, generator=generator) < 0.5
    rows, columns = (torch.arange(side, device=pixels.device) for side in (height, width))
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    padded = F.pad(pixels.float() / 127.5 - 1, (PAD,) * 4, mode="reflect")
    picture = torch.arange(count, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, (top + rows)[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train(net: features.SmallClassifier, pixels: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train in bf16 with SGD and one cycle of the learning rate; pictures lie on the network's device."""
    generator = torch.Generator(pixels.device).manual_seed(args.seed)
    steps = math.ceil(len(pixels) / args.batch_size) * args.epochs
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)
    net.train()
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(args.epochs):
            for chosen in torch.randperm(len(pixels), device=pixels.device, generator=generator).split(args.batch_size):
                x = augmented(pixels[chosen], generator).contiguous(memory_format=torch.channels_last)
                with torch.autocast(pixels.device.type, torch.bfloat16):
                    logits = net(x)
                loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    net.eval()


@torch.inference_mode()
def accuracy(net: features.SmallClassifier, pixels: Tensor, labels: Tensor) -> float:
    """Share of pictures whose class is found, in fp32."""
    found = [net(part.float() / 127.5 - 1).argmax(1) for part in pixels.split(1000)]
    return (torch.cat(found) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("out", help="file to write, *.safetensors")
    parser.add_argument("--data-name", default="", help="what the pictures are, for the file's metadata")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.4, help="highest of the cycle (default: 0.4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    args = parser.parse_args()

    check_folder(Path(args.out).parent, "out")
    if min(args.epochs, args.batch_size) < 1:
        raise ValueError("--epochs and --batch-size must be at least 1")
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    pixels, labels, classes = read_classes(args.data / "train")
    net = features.SmallClassifier(len(classes), input_size=pixels.shape[-1])
    net = net.to(device, memory_format=torch.channels_last)
    start = time.perf_counter()
    train(net, pixels.to(device), labels.to(device), args)
    seconds = time.perf_counter() - start
    pixels, labels, _ = read_classes(args.data / "test", classes)
    found = accuracy(net, pixels.to(device), labels.to(device))
    metadata = {"training_data": args.data_name or str(args.data), "test_accuracy": f"{found:.4f}"}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    features.save(net, args.out, classes=classes, metadata=metadata)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{args.out}: {millions:.2f} M parameters, test accuracy {found:.4f}, trained in {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
