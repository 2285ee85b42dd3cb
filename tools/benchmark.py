"""Time the operators of every backend against their peers and their floors, in one run and in turn.

    python tools/benchmark.py ops                               # on a CPU: the table of README.md
    python tools/benchmark.py ops --device cuda --csv ops.csv   # on a GPU, against mamba_ssm (if installed) and SDPA
    python tools/benchmark.py ops --device cuda --rows yolo-p5 ssd-64x256 --only default mamba_ssm SDPA
    python tools/benchmark.py tables ops.csv                    # the tables of kernels/README.md from that CSV

An implementation whose result or a gradient does not match the float64 reference is not timed, which is said.
"""

import argparse
import pathlib
import sys

import torch
from bench import goals, ops, report, roofs
from bench.rows import FIRST_CALLS, ROWS

from mambavision.ops import describe_backends

FIRST = "first-call"
BUDGET_S = {"cpu": 2.0, "cuda": 0.12}


def time_ops(args: argparse.Namespace) -> None:
    """Time rows; figures go to stderr as they come, tables to stdout at the end."""
    if args.csv and not pathlib.Path(args.csv).parent.is_dir():
        raise ValueError(f"no folder to write {args.csv} to")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU that torch can use")
    if args.device == "cuda" and not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        raise ValueError(f"--device cuda needs torch 2.8 or later, this is {torch.__version__}")
    rows = ROWS[args.device]
    every = [*rows, FIRST] if args.device == "cuda" else [*rows]
    if unknown := [name for name in args.rows or () if name not in every]:
        raise ValueError(f"no row {', '.join(unknown)} on {args.device}: choose from {', '.join(every)}")
    if args.threads < 1 or not (args.budget is None or args.budget > 0):
        raise ValueError("--threads and --budget must be positive")
    torch.set_num_threads(args.threads)
    on_cpu = args.device == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "bfloat16"))
    budget_s = args.budget or BUDGET_S[args.device]
    print(describe_backends(), flush=True)
    host = ops.Host(args.device, dtype, budget_s, None if on_cpu else roofs.measure(budget_s))
    lines, names = [], args.rows or every
    first_calls = list(FIRST_CALLS) if FIRST in names else []
    only = set(args.only) if args.only else None
    for more in ops.run({name: rows[name] for name in names if name != FIRST}, first_calls, host, only):
        lines += more
        if args.csv:
            report.write(args.csv, lines)
    if not lines:
        raise RuntimeError("nothing was timed")
    figures = report.Figures(lines)
    print(f"\n{report.host(figures)}, {str(dtype).removeprefix('torch.')}\n\n{report.everything(figures)}")


def print_tables(args: argparse.Namespace) -> None:
    """Print the tables of kernels/README.md."""
    if args.roofs and min(args.roofs) <= 0:
        raise ValueError("--roofs must be positive")
    if not pathlib.Path(args.csv).is_file():
        raise FileNotFoundError(f"{args.csv}: no such file; benchmark.py ops --csv {args.csv} makes one")
    lines = report.read(args.csv)
    if not lines or lines[0].copy_tb_s is None:
        raise ValueError(f"{args.csv} holds no figures of a GPU")
    if args.roofs:
        lines = goals.with_roofs(lines, roofs.Roofs(*(1e12 * v for v in args.roofs)))
    figures = report.Figures(lines)
    print(f"{report.host(figures)}\n\n{goals.tables(figures)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    timing = commands.add_parser("ops", help="time scans and state-space duality")
    timing.set_defaults(run=time_ops)
    timing.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    timing.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, bfloat16 on CUDA")
    timing.add_argument("--rows", nargs="+", metavar="ROW", help="some of the device's rows")
    timing.add_argument("--only", nargs="+", metavar="NAME", help="some implementations: default, mamba_ssm, SDPA")
    timing.add_argument("--threads", type=int, default=2, help="CPU threads")
    timing.add_argument("--budget", type=float, help=f"seconds per figure, default {BUDGET_S}")
    timing.add_argument("--csv", help="also write the figures to this file")
    tables = commands.add_parser("tables", help="print the tables of kernels/README.md from a CSV of ops")
    tables.set_defaults(run=print_tables)
    tables.add_argument("csv")
    roof = "floors by other roofs than the run's own: a copy's TB/s, 10^12 exp2/s"
    tables.add_argument("--roofs", nargs=2, type=float, metavar=("COPY", "EXP2"), help=roof)
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
