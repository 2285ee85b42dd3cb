"""The tables of kernels/README.md: figures beside what was to be reached on one H100."""

from collections.abc import Callable
from typing import NamedTuple

from bench.report import CALLS, Figures, Line, first_calls, markdown, number
from bench.rows import ROWS

OURS = "default"
SCANS = ("multi_scan", "selective_scan")


class Goal(NamedTuple):
    """What a ratio must reach and what it aims at; a ``ceiling`` is not to be exceeded."""

    must: float
    aim: float
    ceiling: bool = False

    def reached(self, value: float) -> str:
        good = [goal for goal in self[:2] if (value <= goal if self.ceiling else value >= goal)]
        return ("no", "must", "aim")[len(good)]


def scan_goal(row: str, call: str) -> Goal:
    """Times as fast as mamba_ssm's scan."""
    if call == "backward":
        return Goal(2, 5)
    return Goal(1.5, 4 if ROWS["cuda"][row].B >= 8 else 2)


def floor_goal(row: str, call: str) -> Goal | None:
    """Multiples of the floor."""
    return Goal(2.5, 1.4, ceiling=True) if call == "forward" and ROWS["cuda"][row].B >= 8 else None


def ssd_goal(row: str, call: str) -> Goal:
    """Times as fast as two calls of mamba_ssm's."""
    return Goal(5, 12) if call == "forward" else Goal(6, 15)


def attention_goal(row: str, call: str) -> Goal | None:
    """Share of attention's time, by tokens."""
    goals = {
        "forward": {256: (1.4, 0.9), 1024: (0.7, 0.4), 4096: (0.2, 0.11), 16384: (0.06, 0.03)},
        "backward": {256: (2, 1.2), 1024: (1, 0.6), 4096: (0.4, 0.2), 16384: (0.15, 0.06)},
    }
    found = goals[call].get(ROWS["cuda"][row].L)
    return found and Goal(*found, ceiling=True)


FIRST_CALL = Goal(5, 1.5, ceiling=True)  # seconds


def _judged(value: float | None, goal: Goal | None) -> list[str]:
    if value is None or goal is None:
        return [number(value, ".3g"), "", ""]
    return [number(value, ".3g"), f"{goal.must:g} / {goal.aim:g}", goal.reached(value)]


def _label(line: Line) -> str:
    return f"ssd {line.shape}" if line.op == "ssd" else f"{line.row}: {line.shape}"


def against(
    figures: Figures, ops: tuple[str, ...], peer: str, goal: Callable[[str, str], Goal | None], mode: str = "eager"
) -> str:
    """Ours and a peer, forward and backward, and how many times as fast ours is, or its share of attention's time."""
    share = peer == "SDPA"
    rows = []
    for row, line in figures.rows(*ops).items():
        cells = [_label(line)]
        for call in CALLS:
            ours, theirs = (figures.get("median_ms", row, name, call, mode) for name in (OURS, peer))
            ratio = None if ours is None or theirs is None else ours / theirs if share else theirs / ours
            cells += [number(ours), number(theirs), *_judged(ratio, goal(row, call))]
        rows.append(cells)
    header = ["in a CUDA graph" if mode == "graph" else "shape"]
    for call in CALLS:
        header += [call, peer, f"of {peer}" if share else "ratio", "must / aim", "reached"]
    return markdown(header, rows)


def floors(figures: Figures) -> str:
    """Times and multiples of the floor."""
    rows = []
    for row, line in figures.rows(*SCANS, "ssd").items():
        cells = [_label(line)]
        for call in CALLS:
            goal = floor_goal(row, call) if line.op == "multi_scan" else None
            cells += [number(figures.get(field, row, OURS, call)) for field in ("floor_ms", "median_ms")]
            cells += _judged(figures.get("over_floor", row, OURS, call), goal)
        rows.append(cells[:-2])  # no goal for backward
    header = ["shape", "floor", "forward", "over it", "must / aim", "reached", "floor", "backward", "over it"]
    return markdown(header, rows)


def costs(figures: Figures) -> str:
    """Memory beyond the inputs, of a forward and of forward and backward, and launches, ours and mamba_ssm's."""
    rows = []
    for row, line in figures.rows(*SCANS, "ssd").items():
        cells = [_label(line)]
        for field, digits in (("memory_mb", ".0f"), ("launches", "d")):
            for name in (OURS, "mamba_ssm"):
                cells.append(" / ".join(number(figures.get(field, row, name, call), digits) for call in CALLS))
        rows.append(cells)
    return markdown(["shape", "MB", "mamba_ssm", "launches", "mamba_ssm"], rows)


def cold(figures: Figures) -> str:
    rows = []
    for op, seconds in first_calls(figures).items():
        rows.append([op, *(f"{s:.2f}" for s in seconds.values()), *_judged(seconds["first"], FIRST_CALL)[1:]])
    return markdown(["first call, seconds", "import", "device", "first", "second", "must / aim", "reached"], rows)


def tables(figures: Figures) -> str:
    """All of them, one below the other."""
    parts = []
    for mode in ("eager", "graph"):
        parts.append(against(figures, SCANS, "mamba_ssm", scan_goal, mode))
        parts.append(against(figures, ("ssd",), "SDPA", attention_goal, mode))
        parts.append(against(figures, ("ssd",), "mamba_ssm", ssd_goal, mode))
        parts.append(against(figures, ("ssd",), "mamba_ssm with flips", lambda row, call: None, mode))
    parts += [floors(figures), costs(figures), cold(figures)]
    return "\n\n".join(part for part in parts if part.count("\n") > 1)
