#!/usr/bin/env python
"""Train configs with several seeds, test each run's best checkpoint, and print mean and spread side by side.

    python tools/compare.py configs/mamba_yolo/mamba_yolo_t_bccd.py configs/rtmdet/rtmdet_tiny_bccd.py \\
        configs/yolox/yolox_tiny_bccd.py --seeds 0 1 2 --jobs 3 --amp bf16
    python tools/compare.py configs/serpent/serpent_s_denoise_gray25.py configs/dncnn/dncnn_denoise_gray25.py \\
        configs/conv_unet/conv_unet_denoise_gray25.py configs/window_transformer/window_transformer_denoise_gray25.py \\
        --data-root data/restoration --amp bf16 --cfg-options train_cfg.max_iters=2000 train_cfg.val_interval=200

Runs go side by side, ``--jobs`` at a time, each in a process of its own; work directories, logs and metrics stay under
``--out``. A run whose metrics are there already is not repeated, one that was interrupted goes on. The mean validation
metrics after so many iterations are written to curves.csv and drawn in curves.png.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mambavision.engine import cli
from mambavision.engine.files import atomic_path

TOOLS = Path(__file__).resolve().parent

Points = dict[tuple[str, str], dict[int, list[float]]]
"""Values of the seeds at each iteration, by config and metric."""


def call(log: Path, *command: object) -> None:
    with log.open("a") as f:
        code = subprocess.run([sys.executable, *map(str, command)], stdout=f, stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"a run failed with exit code {code}: see {log}")


def folder_of(config: str, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.out) / f"{Path(config).stem}_seed{seed}"


def check_options(config: str, seed: int, args: argparse.Namespace) -> None:
    """Write down the options of a run; those of one that has begun must be the same."""
    folder = folder_of(config, seed, args)
    said = {
        "config": str(Path(config).resolve()),
        "data_root": args.data_root,
        "amp": args.amp,
        "cfg_options": args.cfg_options,
    }
    path, begun = folder / "options.json", any(folder.glob("*.pth")) or (folder / "test.json").exists()
    if begun and path.exists() and (before := json.loads(path.read_text())) != said:
        name = next(name for name in said if before.get(name) != said[name])
        raise ValueError(f"{folder} holds a run of {name} {before.get(name)}, not {said[name]}: name another --out")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(said, indent=1) + "\n")


def run(config: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Test metrics of one config and seed."""
    folder = folder_of(config, seed, args)
    metrics = folder / "test.json"
    if not metrics.exists():
        shared = [*(["--data-root", args.data_root] if args.data_root else [])]
        changes = ["--cfg-options", *args.cfg_options] if args.cfg_options else []
        amp = ["--amp", args.amp] if args.amp else []
        train = [TOOLS / "train.py", config, "--work-dir", folder, "--seed", seed, "--resume", *amp, *shared, *changes]
        call(folder / "train.out", *train)
        best = sorted(folder.glob("best_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
        if not best:
            raise ValueError(f"{folder} holds no best checkpoint: the config needs save_best and a validation set")
        test = [TOOLS / "test.py", config, best[-1], "--work-dir", folder / "test", "--out", metrics, *shared, *changes]
        call(folder / "test.out", *test)
    return json.loads(metrics.read_text())


def read_curves(jobs: list[tuple[str, int]], args: argparse.Namespace) -> Points:
    """Validation metrics of all runs that left a loss_curve.csv."""
    points: Points = defaultdict(lambda: defaultdict(list))
    for config, seed in jobs:
        path = folder_of(config, seed, args) / "loss_curve.csv"
        if not path.exists():
            continue
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and "/" in name:  # a metric of a set; losses and rates have no slash
                        points[Path(config).stem, name][int(float(row["iter"]))].append(float(value))
    return points


def write_curves(points: Points, folder: Path) -> None:
    """Write curves.csv and, for the first metric, curves.png with the spread of the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with atomic_path(folder / "curves.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["config", "metric", "iter", "mean", "min", "max", "seeds"])
        for (config, metric), values in points.items():
            for i, seeds in sorted(values.items()):
                writer.writerow([config, metric, i, statistics.mean(seeds), min(seeds), max(seeds), len(seeds)])
    first = next(iter(points))[1]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (config, metric), values in points.items():
        if metric == first:
            iters = sorted(values)
            (line,) = axis.plot(iters, [statistics.mean(values[i]) for i in iters], marker=".", label=config)
            low, high = ([pick(values[i]) for i in iters] for pick in (min, max))
            axis.fill_between(iters, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="iteration", ylabel=f"{first} on the validation set")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    with atomic_path(folder / "curves.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")


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
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="passed to train.py and test.py")
    args = parser.parse_args()
    named: dict[str, str] = {}
    for config in args.configs:
        if not Path(config).is_file():
            raise FileNotFoundError(f"{config}: no such config")
        other = named.setdefault(Path(config).stem, config)
        if other != config:
            raise ValueError(f"{other} and {config} have one name, by which runs are told apart: rename one")
    jobs = [(config, seed) for config in args.configs for seed in args.seeds]
    for config, seed in jobs:
        check_options(config, seed, args)
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
    points = read_curves(jobs, args)
    if points:
        write_curves(points, Path(args.out))


if __name__ == "__main__":
    cli.run(main)
