import pytest
from mmengine.registry import init_default_scope

import mambavision.detection  # noqa: F401  makes mmdet importable


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Whatever ran before: runs of other tasks leave their own scope."""
    init_default_scope("mmdet")
