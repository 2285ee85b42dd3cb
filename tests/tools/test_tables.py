import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tools.running import ENVIRONMENT, ROOT

FOLDERS = [path.parent for path in ROOT.glob("configs/*/metafile.yml") if "Table:" in path.read_text()]


def tables(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/tables.py", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_readme_is_in_step_with_the_metafile(folder):
    done = tables(folder, "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_a_metafile_names_is_there(folder):
    for model in yaml.safe_load((folder / "metafile.yml").read_text())["Models"]:
        assert (ROOT / model["Config"]).is_file() and Path(model["Config"]).stem == model["Name"]
        assert not model["Weights"] or (ROOT / model["Weights"]).is_file()
        measured = [value for value in model["Metrics"].values() if value is not None]
        assert not measured or (model["Source"] and model["Hardware"] and model["Seeds"]), model["Name"]


def test_tables_are_written_and_missing_ones_named(tmp_path):
    model = dict(Name="a", Table="noise", Metrics={"Set12": 30.5, "BSD68": None}, Parameters=870_000, Source="here")
    (tmp_path / "metafile.yml").write_text(yaml.safe_dump({"Models": [model]}, sort_keys=False))
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- tables: noise -->\nold\n<!-- end -->\nafter\n")
    assert "is not in step with metafile.yml: run python tools/tables.py" in tables(tmp_path, "--check").stderr
    assert tables(tmp_path).returncode == 0 and tables(tmp_path, "--check").returncode == 0
    text = readme.read_text()
    assert "| a | 0.87 | 30.5 | — | — | here |\n<!-- end -->\nafter" in text and "old" not in text
    readme.write_text("# A\n")
    done = tables(tmp_path)
    assert done.returncode == 2 and "tables for nothing, metafile.yml models of noise" in done.stderr
