import numpy as np
import pytest
import torch
from PIL import Image

from mambavision.diffusion.outputs import make_grid, to_pil, to_uint8, write_gif, write_mp4, write_npz, write_png
from mambavision.engine.video import open_video

RNG = np.random.default_rng(0)


def test_floats_become_bytes():
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    assert to_uint8(x).shape == (2, 4, 5, 3) and to_uint8(x)[0, 0, 0].tolist() == [0, 128, 255]
    assert to_uint8(torch.zeros(2, 1, 6, 4, 5)).shape == (2, 6, 4, 5, 1)
    assert [image.mode for image in to_pil(torch.rand(2, 1, 4, 5))] == ["L", "L"]
    assert [[image.size for image in clip] for clip in to_pil(torch.rand(2, 3, 3, 4, 5))] == [[(5, 4)] * 3] * 2


def test_grid_holds_each_picture_in_its_place():
    pictures = RNG.integers(0, 255, (5, 4, 6, 3), np.uint8)
    grid = make_grid(pictures)
    assert grid.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3)
    assert np.array_equal(grid[2:6, 2:8], pictures[0]) and np.array_equal(grid[8:12, 10:16], pictures[4])
    assert (grid[8:12, 18:] == 255).all() and (grid[:2] == 255).all()
    assert make_grid(pictures[:2, :3, :5], columns=1).shape == (12, 10, 3)  # 9 x 9 made even
    clips = RNG.integers(0, 255, (2, 7, 4, 6, 1), np.uint8)
    grid = make_grid(clips)
    assert grid.shape == (7, 8, 18, 1) and np.array_equal(grid[3], make_grid(clips[:, 3]))


def test_png_and_gif(tmp_path):
    picture = RNG.integers(0, 255, (6, 8, 3), np.uint8)
    write_png(tmp_path / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    gray = np.linspace(0, 255, 5 * 6 * 8).reshape(5, 6, 8, 1).astype(np.uint8)
    write_gif(tmp_path / "a.gif", gray, rate=20)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (5, 50, 0)
        for i, frame in enumerate(gray):
            gif.seek(i)
            assert np.array_equal(np.asarray(gif.convert("L")), frame[..., 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.png"]


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 48, 3), (31, 33, 1)])
def test_mp4(height, width, channels, tmp_path):
    clip = np.full((4, height, width, channels), 60, np.uint8)
    clip[..., 0] = 200
    write_mp4(tmp_path / "a.mp4", clip, rate=12)
    with open_video(tmp_path / "a.mp4") as video:
        assert (video.height, video.width, video.rate, video.announced) == (
            height + height % 2,
            width + width % 2,
            12,
            4,
        )
        colour = np.stack(list(video.frames)).mean((0, 1, 2))
    np.testing.assert_allclose(colour[::-1], clip[0, 0, 0] if channels == 3 else [200] * 3, atol=6)


def test_npz_is_what_evaluators_read(tmp_path):
    gray = RNG.integers(0, 255, (3, 4, 5, 1), np.uint8)
    write_npz(tmp_path / "a.npz", gray, [0, 2, 1])
    with np.load(tmp_path / "a.npz") as file:
        assert file["arr_0"].shape == (3, 4, 5, 3) and file["arr_0"].dtype == np.uint8
        assert (file["arr_0"] == gray).all() and file["arr_1"].tolist() == [0, 2, 1]
    write_npz(tmp_path / "b.npz", gray.repeat(3, -1), [None] * 3)
    with np.load(tmp_path / "b.npz") as file:
        assert file.files == ["arr_0"]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(np, "savez", full)
    picture = np.zeros((4, 4, 3), np.uint8)
    for write in (
        lambda: write_png(tmp_path / "a.png", picture),
        lambda: write_gif(tmp_path / "a.gif", picture[None]),
        lambda: write_npz(tmp_path / "a.npz", picture[None], [None]),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert not list(tmp_path.iterdir())
