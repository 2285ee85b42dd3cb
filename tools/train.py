#!/usr/bin/env python
"""Train a detector, a restoration network or a diffusion model from a config.

    python tools/train.py configs/mamba_yolo/mamba_yolo_debug.py
    python tools/train.py configs/mamba_yolo/mamba_yolo_t_custom.py \\
        --data-root photos --train-json train.json --val-json val.json
    python tools/train.py configs/serpent/serpent_s_denoise_gray25.py --data-root data/restoration --amp bf16 --seed 0
    python tools/train.py configs/dim/dim_s_2x_cifar10.py --amp bf16 --seed 0
    torchrun --nproc-per-node 8 tools/train.py configs/mamba_yolo/mamba_yolo_t_8xb64_300e_coco.py --launcher pytorch
    torchrun --nproc-per-node 8 tools/train.py configs/dim/dim_xl_2x_latents256.py --amp bf16 --launcher pytorch --fsdp

Checkpoints, logs, loss_curve.png and loss_curve.csv go to the work directory.
"""

import argparse
import os

# before torch loads OpenMP: threads that spin instead stall each other on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from mambavision.detection import cli as detection  # noqa: E402
from mambavision.diffusion import runs as diffusion  # noqa: E402
from mambavision.engine import runs  # noqa: E402
from mambavision.engine.cli import run  # noqa: E402
from mambavision.engine.memory import keep_freed_memory  # noqa: E402
from mambavision.restoration import runs as restoration  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs.add_config_arguments(parser)
    detection.add_data_arguments(parser)
    resume_help = "go on from the newest checkpoint of the work directory, if there is one"
    parser.add_argument("--resume", action="store_true", help=resume_help)
    overwrite_help = "replace an earlier run in the work directory, its checkpoints too"
    parser.add_argument("--overwrite", action="store_true", help=overwrite_help)
    parser.add_argument("--load-from", help="checkpoint (.pth) or published weights (.safetensors) to start from")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="mixed precision; fp16 needs a GPU")
    parser.add_argument("--seed", type=int, help="seed of weights, data order and augmentation")
    parser.add_argument("--max-seconds", type=float, help="train so long, in place of the config's iterations and rate")
    parser.add_argument("--fsdp", action="store_true", help="spread the weights over torchrun's processes")
    args = parser.parse_args()
    options = dict(resume=args.resume, overwrite=args.overwrite)
    options |= dict(load_from=args.load_from, amp=args.amp, seed=args.seed)
    task = runs.task_of(args)
    if task != "detection":
        of_task = {"restoration": restoration, "diffusion": diffusion}[task]
        options |= dict(max_seconds=args.max_seconds, sharded=args.fsdp)
        of_task.train(of_task.load_config(args), **options)
    elif args.fsdp:
        raise ValueError("--fsdp is for networks made of blocks: a detector's weights fit one device, leave it out")
    elif args.max_seconds is not None:
        raise ValueError(
            "--max-seconds is for restoration and diffusion: a detector's schedule counts epochs, train_cfg.max_epochs"
        )
    else:
        if not torch.cuda.is_available():
            keep_freed_memory()  # a fifth of a step's time
        detection.train(detection.load_config(args), **options)


if __name__ == "__main__":
    run(main, interrupted="stopped: the same command with --resume goes on from the newest checkpoint, if there is one")
