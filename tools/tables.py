#!/usr/bin/env python
"""Write the results tables of a config folder's README from its metafile.yml, or check that they are in step.

    python tools/tables.py configs/serpent            # writes
    python tools/tables.py configs/serpent --check    # exit code 2 if README.md is not what it would write

A table stands between `<!-- tables: GROUP -->` and `<!-- end -->`, GROUP being the models' `Table` in the metafile. Its
columns are the metrics of these models; a number that is not there is a dash.
"""

import argparse
import os
import re
from pathlib import Path

import yaml

from mambavision.engine.cli import run
from mambavision.engine.files import atomic_path

_TABLE = re.compile(r"(<!-- tables: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(models: list[dict], folder: Path) -> str:
    """Markdown rows of the models of a table: name, parameters, metrics, weights, and where it was measured."""
    metrics = list(dict.fromkeys(name for model in models for name in model["Metrics"] or {}))
    head = ["model", "params (M)", *metrics, "weights", "source"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model in models:
        name = model["Name"]
        config, weights = model.get("Config"), model.get("Weights")
        values = model["Metrics"] or {}
        cells = [
            f"[{name}]({os.path.relpath(config, folder)})" if config else name,
            _number(model.get("Parameters"), 1e6, ".2f"),
            *(str(values[metric]) if values.get(metric) is not None else "—" for metric in metrics),
            f"[{Path(weights).stem}]({os.path.relpath(weights, folder)})" if weights else "—",
            ", ".join(str(model[key]) for key in ("Source", "Hardware", "Seeds") if model.get(key)) or "—",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, unit: float, form: str) -> str:
    return "—" if value is None else f"{value / unit:{form}}"


def with_tables(text: str, models: list[dict], folder: Path) -> str:
    """The README's text with its tables written anew.

    Raises:
        ValueError: If a group has no table in the README, or a table no models.
    """
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
    args = parser.parse_args()
    folder = Path(args.folder)
    readme = folder / "README.md"
    models = yaml.safe_load((folder / "metafile.yml").read_text())["Models"]
    text = readme.read_text()
    wanted = with_tables(text, models, folder)
    if args.check and wanted != text:
        raise ValueError(f"{readme} is not in step with metafile.yml: run python tools/tables.py {folder}")
    if not args.check:
        with atomic_path(readme) as temporary:
            temporary.write_text(wanted)


if __name__ == "__main__":
    run(main)
