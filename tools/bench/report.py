"""Lines of a run as CSV and as Markdown: all figures, and the tables of kernels/README.md with what was aimed at."""

import csv
from collections.abc import Iterable
from typing import NamedTuple, get_args, get_type_hints

Cell = str | float | int | None
CALLS = ("forward", "backward")


class Line(NamedTuple):
    """One figure: ``call`` forward or backward (or a part of a first call), ``mode`` eager or graph.

    ``vs_``: the peer's time over this one. ``memory_mb``: of a forward, or of forward and backward, beyond its inputs.
    ``launches``: kernels, copies and fills of a call.
    """

    date: str
    gpu_name: str
    torch: str
    triton: str
    copy_tb_s: float | None
    exp2_t_s: float | None
    op: str
    row: str
    shape: str
    dtype: str
    implementation: str
    call: str
    mode: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float | None = None
    over_floor: float | None = None
    vs_reference: float | None = None
    vs_mamba_ssm: float | None = None
    vs_sdpa: float | None = None
    memory_mb: float | None = None
    launches: int | None = None


def write(path: str, lines: Iterable[Line]) -> None:
    with open(path, "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(Line._fields)
        for line in lines:
            table.writerow("" if v is None else f"{v:.9g}" if isinstance(v, float) else v for v in line)


def read(path: str) -> list[Line]:
    """Raises ValueError for a file that :func:`write` did not write, OSError for none."""
    with open(path, newline="") as f:
        table = csv.DictReader(f)
        if tuple(table.fieldnames or ()) != Line._fields:
            raise ValueError(f"{path} is no CSV of tools/benchmark.py: its first line is not {','.join(Line._fields)}")
        return [Line(**{name: _value(name, text) for name, text in row.items()}) for row in table]


def _value(name: str, text: str) -> Cell:
    kinds = get_args(get_type_hints(Line)[name]) or (get_type_hints(Line)[name],)
    return None if text == "" and type(None) in kinds else kinds[0](text)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def number(value: float | None, digits: str = ".3f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{digits}}{unit}"


class Figures:
    """Lines by row, implementation, call and mode."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)
        self._by_key = {(v.row, v.implementation, v.call, v.mode): v for v in self.lines if v.op != "first call"}

    def get(self, field: str, row: str, implementation: str, call: str, mode: str = "eager") -> float | None:
        line = self._by_key.get((row, implementation, call, mode))
        return None if line is None else getattr(line, field)

    def rows(self, *ops: str) -> dict[str, Line]:
        """The first line of each row of some operators."""
        found: dict[str, Line] = {}
        for line in self.lines:
            if line.op in ops:
                found.setdefault(line.row, line)
        return found

    def implementations(self, row: str) -> list[str]:
        return list(dict.fromkeys(v.implementation for v in self.lines if v.row == row and v.op != "first call"))


def host(figures: Figures) -> str:
    line = figures.lines[0]
    text = f"{line.gpu_name}, torch {line.torch}, triton {line.triton or '-'}, {line.date}; medians, milliseconds"
    if line.copy_tb_s:
        text += f"; copy {line.copy_tb_s:.2f} TB/s, exp2 {line.exp2_t_s:.2f}e12/s"
    return text


def cpu_table(figures: Figures) -> str:
    """The table of README.md."""
    rows = []
    for row, line in figures.rows("selective_scan", "multi_scan", "ssd").items():
        for name in figures.implementations(row):
            cells = [number(figures.get("median_ms", row, name, call)) for call in CALLS]
            cells += [number(figures.get("vs_reference", row, name, c), ".1f", "x") for c in CALLS]
            rows.append([line.shape, name, *cells])
    header = ["shape", "implementation", "forward ms", "backward ms", "fwd vs reference", "bwd vs reference"]
    return markdown(header, rows)


FIELDS = {  # of a call in gpu_table: heading, field, mode, digits
    "eager": ("median_ms", "eager", ".3f"),
    "graph": ("median_ms", "graph", ".3f"),
    "x floor": ("over_floor", "graph", ".1f"),
    "vs mamba_ssm": ("vs_mamba_ssm", "eager", ".2f"),
    "in graphs": ("vs_mamba_ssm", "graph", ".2f"),
    "vs SDPA": ("vs_sdpa", "eager", ".2f"),
    "MB": ("memory_mb", "eager", ".0f"),
    "launches": ("launches", "eager", "d"),
}


def gpu_table(figures: Figures, call: str) -> str:
    """Every figure of one call, forward or backward."""
    rows = []
    for row, line in figures.rows("multi_scan", "selective_scan", "ssd").items():
        for name in figures.implementations(row):
            cells = [number(figures.get(f, row, name, call, mode), digits) for f, mode, digits in FIELDS.values()]
            rows.append([row, line.shape, name, number(figures.get("floor_ms", row, name, call)), *cells])
    eager, *rest = FIELDS
    return markdown(["row", "shape", "implementation", "floor", f"{call}, {eager}", *rest], rows)


def first_calls(figures: Figures) -> dict[str, dict[str, float]]:
    """Seconds of each part of an operator's first call."""
    found: dict[str, dict[str, float]] = {}
    for line in figures.lines:
        if line.op == "first call":
            found.setdefault(line.row, {})[line.call] = line.median_ms / 1e3
    return found


def everything(figures: Figures) -> str:
    if not any(line.copy_tb_s for line in figures.lines):
        return cpu_table(figures)
    tables = [gpu_table(figures, call) for call in CALLS]
    for op, seconds in first_calls(figures).items():
        tables.append(f"first call of {op}: " + ", ".join(f"{part} {s:.2f} s" for part, s in seconds.items()))
    return "\n\n".join(tables)
