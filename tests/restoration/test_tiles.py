import pytest
import torch
from torch import nn

from mambavision.backbones.serpent import serpent_debug
from mambavision.engine.memory import GROWING_SEGMENTS
from mambavision.restoration import tiles
from mambavision.restoration.tiles import (
    MIN_TILE,
    blend_weights,
    check_fits,
    choose_tile,
    measure_bytes_per_pixel,
    run_tiled,
    tile_spans,
    tiled_rows,
)


def nearest(scale):
    return lambda x: x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 8), (64, 63), (96, 32), (128, 50), (33, 7), (512, 32)])
def test_spans_cover_a_side_with_little_more_than_the_overlap(tile, overlap):
    for length in [*range(1, 300), 1000, 4096, 8191]:
        spans = tile_spans(length, tile, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(0 < stop - start <= tile for start, stop in spans)
        shared = [stop - start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False)]
        assert all(n >= min(overlap, tile - 32) for n in shared), (length, spans)
        if tile >= 64:
            assert all(start % 32 == 0 for start, _ in spans)
        weights = blend_weights(spans, 2)
        total = torch.zeros(2 * length)
        for (start, stop), weight in zip(spans, weights, strict=True):
            total[2 * start : 2 * stop] += weight
            assert (weight > 0).all()
        torch.testing.assert_close(total, torch.ones(2 * length))


@pytest.mark.parametrize("tile, overlap", [(64, -1), (64, 64), (0, 0)])
def test_impossible_tiles_are_refused(tile, overlap):
    with pytest.raises(ValueError, match="cannot overlap by"):
        tile_spans(100, tile, overlap)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (200, 70), (129, 257)])
def test_a_local_network_is_the_same_in_tiles(scale, size):
    image = torch.rand(3, *size)
    out = run_tiled(nearest(scale), image, tile=64, overlap=16, scale=scale)
    torch.testing.assert_close(out, nearest(scale)(image[None])[0])


def test_seams_are_smooth():
    """Tiles that disagree by a constant: the picture must go from one to the other without a step."""
    levels = iter(range(100))
    out = run_tiled(lambda x: torch.full_like(x, next(levels)), torch.rand(1, 64, 400), tile=64, overlap=32)
    assert out.diff(dim=2).abs().max() < 0.06  # the steepest step of a raised cosine over 32 pixels: pi / 64
    assert out.diff(dim=1).abs().max() < 1e-5


def test_integers_are_scaled_and_rows_come_in_order():
    image = torch.randint(0, 256, (3, 150, 90), dtype=torch.uint8)
    done, tops = [], []
    for top, row in tiled_rows(lambda x: x, image, tile=64, overlap=8, on_tile=lambda *n: done.append(n)):
        tops.append(top)
        torch.testing.assert_close(row, image[:, top : top + row.shape[1]] / 255)
    assert tops == sorted(tops) and done == [(i + 1, len(done)) for i in range(len(done))] and len(done) > 4
    wide = torch.full((1, 5, 5), 65535, dtype=torch.int32).to(torch.uint16)
    torch.testing.assert_close(run_tiled(lambda x: x, wide, tile=64, overlap=0), torch.ones(1, 5, 5))


@torch.inference_mode()
def test_a_network_in_tiles_comes_near_the_whole():
    """The error of tiles falls with the overlap, and is far below that of no tiles' neighbours at all."""
    torch.manual_seed(0)
    network = serpent_debug().eval()
    nn.init.normal_(network.head.weight, std=0.05)
    image = torch.rand(3, 192, 192)
    whole = network(image[None])[0]
    change = (whole - image).std()

    def error(overlap):
        tiled = run_tiled(network, image, tile=96, overlap=overlap)
        return ((tiled - whole).square().mean().sqrt() / change).item()

    errors = [error(overlap) for overlap in (0, 32, 64)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.02, errors


def test_tiles_follow_the_memory():
    assert choose_tile(300, 400, 1000, 2**40, "cpu") == 400
    assert choose_tile(4000, 3000, 1000, 2**40, "cpu") == 768
    assert choose_tile(4000, 3000, 1000, 2**40, "cuda") == 4000
    side = choose_tile(4000, 3000, 1000, 10**9, "cuda")
    assert side % 32 == 0 and 0.8e9 * 0.85 < side**2 * 1000 <= 0.8e9
    assert choose_tile(4000, 3000, 1000, 1000, "cuda") == MIN_TILE
    with pytest.raises(MemoryError, match=r"100000x100000 pixels in one piece need about 1[\d]*\.\d GB on cpu"):
        check_fits(100000, 100000, 100, "cpu")


def test_one_piece_leaves_room_for_the_allocator(monkeypatch):
    """On an H100, 8192x8192 pixels of 1074 bytes ran out of memory, unless segments grew; 7168x7168 did not."""
    a_pixel = 1074
    monkeypatch.setattr(tiles, "free_memory", lambda device: int(83.9e9))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    check_fits(7168, 7168, a_pixel, "cuda")
    needs = r"8192x8192 .* need about 90\.1 GB on cuda, 83\.9 GB are free: use --tile auto, or set PYTORCH_\S+, with"
    with pytest.raises(MemoryError, match=needs):
        check_fits(8192, 8192, a_pixel, "cuda")
    check_fits(8192, 8192, a_pixel, "cpu")
    with pytest.raises(MemoryError, match="free: use --tile auto$"):
        check_fits(9000, 9000, a_pixel, "cuda")
    monkeypatch.setenv(*GROWING_SEGMENTS.split("="))
    check_fits(8192, 8192, a_pixel, "cuda")
    with pytest.raises(MemoryError, match="9000x9000 .* need about 96.7 GB .* free: use --tile auto$"):
        check_fits(9000, 9000, a_pixel, "cuda")


def test_memory_is_measured():
    def hungry(x):
        return x.repeat(1, 200, 1, 1).sum(1, keepdim=True)  # 600 floats a pixel

    for _ in range(2):
        measured = measure_bytes_per_pixel(hungry, 3, "cpu")
        assert 2000 < measured < 5000 or measured == tiles._ASSUMED
        freed = [torch.rand(2**14) for _ in range(4000)]  # 250 MB that the process has free for the second round
        del freed
