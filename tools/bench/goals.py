"""The tables of kernels/README.md: figures beside what was to be reached on one H100."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.report import CALLS, Figures, Line, first_calls, markdown, number
from bench.roofs import Roofs
from bench.rows import ROWS

OURS = "default"
SCANS = ("multi_scan", "selective_scan")


class Goal(NamedTuple):
    """What a ratio must reach and what it aims at; a ``ceiling`` is not to be exceeded."""

    must: float
    aim: float
    ceiling: bool = False

    def mark(self, value: float, text: str) -> str:
        """The text of a value: bold where the must is missed, with a star where the aim is reached."""
        must, aim = (value <= goal if self.ceiling else value >= goal for goal in self[:2])
        return f"{text} *" if aim else text if must else f"**{text}**"


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


class Peer(NamedTuple):
    """Whom ours is compared with; ``share``: by our part of its time, not by how many times as fast ours is."""

    name: str
    goal: Callable[[str, str], Goal | None] | None = None
    share: bool = False


PEERS = {
    SCANS: (Peer("mamba_ssm", scan_goal),),
    ("ssd",): (
        Peer("SDPA", attention_goal, share=True),
        Peer("mamba_ssm", ssd_goal),
        Peer("mamba_ssm with flips"),
    ),
}


def with_roofs(lines: list[Line], roofs: Roofs) -> list[Line]:
    """The same lines with the floors of other roofs than those of their run."""
    found = []
    for line in lines:
        if line.floor_ms is not None:
            work = ROWS["cuda"][line.row].work(getattr(torch, line.dtype).itemsize)
            floor = roofs.floor_ms(*work[line.call])
            line = line._replace(floor_ms=floor, over_floor=line.median_ms / floor)
        found.append(line._replace(copy_tb_s=roofs.bandwidth / 1e12, exp2_t_s=roofs.exp2_rate / 1e12))
    return found


def _rows(figures: Figures, *ops: str) -> dict[str, Line]:
    """The first line of each row of some operators, in the order of ROWS."""
    found = figures.rows(*ops)
    return {row: found[row] for row in ROWS["cuda"] if row in found}


def _marked(value: float | None, goal: Goal | None, digits: str = ".3g") -> str:
    text = number(value, digits)
    return text if value is None or goal is None else goal.mark(value, text)


def _label(line: Line) -> str:
    return f"ssd {line.shape}" if line.op == "ssd" else f"{line.row}: {line.shape}"


def against(figures: Figures, ops: tuple[str, ...], call: str, mode: str) -> str:
    """Milliseconds of ours, of its peers with their ratio, and of the floor with how many times as long ours takes."""
    rows = []
    for row, line in _rows(figures, *ops).items():
        ours = figures.get("median_ms", row, OURS, call, mode)
        if ours is None:
            continue
        cells = [_label(line), number(ours)]
        for peer in PEERS[ops]:
            theirs = figures.get("median_ms", row, peer.name, call, mode)
            ratio = None if theirs is None else ours / theirs if peer.share else theirs / ours
            cells += [number(theirs), _marked(ratio, peer.goal and peer.goal(row, call))]
        goal = floor_goal(row, call) if line.op == "multi_scan" else None
        over = _marked(figures.get("over_floor", row, OURS, call, mode), goal)
        rows.append([*cells, number(figures.get("floor_ms", row, OURS, call, mode)), over])
    header = ["shape", f"{call}{', in a CUDA graph' * (mode == 'graph')}"]
    for peer in PEERS[ops]:
        header += [peer.name, "part of it" if peer.share else "times as fast"]
    return markdown([*header, "floor", "over it"], rows)


def costs(figures: Figures) -> str:
    """Memory beyond the inputs, of a forward and of forward and backward, and launches, ours and mamba_ssm's."""
    rows = []
    for row, line in _rows(figures, *SCANS, "ssd").items():
        cells = [_label(line).partition(":")[0]]
        for field, digits in (("memory_mb", ".0f"), ("launches", "d")):
            for name in (OURS, "mamba_ssm"):
                cells.append(" / ".join(number(figures.get(field, row, name, call), digits) for call in CALLS))
        rows.append(cells)
    return markdown(["shape", "MB", "mamba_ssm", "launches", "mamba_ssm"], rows)


def cold(figures: Figures) -> str:
    """Seconds of the first call's parts."""
    rows = []
    for op, seconds in first_calls(figures).items():
        parts = {name: number(s, ".2f") for name, s in seconds.items()}
        rows.append([op, *(parts | {"first": _marked(seconds["first"], FIRST_CALL, ".2f")}).values()])
    return markdown(["first call, seconds", "import", "device", "first", "second"], rows)


def tables(figures: Figures) -> str:
    """All of them, one below the other; bold: the must is missed, star: the aim is reached."""
    parts = [against(figures, ops, call, mode) for ops in PEERS for mode in ("eager", "graph") for call in CALLS]
    return "\n\n".join(part for part in (*parts, costs(figures), cold(figures)) if part.count("\n") > 1)
