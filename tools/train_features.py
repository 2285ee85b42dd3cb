#!/usr/bin/env python
"""Train the small classifiers whose features pictures and clips are compared by (tools/evaluate_samples.py).

    python tools/train_features.py pictures data/cifar10 weights/features_cifar10.safetensors --data-name "CIFAR-10"
    python tools/train_features.py clips weights/features_clips.safetensors

Pictures lie in train/CLASS/*.jpg and test/CLASS/*.jpg (or .png, ...) and are of one size. Clips are drawn: digits
and shapes that fly about. Their classes are what is done to them: nothing, or one of ten ways to spoil them.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mambavision.diffusion import features
from mambavision.diffusion.datasets import ClassFolder
from mambavision.diffusion.generated import BouncingShapes, MovingDigits
from mambavision.engine.cli import choose_device, run
from mambavision.engine.files import check_file
from mambavision.engine.photos import DatasetError, find_photos, first_size, read_all

PAD = 4  # pixels by which crops of training pictures are moved at most
FRAMES, SIDE = 16, 32  # of training clips

Batches = Iterator[tuple[Tensor, Tensor]]  # pictures (B, 3, H, W) or clips (B, 3, T, H, W) in [-1, 1], labels (B,)


def train(net: nn.Module, batches: Batches, *, steps: int, lr: float, max_seconds: float = math.inf) -> None:
    """Train in bf16 with SGD; the learning rate rises for a fifth of the steps, or of the time, and falls to 0."""
    device = next(net.parameters()).device
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    fused = device.type == "cuda"
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=fused)
    net.train()
    start = time.perf_counter()
    with tqdm(desc="training", total=steps, unit="step", mininterval=1) as bar:
        for step, (x, labels) in enumerate(batches):
            done = max(step / steps, (time.perf_counter() - start) / max_seconds)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * (5 * done if done < 0.2 else (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2)
            with torch.autocast(device.type, torch.bfloat16):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            if step % 50 == 49:
                loss.item()  # the clock must not run ahead of a GPU
    net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, batches: Batches) -> float:
    """Share of items whose class is found, in fp32."""
    found = [net(x).argmax(1) == labels for x, labels in batches]
    return torch.cat(found).double().mean().item()


def read_classes(folder: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Pictures uint8 RGB (N, 3, H, W), labels (N,) and class names of a folder with one folder a class."""
    size = first_size(path for path, _ in find_photos(folder))
    if size is None:
        raise DatasetError(f"{folder}: none of its photos can be read")
    dataset = ClassFolder(folder, size)
    items, _ = read_all(dataset)
    pixels = torch.from_numpy(np.concatenate([item.frames for item in items]))
    return pixels, torch.tensor([item.label for item in items]), dataset.class_names


def picture_batches(pixels: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator) -> Batches:
    """Endless batches; each picture once before one comes again, moved and mirrored."""
    while True:
        for chosen in torch.randperm(len(pixels), device=pixels.device, generator=generator).split(batch_size):
            x = augmented(pixels[chosen], generator)
            yield x.contiguous(memory_format=torch.channels_last), labels[chosen]


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


def train_pictures(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, tuple[str, ...], float, str]:
    """The trained network, its classes, its accuracy on test pictures, and what it was trained on."""
    generator = torch.Generator(device).manual_seed(args.seed)
    pixels, labels, classes = read_classes(args.data / "train")
    tested, tested_labels, same = read_classes(args.data / "test")
    if same != classes:
        raise DatasetError(f"{args.data}: train has the classes {', '.join(classes)}, test has {', '.join(same)}")
    net = features.SmallClassifier(len(classes), input_size=pixels.shape[-1])
    net = net.to(device, memory_format=torch.channels_last)
    batches = picture_batches(pixels.to(device), labels.to(device), args.batch_size, generator)
    steps = args.epochs * -(-len(pixels) // args.batch_size)
    train(net, batches, steps=steps, lr=args.lr, max_seconds=args.max_seconds)
    parts = zip(tested.to(device).split(1000), tested_labels.to(device).split(1000), strict=True)
    found = accuracy(net, ((part.float() / 127.5 - 1, label) for part, label in parts))
    return net, classes, found, args.data_name or str(args.data)


def as_it_is(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Clips (B, 3, T, H, W); strength (B, 1, 1, 1, 1) in 0.2..1; draw(*shape) is uniform in [0, 1)."""
    return x


def stutter(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Each frame is held for some frames."""
    hold = 2 + (3 * strength.flatten()).long()[:, None]
    frame = torch.arange(x.shape[2], device=x.device)
    return of_frames(x, frame // hold * hold)


def shuffle(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Frames change places with near ones."""
    frame = torch.arange(x.shape[2], device=x.device)
    return of_frames(x, (frame + 6 * strength.flatten()[:, None] * draw(*x.shape[:3:2])).argsort(1))


def cut(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """From some frame on it is another clip."""
    begin = 2 + (draw(len(x), 1, 1, 1, 1) * (x.shape[2] - 4)).long()
    return torch.where(torch.arange(x.shape[2], device=x.device).view(-1, 1, 1) < begin, x, x.roll(1, 0))


def jitter(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Each frame is moved by some pixels."""
    count, _, frames, height, width = x.shape
    moves = ((2 * draw(2, count, 1, frames, 1, 1) - 1) * (1 + 2 * strength[None])).round().long()
    rows = (torch.arange(height, device=x.device).view(-1, 1) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + moves[1]).clamp(0, width - 1)
    return x.gather(3, rows.expand_as(x)).gather(4, columns.expand_as(x))


def flicker(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Each frame is darker by some factor."""
    return (x + 1) * (1 - 0.6 * strength * draw(len(x), 1, x.shape[2], 1, 1)) - 1


def fade(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """It darkens towards its end."""
    return (x + 1) * (1 - 0.8 * strength * torch.linspace(0, 1, x.shape[2], device=x.device).view(-1, 1, 1)) - 1


def smear(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Each frame is mixed with the ones around it."""
    mean = F.avg_pool3d(F.pad(x, (0, 0, 0, 0, 2, 2), mode="replicate"), (5, 1, 1), 1)
    return torch.lerp(x, mean, strength)


def blur(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Each pixel is mixed with the ones around it."""
    mean = F.avg_pool3d(F.pad(x, (2, 2, 2, 2, 0, 0), mode="replicate"), (1, 5, 5), 1)
    return torch.lerp(x, mean, strength)


def noise(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """Each value is changed by some amount."""
    return x + 0.5 * strength * (draw(*x.shape) - 0.5)


def warp(x: Tensor, strength: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """What is seen is bent, anew in each frame."""
    count, _, frames, height, width = x.shape
    coarse = (draw(count * frames, 2, 4, 4) - 0.5) * 0.5
    bent = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    straight = torch.eye(2, 3, device=x.device).expand(count * frames, 2, 3)
    grid = F.affine_grid(straight, [count * frames, 3, height, width], align_corners=False)
    grid = grid + bent * strength.expand(count, frames, 1, 1, 1).reshape(-1, 1, 1, 1)
    y = F.grid_sample(x.transpose(1, 2).flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return y.unflatten(0, (count, frames)).transpose(1, 2)


CHANGES = (as_it_is, stutter, shuffle, cut, jitter, flicker, fade, smear, blur, noise, warp)


def of_frames(x: Tensor, frames: Tensor) -> Tensor:
    """Of clips (B, 3, T, H, W) the frames (B, T)."""
    return x.gather(2, frames.clamp(max=x.shape[2] - 1).view(len(x), 1, -1, 1, 1).expand_as(x))


def draw_clips(num: int, seed: int) -> Tensor:
    """Clips uint8 (num, 3, 2 FRAMES, SIDE, SIDE), half of them digits, half shapes."""
    size = (2 * FRAMES, SIDE, SIDE)
    drawn = []
    for dataset in (MovingDigits(num - num // 2, size, seed=seed), BouncingShapes(num // 2, size, seed=seed)):
        items, _ = read_all(dataset, "clip")
        drawn += [np.broadcast_to(item.frames, (2 * FRAMES, 3, SIDE, SIDE)) for item in items]
    return torch.from_numpy(np.stack(drawn)).transpose(1, 2)


def clip_batches(clips: Tensor, batch_size: int, generator: torch.Generator) -> Batches:
    """Endless batches: parts of random clips, each spoilt in one way or none, which is its label."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device=clips.device, generator=generator)

    while True:
        chosen = (draw(batch_size) * len(clips)).long()
        begin = (draw(batch_size, 1) * (clips.shape[2] - FRAMES)).long()
        frames = begin + torch.arange(FRAMES, device=clips.device)
        picked = clips[chosen].gather(2, frames.view(-1, 1, FRAMES, 1, 1).expand(-1, 3, -1, SIDE, SIDE))
        x = picked.float() / 127.5 - 1
        labels = torch.arange(batch_size, device=clips.device) % len(CHANGES)
        parts = []
        for label, change in enumerate(CHANGES):
            part = x[label :: len(CHANGES)]
            parts.append(change(part, 0.2 + 0.8 * draw(len(part), 1, 1, 1, 1), draw).clamp(-1, 1))
        x = torch.empty_like(x)
        for label, part in enumerate(parts):
            x[label :: len(CHANGES)] = part
        yield x, labels


def train_clips(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, tuple[str, ...], float, str]:
    """The trained network, its classes, its accuracy on other clips, and what it was trained on."""
    net = features.SmallVideoClassifier(len(CHANGES), input_size=SIDE).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    train(
        net,
        clip_batches(draw_clips(args.num, 0).to(device), args.batch_size, generator),
        steps=args.steps,
        lr=args.lr,
        max_seconds=args.max_seconds,
    )
    held_out = max(args.num // 4, 110)
    others = clip_batches(draw_clips(held_out, 1).to(device), 110, generator)
    data = f"{args.num} clips of MovingDigits and BouncingShapes, {FRAMES} frames of {SIDE}x{SIDE} pixels"
    return net, tuple(change.__name__ for change in CHANGES), accuracy(net, islice(others, held_out // 110)), data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    pictures, clips = kinds.add_parser("pictures"), kinds.add_parser("clips")
    pictures.set_defaults(train=train_pictures)
    pictures.add_argument("data", type=Path, help="folder with train/CLASS/ and test/CLASS/")
    pictures.add_argument("--data-name", default="", help="what the pictures are, for the file's metadata")
    pictures.add_argument("--epochs", type=int, default=40)
    pictures.add_argument("--batch-size", type=int, default=512)
    pictures.add_argument("--lr", type=float, default=0.4, help="highest of the cycle (default: 0.4)")
    clips.set_defaults(train=train_clips, epochs=1)
    clips.add_argument("--num", type=int, default=8192, help="clips that are drawn (default: 8192)")
    clips.add_argument("--steps", type=int, default=4000)
    clips.add_argument("--batch-size", type=int, default=132)
    clips.add_argument("--lr", type=float, default=0.1, help="highest of the cycle (default: 0.1)")
    for kind in (pictures, clips):
        kind.add_argument("out", help="file to write, *.safetensors")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--max-seconds", type=float, default=math.inf, help="train no longer, on the same schedule")
        kind.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    args = parser.parse_args()

    check_file(args.out, "out")
    if min(args.epochs, args.batch_size) < 1 or not args.max_seconds > 0:
        raise ValueError("--epochs and --batch-size must be at least 1, --max-seconds more than 0")
    if args.train is train_clips and (min(args.steps, args.num) < 1 or args.batch_size < len(CHANGES)):
        raise ValueError(f"--steps and --num must be at least 1, --batch-size {len(CHANGES)}: a batch has all classes")
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    net, classes, found, data = args.train(args, device)
    seconds = time.perf_counter() - start
    features.save(net, args.out, classes=classes, metadata={"training_data": data, "test_accuracy": f"{found:.4f}"})
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{args.out}: {millions:.2f} M parameters, test accuracy {found:.4f}, read and trained in {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
