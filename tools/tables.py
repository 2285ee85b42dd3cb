#!/usr/bin/env python
"""Write the results tables of a config folder's README from its metafile.yml, or check that they are in step.

    python tools/tables.py configs/serpent            # writes
    python tools/tables.py configs/serpent --check    # exit code 2 if README.md is not what it would write
    python tools/tables.py configs/serpent --record serpent_s_sr_x2 test.json --hardware "one H100, 9 minutes" \\
        --seeds "seed 0" --weights weights/serpent_s_sr_x2.safetensors     # into metafile.yml first

--record takes the PSNR of each set from what tools/test.py --out wrote: set12_s25 is the metafile's "Set12 25", or its
"Set12" where there is no other level. A table stands between `<!-- tables: GROUP -->` and `<!-- end -->`, GROUP being
the models' `Table` in the metafile. Its columns are the metrics of these models; a number that is not there is a dash.
Models with neither metrics nor weights are named below it.
"""

import argparse
import hashlib
import json
import os
import re
from pathlib import Path

import yaml

from mambavision.engine.cli import run
from mambavision.engine.files import atomic_path

_TABLE = re.compile(r"(<!-- tables: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(models: list[dict], folder: Path) -> str:
    """Markdown rows of the models of a table: name, parameters, metrics, weights, and where it was measured.

    Below them, the names of models that have neither metrics nor weights.
    """
    bare = [model for model in models if not model.get("Weights") and set((model["Metrics"] or {}).values()) <= {None}]
    models = [model for model in models if model not in bare]
    lines = _rows(models, folder) if models else []
    if bare:
        names = ", ".join(_linked(model["Name"], model.get("Config"), folder) for model in bare)
        lines += [*([""] if lines else []), f"Without results yet: {names}."]
    return "\n".join(lines) + "\n"


def _rows(models: list[dict], folder: Path) -> list[str]:
    metrics = list(dict.fromkeys(name for model in models for name in model["Metrics"] or {}))
    measured = [model["Metrics"] for model in models if model["Metrics"]]
    places = {metric: max(_places(values.get(metric)) for values in measured) for metric in metrics}
    head = ["model", "params (M)", *metrics, "weights", "source"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model in models:
        weights = model.get("Weights")
        values = model["Metrics"] or {}
        cells = [
            _linked(model["Name"], model.get("Config"), folder),
            _number(model.get("Parameters"), 1e6, ".2f"),
            *(_metric(values.get(metric), places[metric]) for metric in metrics),
            _linked(Path(weights).stem, weights, folder) if weights else "—",
            ", ".join(str(model[key]) for key in ("Source", "Hardware", "Seeds") if model.get(key)) or "—",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _linked(name: str, path: str | None, folder: Path) -> str:
    return f"[{name}]({os.path.relpath(path, folder)})" if path else name


def _number(value: float | None, unit: float, form: str) -> str:
    return "—" if value is None else f"{value / unit:{form}}"


def _places(value: float | None) -> int:
    return len(str(value).partition(".")[2]) if isinstance(value, float) else 0


def _metric(value: float | None, places: int) -> str:
    """Decibels have two places, counts none, others as many as any in their column."""
    if not isinstance(value, float):
        return "—" if value is None else str(value)
    return f"{value:.{2 if value >= 10 else places}f}"


def recorded(text: str, name: str, found: dict[str, float], fields: dict[str, str]) -> str:
    """The metafile's text with a model's metrics, and other fields, set; comments and the other models stay.

    Args:
        text: The metafile.
        name: Of the model.
        found: Metrics by "set/metric", of which PSNR is taken.
        fields: Other fields of the model, which it has.

    Raises:
        ValueError: If there is no such model, it lacks a field, or has no metric for a set that was measured.
    """
    block = re.search(rf"  - Name: {re.escape(name)}\n(?:    .*\n)+", text)
    if not block:
        raise ValueError(f"the metafile has no model {name}")
    (model,) = yaml.safe_load(block[0])
    metrics = model["Metrics"]
    measured = {key.partition("/")[0]: value for key, value in found.items() if key.endswith("/PSNR")}
    for photos, value in measured.items():
        places = [metric for metric in metrics if _is_of(metric, photos)]
        if len(places) != 1:
            raise ValueError(f"{name} has {len(places)} metrics for {photos}, one is wanted: {', '.join(metrics)}")
        metrics[places[0]] = round(value, 2)
    shown = (f"{metric}: {'null' if value is None else f'{value:.2f}'}" for metric, value in metrics.items())
    new = block[0]
    for field, value in {"Metrics": f"{{{', '.join(shown)}}}", **fields}.items():
        new, count = re.subn(rf"^    {field}: .*$", lambda _, line=f"    {field}: {value}": line, new, flags=re.M)
        if count != 1:
            raise ValueError(f"{name} has no {field} in the metafile")
    return text.replace(block[0], new)


def _is_of(metric: str, photos: str) -> bool:
    """Whether "Set12", "Set12 25" or "LIVE1 colour q10" is of set12_s25, or live1_q10."""
    name, *level = (part for part in metric.lower().split() if part != "colour")
    measured, _, measured_level = photos.partition("_")
    return name == measured and (not level or level[0] == measured_level.removeprefix("s"))


def with_tables(text: str, models: list[dict], folder: Path) -> str:
    """The README's text with its tables written anew.

    Raises:
        ValueError: If a group has no table in the README, or a table no models, or a model no group.
    """
    loose = [model["Name"] for model in models if "Table" not in model]
    if loose:
        raise ValueError(f"{folder}/metafile.yml names no Table for {', '.join(loose)}")
    groups: dict[str, list[dict]] = {}
    for model in models:
        groups.setdefault(model["Table"], []).append(model)
    named = [match[2] for match in _TABLE.finditer(text)]
    if set(named) != set(groups):
        raise ValueError(
            f"{folder}/README.md has tables for {', '.join(named) or 'nothing'}, metafile.yml models of "
            f"{', '.join(groups) or 'nothing'}"
        )
    return _TABLE.sub(lambda match: match[1] + table(groups[match[2]], folder) + match[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder of metafile.yml and README.md, such as configs/serpent")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is not in step")
    parser.add_argument("--record", nargs=2, metavar=("MODEL", "JSON"), help="metrics to write into metafile.yml")
    parser.add_argument("--source", default="trained here", help="of the recorded model")
    parser.add_argument("--hardware", help="of the recorded model, and for how long")
    parser.add_argument("--seeds", help="of the recorded model, as in 'seed 0'")
    parser.add_argument("--weights", help="published file of the recorded model")
    args = parser.parse_args()
    folder = Path(args.folder)
    readme, metafile = folder / "README.md", folder / "metafile.yml"
    for file in (readme, metafile):
        if not file.is_file():
            raise FileNotFoundError(
                f"no {file}: name a folder that holds metafile.yml and README.md, as configs/serpent"
            )
    if args.record:
        if not args.hardware or not args.seeds:
            raise ValueError("--record needs --hardware and --seeds: no number without them")
        name, measured = args.record
        fields = {"Source": args.source, "Hardware": args.hardware, "Seeds": args.seeds}
        if args.weights:
            digest = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
            fields |= {"Weights": args.weights, "Weights sha256": digest}
        text = recorded(metafile.read_text(), name, json.loads(Path(measured).read_text()), fields)
        with atomic_path(metafile) as temporary:
            temporary.write_text(text)
    models = yaml.safe_load(metafile.read_text())["Models"]
    text = readme.read_text()
    wanted = with_tables(text, models, folder)
    if args.check and wanted != text:
        raise ValueError(f"{readme} is not in step with metafile.yml: run python tools/tables.py {folder}")
    if not args.check:
        with atomic_path(readme) as temporary:
            temporary.write_text(wanted)


if __name__ == "__main__":
    run(main)
