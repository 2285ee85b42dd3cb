#!/usr/bin/env python
"""Sample pictures or clips from a diffusion model.

    python tools/sample.py --num 16 --steps 25 --seed 0 --out-dir out
    python tools/sample.py --num 8 --classes cat 8 --guidance 2 --out-dir cats --weights my.safetensors
    python tools/sample.py --video --num 4 --out-dir out
    python tools/sample.py --out-dir out --config my_config.py --weights work_dirs/my_config/iter_10000.pth
    python tools/sample.py --num 10000 --save npz --out-dir out --batch-size 500     (for tools/evaluate_samples.py)

Sample i has the seed SEED + i, and comes out the same whatever it is sampled with. Weights are a .safetensors file, a
folder that DiffusionPipeline.save_pretrained wrote, or with --config a training checkpoint.
"""

import argparse
from pathlib import Path
from typing import get_args

from mambavision.diffusion import cli
from mambavision.diffusion.objectives import Scheduler
from mambavision.diffusion.outputs import RATE
from mambavision.diffusion.pipeline import GUIDANCE, Precision
from mambavision.engine.cli import run
from mambavision.engine.memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=16, help="how many samples (default: 16)")
    parser.add_argument("--steps", type=int, default=25, help="of the scheduler (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: 0)")
    parser.add_argument("--out-dir", required=True, help="folder for the files")
    classes_help = "names or indices, repeated in turn (default: all classes in turn)"
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help=classes_help)
    guidance_help = (
        f"of the class; 1 is none, and half the work (default: {GUIDANCE:g} of pictures with classes, where training "
        "left them out at times)"
    )
    parser.add_argument("--guidance", type=float, help=guidance_help)
    parser.add_argument("--video", action="store_true", help="sample clips: default weights are those for video")
    parser.add_argument("--weights", help="weights file or folder (default: what comes with this project)")
    parser.add_argument("--config", help="config that a training checkpoint (.pth) was trained by")
    parser.add_argument("--autoencoder", help="folder of a diffusers AutoencoderKL, for weights of latents")
    parser.add_argument("--scheduler", choices=get_args(Scheduler), help="default: euler, or dpm-solver++")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=int, help="samples at once (default: up to 64, as memory allows)")
    parser.add_argument("--precision", choices=get_args(Precision), help="default: bf16 on a GPU, fp32 on a CPU")
    save_help = "grid, single files, samples.npz (default: grid single)"
    parser.add_argument("--save", nargs="+", choices=get_args(cli.Output), default=["grid", "single"], help=save_help)
    parser.add_argument("--rate", type=float, default=RATE, help=f"frames a second of clips (default: {RATE:g})")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    args = parser.parse_args()

    if args.config and not args.weights:
        raise ValueError("--config is for a training checkpoint: name it with --weights")
    keep_freed_memory()
    cli.check_out_dir(args.out_dir)  # before the weights: the quicker answer first
    weights = Path(args.weights) if args.weights else cli.find_weights(video=args.video)
    pipeline = cli.load_pipeline(weights, config=args.config, device=args.device, autoencoder=args.autoencoder)
    if args.video and not pipeline.makes_video:
        raise ValueError(f"{weights} samples pictures, not clips: leave out --video or name other weights")
    files = cli.sample_files(
        pipeline, args.out_dir, num=args.num, seed=args.seed, class_labels=cli.classes_of(pipeline, args.classes),
        save=args.save, rate=args.rate, overwrite=args.overwrite, guidance_scale=args.guidance,
        num_inference_steps=args.steps, scheduler=args.scheduler, batch_size=args.batch_size, precision=args.precision,
    )  # fmt: skip
    print(f"{args.num} samples of {weights.name}: {files[0]}" + f" and {len(files) - 1} more files" * (len(files) > 1))


if __name__ == "__main__":
    run(main)
