#!/usr/bin/env python
"""Turn a training checkpoint into published weights: safetensors that rebuild their network, and a model card.

    python tools/test.py configs/serpent/serpent_s_denoise_gray.py work_dirs/x/iter_20000.pth --out test.json
    python tools/publish.py work_dirs/x/iter_20000.pth weights/serpent_s_denoise_gray.safetensors \\
        --config configs/serpent/serpent_s_denoise_gray.py --metrics test.json --hardware "one H100, 14 minutes" \\
        --data "BSDS500 train and test, ..." --cannot "Real sensor noise: ..."

The averaged weights of a run with EMA are taken. The card lies beside the weights, with .md for .safetensors.
"""

import argparse
import datetime
import json
from pathlib import Path

from mmengine.config import Config

from mambavision.detection.weights import from_checkpoint, save_weights
from mambavision.diffusion import weights as diffusion_weights
from mambavision.engine import runs
from mambavision.engine.cli import run
from mambavision.engine.files import atomic_path, check_file
from mambavision.engine.weights import build_from_checkpoint, read_checkpoint
from mambavision.restoration import weights


def publish_detector(cfg: Config, args: argparse.Namespace) -> str:
    """Write a detector's weights; returns what it is, for the card."""
    detector, backbone = from_checkpoint(cfg, args.checkpoint), cfg.model.backbone
    if backbone.type != "MambaYOLOBackbone":
        raise ValueError(f"{args.config}: only detectors of Mamba-YOLO are published, this one has a {backbone.type}")
    (side,) = (step["size"] for step in cfg.test_dataloader.dataset.pipeline if step["type"] == "LetterBox")
    classes, variant = detector.dataset_meta["classes"], backbone.get("variant", "aaai")
    options = dict(size=backbone.size, variant=variant, classes=classes, input_size=side)
    save_weights(detector, args.out, **options, extra={"training_data": args.data})
    name = f"Mamba-YOLO-{backbone.size.upper()} ({variant}, {_millions(detector)})"
    return f"{name}, {len(classes)} classes, {side} px input."


def publish_restorer(cfg: Config, args: argparse.Namespace) -> str:
    """Write a restoration network's weights; returns what it is, for the card."""
    network = build_from_checkpoint(cfg, args.checkpoint)[0].network
    degradation = cfg.train_dataloader.get("degradation", {})
    said = {"training_data": args.data, "trained_by": args.config}
    said |= {"degradation": degradation.to_dict() if degradation else {}}
    if network.config.get("sigma_input"):
        said["sigma_range"] = list(degradation.sigma)
    weights.save(network, args.out, task=cfg.restores, metadata=said, precision=args.precision)
    arguments = ", ".join(f"{name} {value}" for name, value in (degradation or {}).items() if name != "type")
    made = f"; trained on {degradation.type} ({arguments})" if degradation else ""
    return f"{type(network).__name__} ({_millions(network)}) for `{cfg.restores}`{made}."


def publish_diffusion(cfg: Config, args: argparse.Namespace) -> str:
    """Write a denoising network's weights; returns what it is, for the card."""
    diffusion_weights.check_trained_as(cfg.model, read_checkpoint(args.checkpoint), args.checkpoint)
    model, checkpoint = build_from_checkpoint(cfg, args.checkpoint)
    network, objective = model.network, model.objective
    trained_on = checkpoint.get("meta", {}).get("dataset_meta", {})
    names = trained_on.get("classes") if network.num_classes else None
    said = {"training_data": args.data, "trained_by": args.config}
    guidable = diffusion_weights.guidable(cfg.model, checkpoint, args.checkpoint)
    said |= diffusion_weights.class_dropout(network, guidable)
    if "autoencoder" in trained_on:
        said["autoencoder"] = trained_on["autoencoder"]
    options = dict(objective=objective, class_names=names, metadata=said, precision=args.precision)
    diffusion_weights.save(network, args.out, **options)
    size = "x".join(map(str, network.input_size))
    classes = f", {network.num_classes} classes" if network.num_classes else ""
    arguments = ", ".join(f"{name} {value}" for name, value in objective.config().items() if name != "type")
    learnt = f"{type(objective).__name__} ({arguments})"
    return f"{type(network).__name__} ({_millions(network)}) of {network.in_channels}x{size}{classes}; {learnt}."


def _millions(network) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


def read_metrics(path: str) -> dict[str, float]:
    """Numbers by name, as tools/test.py --out writes them."""
    try:
        found = json.loads(Path(path).read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, int | float) for value in found.values()):
        raise ValueError(f"--metrics {path}: not a JSON file that tools/test.py --out wrote")
    return found


def card(what: str, args: argparse.Namespace) -> str:
    """The model card: what, how trained, measured how, data, limits; only what is known."""
    checkpoint = read_checkpoint(args.checkpoint)
    meta, averaged = checkpoint.get("meta", {}), ", averaged weights" * ("ema_state_dict" in checkpoint)
    made = [f"`{args.config}`", *([f"iteration {meta['iter']}, seed {meta['seed']}"] if "iter" in meta else [])]
    lines = [f"# {Path(args.out).stem}", "", what, ""]
    lines += [f"- **Trained here**, published {datetime.date.today()}: {', '.join(made)}{averaged}."]
    lines[-1] += f" {args.hardware}." if args.hardware else ""
    if args.metrics:
        found = read_metrics(args.metrics)
        measures = list(dict.fromkeys(name.rpartition("/")[2] for name in found))
        sets = list(dict.fromkeys(name.rpartition("/")[0] for name in found))
        lines += [f"- **Measured** with `python tools/test.py {args.config} {args.out}`:", ""]
        lines += [f"  | set | {' | '.join(measures)} |", f"  |---|{'---|' * len(measures)}"]
        for one in sets:
            values = (found.get(f"{one}/{measure}" if one else measure) for measure in measures)
            shown = (f"{value:.2f}" if value >= 10 else f"{value:.4f}" for value in values)
            lines.append(f"  | {one or 'test set'} | {' | '.join(shown)} |")
        lines.append("")
    lines += [f"- **{name}**: {text}" for name, text in (("Data", args.data), ("Cannot", args.cannot)) if text]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="training checkpoint (.pth)")
    parser.add_argument("out", help="file to write, *.safetensors")
    parser.add_argument("--config", required=True, help="config that it was trained by")
    parser.add_argument("--metrics", help="JSON that tools/test.py --out wrote, for the card")
    parser.add_argument("--hardware", default="", help="what it was trained on, and how long, for the card")
    parser.add_argument("--data", default="", help="photos that it was trained on")
    parser.add_argument("--cannot", default="", help="what it is not made for, for the card")
    parser.add_argument(
        "--precision", choices=["fp16", "fp32"], default="fp16", help="of a network that restores or samples"
    )
    args = parser.parse_args()
    check_file(args.out, "out")
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}")
    if args.metrics and not Path(args.metrics).is_file():
        raise FileNotFoundError(f"no metrics at {args.metrics}")
    if args.metrics:
        read_metrics(args.metrics)
    cfg = runs.read_config(args.config)
    publish = {"detection": publish_detector, "restoration": publish_restorer, "diffusion": publish_diffusion}
    what = publish[runs.task_of(args)](cfg, args)
    with atomic_path(Path(args.out).with_suffix(".md")) as temporary:
        temporary.write_text(card(what, args))
    print(f"{args.out}: {what}")


if __name__ == "__main__":
    run(main)
