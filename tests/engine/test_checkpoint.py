"""Checkpoints load without running code, and a damaged file is one clear error."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mambavision.engine.checkpoint import CheckpointError, UnsafeCheckpointError, allow_mmengine_globals, load


class Command:
    """Runs a shell command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class BorrowedGetattr:
    """Reaches for a module's globals through an allowed class, the way a HistoryBuffer reaches its methods."""

    def __reduce__(self):
        return getattr, (HistoryBuffer.mean, "__globals__")


def as_mmengine_saves() -> dict:
    history = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        history.update(value)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "message_hub": {"log_scalars": {"loss": history}, "runtime_info": {"best_score": np.float64(0.5)}},
        "meta": {"palette": np.arange(6, dtype=np.uint8).reshape(2, 3), "count": np.int64(7), "flag": np.bool_(True)},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_mmengine_content_loads(tmp_path, zipped: bool):
    saved = as_mmengine_saves()
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    loaded = load(tmp_path / "a.pth")
    assert torch.equal(loaded["state_dict"]["weight"], saved["state_dict"]["weight"])
    assert loaded["message_hub"]["log_scalars"]["loss"].mean() == 3.0
    assert loaded["message_hub"]["runtime_info"]["best_score"] == 0.5
    assert loaded["meta"]["palette"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["meta"]["count"] == 7 and loaded["meta"]["flag"]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, zipped: bool):
    witness = tmp_path / "it_ran"
    evil = {"state_dict": {"weight": torch.ones(2)}, "meta": Command(f"touch {witness}")}
    torch.save(evil, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match=r"evil\.pth: refused, .*system") as raised:
        load(tmp_path / "evil.pth")
    assert "\n" not in str(raised.value)
    assert not witness.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the file is a real attack
    assert witness.exists()


def test_code_is_refused_by_mmengine_s_loader_too(tmp_path):
    from mmengine.runner.checkpoint import _load_checkpoint

    allow_mmengine_globals()
    torch.save(Command(f"touch {tmp_path}/it_ran"), tmp_path / "evil.pth")
    with pytest.raises(UnsafeCheckpointError):
        _load_checkpoint(str(tmp_path / "evil.pth"), map_location="cpu")
    assert not (tmp_path / "it_ran").exists()


def test_allowed_classes_do_not_open_a_way_to_code(tmp_path):
    torch.save(BorrowedGetattr(), tmp_path / "evil.pth")
    with pytest.raises(UnsafeCheckpointError, match="getattr"):
        load(tmp_path / "evil.pth")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint not found: .*none\.pth"):
        load(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_at_any_length(tmp_path, zipped: bool):
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save(as_mmengine_saves(), whole, _use_new_zipfile_serialization=zipped)
    content, rng = whole.read_bytes(), random.Random(0)
    message = "not a whole checkpoint" if zipped else "not a whole checkpoint|refused"  # a class name may be cut
    for length in [0, 1, len(content) - 1, *(rng.randrange(len(content)) for _ in range(60))]:
        part.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=rf"part\.pth: ({message})"):
            load(part)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"<html>404</html>", b"\0" * 500, pickle.dumps([1, 2]), pickle.dumps({"a": 1}, 2)])
def test_other_formats(tmp_path, content: bytes):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="another format"):
        load(tmp_path / "a.pth")
