import hashlib
import json
import runpy
from pathlib import Path

import pytest
import yaml

from tests.tools.running import ROOT, refusal

pytestmark = pytest.mark.usefixtures("in_the_repository")

ALL = [path.parent for path in ROOT.glob("configs/*/metafile.yml")]
FOLDERS = [folder for folder in ALL if "Table:" in (folder / "metafile.yml").read_text()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_readme_is_in_step_with_the_metafile(folder, tool):
    code, _, err = tool("tables", folder, "--check")
    assert code == 0, err


@pytest.mark.parametrize("folder", ALL, ids=lambda folder: folder.name)
def test_what_a_metafile_names_is_there(folder):
    for model in yaml.safe_load((folder / "metafile.yml").read_text())["Models"]:
        if (model.get("Source") or "").startswith("published"):
            assert None not in model["Metrics"].values() and not model["Weights"] and "Config" not in model
            continue
        assert (ROOT / model["Config"]).is_file() and Path(model["Config"]).stem == model["Name"]
        if model["Weights"]:
            digest = hashlib.sha256((ROOT / model["Weights"]).read_bytes()).hexdigest()
            assert digest == model["Weights sha256"], model["Name"]
        measured = [value for value in model["Metrics"].values() if value is not None]
        assert not measured or (model["Source"] and model["Hardware"] and model["Seeds"]), model["Name"]


def test_tables_are_written_and_missing_ones_named(tmp_path, tool):
    model = dict(Name="a", Table="noise", Metrics={"Set12": 30.5, "BSD68": None}, Parameters=870_000, Source="here")
    (tmp_path / "metafile.yml").write_text(yaml.safe_dump({"Models": [model]}, sort_keys=False))
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- tables: noise -->\nold\n<!-- end -->\nafter\n")
    assert "is not in step with metafile.yml: run python tools/tables.py" in refusal(
        tool("tables", tmp_path, "--check")
    )
    assert tool("tables", tmp_path)[0] == 0 and tool("tables", tmp_path, "--check")[0] == 0
    text = readme.read_text()
    assert "| a | 0.87 | 30.50 | — | — | here |\n<!-- end -->\nafter" in text and "old" not in text
    readme.write_text("# A\n")
    assert "tables for nothing, metafile.yml models of noise" in refusal(tool("tables", tmp_path))


def test_a_column_has_as_many_places_throughout():
    models = [
        {"Name": name, "Metrics": metrics}
        for name, metrics in (("a", {"loss": 0.153, "steps": 9}), ("b", {"loss": 0.1526}), ("c", {"loss": 31.456}))
    ]
    rows = runpy.run_path(str(ROOT / "tools/tables.py"))["table"](models, ROOT).splitlines()[2:]
    assert [row.split(" | ")[2:4] for row in rows] == [["0.1530", "9"], ["0.1526", "—"], ["31.46", "—"]]


def test_models_without_results_are_named_below():
    table = runpy.run_path(str(ROOT / "tools/tables.py"))["table"]
    bare = [dict(Name="b", Config="configs/b.py", Metrics={"x": None}, Weights=None), dict(Name="c", Metrics=None)]
    below = "Without results yet: [b](b.py), c.\n"
    assert table(bare, Path("configs")) == below
    shown = [dict(Name="a", Metrics={"y": 1}), dict(Name="d", Metrics={"x": None}, Weights="w.pt")]
    first = [row.split(" | ")[0] for row in table([*bare, *shown], Path("configs")).splitlines()]
    assert first[0] == "| model" and first[2:] == ["| a", "| d", "", below.strip()]


def test_a_model_without_a_table_is_named(tmp_path, tool):
    (tmp_path / "metafile.yml").write_text("Models:\n  - Name: one\n    Metrics: {AP: 0.5}\n")
    (tmp_path / "README.md").write_text("# No tables\n")
    assert "metafile.yml names no Table for one" in refusal(tool("tables", tmp_path))


def test_a_folder_without_a_metafile_is_one_line(tmp_path, tool):
    (tmp_path / "README.md").write_text("# A\n")
    assert f"no {tmp_path}/metafile.yml: name a folder" in refusal(tool("tables", tmp_path))


META = """# a comment
Models:
  - Name: a
    Table: noise
    Parameters: 870000
    Metrics: {Set12 15: 32.50, Set12 25: null, CBSD68: null, LIVE1 colour q10: null}
    Source: null
    Hardware: null
    Seeds: null
    Weights: null
    Weights sha256: null
  - Name: a_b
    Table: noise
    Parameters: 870000
    Metrics: {Set12 15: null}
"""


def test_measures_are_recorded(tmp_path, tool):
    (tmp_path / "metafile.yml").write_text(META)
    (tmp_path / "README.md").write_text("<!-- tables: noise -->\n<!-- end -->\n")
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    found = {"set12_s25/PSNR": 30.456, "set12_s25/SSIM": 0.9, "cbsd68/PSNR": 31.4, "live1_q10/PSNR": 27.5}
    (tmp_path / "test.json").write_text(json.dumps(found))
    record = ["--record", "a", tmp_path / "test.json", "--hardware", "one H100, 9 min", "--seeds", "seed 0"]
    code, _, err = tool("tables", tmp_path, *record, "--weights", tmp_path / "w.safetensors")
    assert code == 0, err
    text = (tmp_path / "metafile.yml").read_text()
    before, after = META.partition("  - Name: a_b")[::2]
    assert text.startswith("# a comment") and text.endswith(after) and before not in text
    model = yaml.safe_load(text)["Models"][0]
    assert model["Metrics"] == {"Set12 15": 32.5, "Set12 25": 30.46, "CBSD68": 31.4, "LIVE1 colour q10": 27.5}
    assert model["Hardware"] == "one H100, 9 min" and model["Weights sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert "| a | 0.87 | 32.50 | 30.46 | 31.40 | 27.50 | [w](" in (tmp_path / "README.md").read_text()

    assert "--record needs --hardware and --seeds" in refusal(tool("tables", tmp_path, *record[:3]))


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("a", {"set14/PSNR": 28.0}, "a has 0 metrics for set14, one is wanted: Set12 15"),
        ("a", {"set12/PSNR": 28.0}, "a has 0 metrics for set12"),
        ("b", {}, "the metafile has no model b"),
        ("a_b", {}, "a_b has no Source in the metafile"),
    ],
)
def test_measures_without_a_place_are_refused(name, found, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(ROOT / "tools/tables.py"))["recorded"](META, name, found, {"Source": "here"})
