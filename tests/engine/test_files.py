from pathlib import Path

import pytest

from mambavision.engine import files
from mambavision.engine.files import atomic_path, check_file, shipped_weights


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_path(target) as temporary:
        temporary.write_text("ha")
        raise OSError("disk full")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == tmp_path
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_file_in_a_new_folder_is_checked_first_and_then_made(tmp_path):
    target = tmp_path / "new" / "deep" / "a.json"
    check_file(target, "--out")
    assert not list(tmp_path.iterdir())
    with atomic_path(target) as temporary:
        temporary.write_text("{}")
    assert target.read_text() == "{}"
    with pytest.raises(IsADirectoryError, match="--out .*deep: this is a folder, a file is wanted"):
        check_file(target.parent, "--out")
    with pytest.raises(NotADirectoryError, match="--out .*a.json is a file, a folder is wanted"):
        check_file(target / "b", "--out")


def test_weights_are_beside_the_package_or_where_the_process_started(tmp_path, monkeypatch):
    assert shipped_weights().parent == Path(files.__file__).resolve().parents[2]
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "mambavision" / "engine" / "files.py"))
    monkeypatch.chdir(tmp_path)
    assert shipped_weights() == tmp_path.resolve() / "weights"
    (tmp_path / "site-packages" / "weights").mkdir(parents=True)
    assert shipped_weights() == tmp_path.resolve() / "site-packages" / "weights"


def test_the_longest_name_is_written(tmp_path):
    target = tmp_path / ("é" * 125 + ".png")  # 254 of the 255 bytes of a name
    with atomic_path(target) as temporary:
        temporary.write_text("a")
    assert target.read_text() == "a"
