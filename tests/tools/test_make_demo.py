import mambavision.detection  # noqa: F401  makes mmdet importable

# isort: split
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mambavision.detection.datasets import CocoDetDataset

ROOT = Path(__file__).resolve().parents[2]


def test_shipped_demo_is_what_the_tool_draws(tmp_path):
    command = [sys.executable, ROOT / "tools" / "make_demo.py", tmp_path, "--train", "2", "--val", "1"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for split, count in (("train", 2), ("val", 1)):
        drawn, shipped = (
            json.loads((folder / f"{split}.json").read_text()) for folder in (tmp_path, ROOT / "demo/cells")
        )
        assert len(drawn["images"]) == count and drawn["categories"] == shipped["categories"]
        assert drawn["annotations"] == [a for a in shipped["annotations"] if a["image_id"] < count]


def test_shipped_demo_loads():
    for split, count in (("train", 24), ("val", 8)):
        data = CocoDetDataset(
            ann_file=ROOT / f"demo/cells/{split}.json", data_prefix={"img": str(ROOT / "demo/cells" / split)}
        )
        assert len(data) == count and not data.skipped
        assert data.metainfo["classes"] == ("Platelets", "RBC", "WBC")
        photos = [data.photo(i) for i in range(count)]
        assert set(np.concatenate([photo.labels for photo in photos])) == {0, 1, 2}
        # red cells are darker in green than the ground
        photo = photos[0]
        x1, y1, x2, y2 = photo.boxes[photo.labels == 1][0].astype(int)
        assert photo.img[y1:y2, x1:x2, 1].mean() < np.median(photo.img[..., 1]) - 15
