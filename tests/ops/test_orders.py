from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from mambavision.ops import ScanOrder, scan_order

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
NAMES = get_args(ScanOrder)
IMAGE_NAMES = [name for name in NAMES if not name.startswith("time")]
VIDEO_NAMES = ["row", "row_reverse", "col", "col_reverse", "time", "time_reverse"]
GRIDS = [(1, 1), (1, 7), (7, 1), (5, 3), (8, 8), (7, 12)]


def coordinates(order, width):
    return torch.stack([order // width, order % width], dim=1)


def steps(order, width):
    """L1 distance between each token of a path and the next."""
    return coordinates(order, width).diff(dim=0).abs().sum(1)


def assert_bijection(order, length):
    assert order.dtype == torch.int64
    assert order.shape == (length,)
    assert torch.equal(order.sort().values, torch.arange(length))


def test_the_promised_names_are_there():
    serpentines = ("serpentine", "serpentine_col", "serpentine_mirror", "serpentine_col_mirror")
    for base in ("row", "col", *serpentines, "zigzag", "hilbert", "window", "time"):
        assert {base, f"{base}_reverse"} <= set(NAMES)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", IMAGE_NAMES)
def test_image_order_is_a_bijection(name, grid):
    assert_bijection(scan_order(name, grid), grid[0] * grid[1])


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 4, 5), (2, 1, 3), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_video_order_is_a_bijection(name, grid):
    if name not in VIDEO_NAMES:
        try:
            scan_order(name, grid)
        except ValueError as error:
            assert name in str(error)
            return
    assert_bijection(scan_order(name, grid), grid[0] * grid[1] * grid[2])


@pytest.mark.parametrize("grid", [*GRIDS, (3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_reverse")])
def test_reverse_name_is_the_exact_reverse(name, grid):
    try:
        forward = scan_order(name.removesuffix("_reverse"), grid)
    except ValueError:
        with pytest.raises(ValueError, match=name):
            scan_order(name, grid)
        return
    assert torch.equal(scan_order(name, grid), forward.flip(0))


@pytest.mark.parametrize(
    ("name", "grid", "expected"),
    [
        ("row", (2, 3), [0, 1, 2, 3, 4, 5]),
        ("row_reverse", (2, 3), [5, 4, 3, 2, 1, 0]),
        ("col", (2, 3), [0, 3, 1, 4, 2, 5]),
        ("col_reverse", (2, 3), [5, 2, 4, 1, 3, 0]),
        ("serpentine", (2, 3), [0, 1, 2, 5, 4, 3]),
        ("serpentine", (3, 2), [0, 1, 3, 2, 4, 5]),
        ("serpentine_reverse", (2, 3), [3, 4, 5, 2, 1, 0]),
        ("serpentine_col", (2, 3), [0, 3, 4, 1, 2, 5]),
        ("serpentine_col", (3, 2), [0, 2, 4, 5, 3, 1]),
        ("zigzag", (2, 3), [0, 1, 3, 4, 2, 5]),
        ("zigzag", (3, 3), [0, 1, 3, 6, 4, 2, 5, 7, 8]),
        ("zigzag", (4, 4), [0, 1, 4, 8, 5, 2, 3, 6, 9, 12, 13, 10, 7, 11, 14, 15]),
        ("row", (2, 2, 3), list(range(12))),
        ("col", (2, 2, 3), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]),
        ("time", (2, 2, 3), [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]),
        ("time_reverse", (2, 1, 2), [3, 1, 2, 0]),
    ],
)
def test_literal_examples(name, grid, expected):
    assert scan_order(name, grid).tolist() == expected


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_hilbert_neighbours_are_adjacent_on_powers_of_two(side):
    order = scan_order("hilbert", (side, side))
    assert (steps(order, side) == 1).all()
    quarter = coordinates(order, side)[: side * side // 4]
    assert (quarter.amax(0) - quarter.amin(0) < side // 2).all(), "the first quarter of the path is one quadrant"


@pytest.mark.parametrize("grid", [(5, 3), (8, 8), (7, 12)], ids=str)
@pytest.mark.parametrize("name", ["serpentine", "serpentine_col"])
def test_serpentine_neighbours_are_adjacent(name, grid):
    assert (steps(scan_order(name, grid), grid[1]) == 1).all()


@pytest.mark.parametrize("grid", [(5, 3), (8, 8), (7, 12)], ids=str)
def test_zigzag_goes_diagonal_by_diagonal_and_turns(grid):
    points = coordinates(scan_order("zigzag", grid), grid[1])
    diagonal = points.sum(1)
    assert (diagonal.diff() >= 0).all()
    assert (points.diff(dim=0).abs().amax(1) == 1).all(), "every step is to one of the eight neighbours"


def tiles_visited_whole(order, grid, side):
    """True when each side x side tile (clipped at the border) is one unbroken run of the path."""
    points = coordinates(order, grid[1])
    tile = points[:, 0] // side * 1000 + points[:, 1] // side
    return len(torch.unique_consecutive(tile)) == len(torch.unique(tile))


@pytest.mark.parametrize("grid", [(16, 16), (16, 24), (15, 19)], ids=str)
def test_window_finishes_each_window_before_the_next(grid):
    order = scan_order("window", grid)
    assert not torch.equal(order, torch.arange(grid[0] * grid[1]))
    assert any(tiles_visited_whole(order, grid, side) for side in range(2, 13))


def test_a_caller_cannot_spoil_an_order_by_writing_to_it():
    expected = scan_order("hilbert", (4, 4)).clone()
    scan_order("hilbert", (4, 4)).zero_()
    assert torch.equal(scan_order("hilbert", (4, 4)), expected)


@pytest.mark.parametrize("grid", [(0, 4), (-1, 4), (4,), (1, 2, 3, 4)], ids=str)
def test_impossible_grid_is_refused(grid):
    with pytest.raises(ValueError):
        scan_order("row", grid)


def test_unknown_name_is_refused_by_name():
    with pytest.raises(ValueError, match="spiral"):
        scan_order("spiral", (4, 4))


@pytest.fixture(scope="module")
def zigma():
    if not PARITY.is_dir():
        pytest.skip(f"no parity fixtures at {PARITY}")
    with np.load(PARITY / "zigma_paths.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]).long() for name in arrays.files}


@pytest.mark.parametrize("side", [3, 4, 8])
def test_zigma_calls_the_serpentine_zigzag(zigma, side):
    """ZigMa's eight "zigzag" paths are the serpentine from four corners along two axes; 0 and 1 start at the origin."""
    paths = zigma[f"zigzag_{side}"]
    assert torch.equal(scan_order("serpentine", (side, side)), paths[0])
    assert torch.equal(scan_order("serpentine_col", (side, side)), paths[1])
    assert torch.equal(torch.argsort(scan_order("serpentine", (side, side))), zigma[f"zigzag_rev_{side}"][0])
    ours = [scan_order(name, (side, side)) for name in NAMES if name.startswith("serpentine")]
    assert {tuple(path.tolist()) for path in ours} == {tuple(path.tolist()) for path in paths}


@pytest.mark.parametrize("side", [4, 8])
def test_hilbert_is_one_of_zigmas_eight(zigma, side):
    """ZigMa stores the step at which a token is visited, the inverse of a scan order."""
    order = scan_order("hilbert", (side, side))
    assert any(torch.equal(order, torch.argsort(path)) for path in zigma[f"hilbert_{side}"])
