"""The kernels in CUDA C++ on the CPU: the scan's sources and host code through the emulator against the fp64 reference."""

import pytest

from tests.kernels.test_backends import COVERING, EXTREME, check


@pytest.mark.parametrize("case", COVERING + EXTREME, ids=str)
def test_the_scan_on_cpu(case, emulator):
    check(case, "cuda")
