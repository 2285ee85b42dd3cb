"""Photos as tensors, and the photo sets that a user has gathered."""

import os
from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor

from mambavision.restoration.resize import imresize

REPOSITORY = Path(__file__).resolve().parents[2]


def fetched(folder: str) -> Path:
    """A folder of tools/prepare_restoration_data.py; skips the test where it is not there."""
    path = Path(os.environ.get("RESTORATION_DATA", REPOSITORY / "data" / "restoration"), folder)
    if not path.is_dir():
        pytest.skip(
            f"{path} is not here: tools/prepare_restoration_data.py makes it, RESTORATION_DATA may name another"
        )
    return path


def bytes_of(path: Path) -> Tensor:
    """uint8 (3, H, W), BGR."""
    return torch.from_numpy(cv2.imread(str(path))).permute(2, 0, 1)


@pytest.fixture
def set5(shared_dir: Path) -> list[Path]:
    """The five photos of Set5."""
    return sorted((shared_dir / "data" / "set5" / "HR").glob("*.png"))


@pytest.fixture
def photo() -> Tensor:
    """A picture of structures of all sizes, float (1, 3, 344, 228) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = (torch.rand(1, 3, 43 * n, 29 * n, generator=generator) / n for n in (1, 2, 4, 8))
    picture = sum(imresize(layer, size=(344, 228)) for layer in coarse)
    return (picture - picture.min()) / (picture.max() - picture.min())
