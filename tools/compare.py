#!/usr/bin/env python
"""Train configs with several seeds, test each run's best checkpoint, and print mean and spread side by side.

    python tools/compare.py configs/mamba_yolo/mamba_yolo_t_bccd.py configs/rtmdet/rtmdet_tiny_bccd.py \\
        configs/yolox/yolox_tiny_bccd.py --seeds 0 1 2 --jobs 3 --amp bf16

Runs go side by side, ``--jobs`` at a time, each in a process of its own; work directories, logs and metrics stay under
``--out``. A run whose metrics are there already is not repeated, one that was interrupted goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mambavision.engine import cli

TOOLS = Path(__file__).resolve().parent


def call(log: Path, *command: object) -> None:
    with log.open("a") as f:
        code = subprocess.run([sys.executable, *map(str, command)], stdout=f, stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"a run failed with exit code {code}: see {log}")


def run(config: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Test metrics of one config and seed."""
    folder = Path(args.out) / f"{Path(config).stem}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    metrics = folder / "test.json"
    if not metrics.exists():
        shared = [*(["--data-root", args.data_root] if args.data_root else [])]
        changes = ["--cfg-options", *args.cfg_options] if args.cfg_options else []
        amp = ["--amp", args.amp] if args.amp else []
        train = [TOOLS / "train.py", config, "--work-dir", folder, "--seed", seed, "--resume", *amp, *shared, *changes]
        call(folder / "train.out", *train)
        best = sorted(folder.glob("best_*.pth"))
        if not best:
            raise ValueError(f"{folder} holds no best checkpoint: the config needs save_best and a validation set")
        test = [TOOLS / "test.py", config, best[-1], "--work-dir", folder / "test", "--out", metrics, *shared]
        call(folder / "test.out", *test)
    return json.loads(metrics.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", default="work_dirs/compare", help="folder for all runs")
    parser.add_argument("--data-root", help="passed to train.py and test.py")
    parser.add_argument("--amp", choices=["bf16", "fp16"])
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="passed to train.py")
    args = parser.parse_args()
    for config in args.configs:
        if not Path(config).is_file():
            raise FileNotFoundError(f"{config}: no such config")
    jobs = [(config, seed) for config in args.configs for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(tqdm(pool.map(lambda job: run(*job, args), jobs), total=len(jobs), unit="run"))
    table = Table("config", "metric", *(f"seed {s}" for s in args.seeds), "mean", "spread (max - min)")
    for config in args.configs:
        of_config = [metrics for job, metrics in zip(jobs, found, strict=True) if job[0] == config]
        for name in of_config[0]:
            values = [metrics[name] for metrics in of_config]
            figures = [*values, statistics.mean(values), max(values) - min(values)]
            table.add_row(Path(config).stem, name, *(f"{v:.4f}" for v in figures))
    Console(width=140).print(table)


if __name__ == "__main__":
    cli.run(main)
