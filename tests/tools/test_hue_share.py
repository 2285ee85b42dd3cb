import importlib.util
import re

import numpy as np
import pytest

from mambavision.diffusion.generated import BouncingShapes
from tests.conftest import REPOSITORY
from tests.tools.running import refusal

TOOL = REPOSITORY / "tools" / "hue_share.py"
CONFIG = REPOSITORY / "configs" / "video_unet" / "video_unet_t_bi_s6_shapes32.py"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("hue_share", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def coloured(*hues):
    """uint8 (1, 3, 1, len(hues)), colours full and bright."""
    rgb = [np.clip(abs((hue / 60 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1) for hue in hues]
    return (np.array(rgb).T[None, :, None] * 255 + 0.5).astype(np.uint8)


def test_hues(measure):
    expected = [0, 59, 61, 119, 180, 241, 300, 359]
    np.testing.assert_allclose(measure.hues(coloured(*expected)), expected, atol=0.3)
    gray = np.repeat(np.arange(0, 256, 5, dtype=np.uint8)[None, None, None], 3, 1)
    assert not len(measure.hues(gray)) and not len(measure.hues(coloured(30) // 4))


def test_the_share_of_the_commonest_hues(measure):
    clip = coloured(350, 355, 5, 10, 12, 100, 101, 128, 200, 250)  # five about 0, three about 114
    assert measure.hue_share(clip, 1) == pytest.approx(0.5)
    assert measure.hue_share(clip) == pytest.approx(0.8)
    assert measure.hue_share(clip, 5) == 1
    assert np.isnan(measure.hue_share(clip // 4))


def test_drawn_clips_keep_their_hues(measure):
    clips = BouncingShapes(4, (8, 32, 32))
    shares = [measure.hue_share(clips[i].frames) for i in range(4)]
    assert min(shares) > 0.98
    drifting = np.roll(clips[0].frames, 1, 1) // 2 + clips[0].frames // 2
    assert measure.hue_share(np.concatenate([clips[0].frames, drifting, np.roll(drifting, 1, 1)])) < 0.7


def test_samples_and_what_a_config_draws(tool, tmp_path):
    code, text, err = tool("hue_share", CONFIG, "--num", 2)
    assert code == 0 and re.search(r"commonest hues: (9[0-9.]+|100.0) %", text), err
    clips = np.zeros((2, 1, 1, 10, 3), np.uint8)
    clips[0] = coloured(*range(0, 120, 12)).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "samples.npz", arr_0=clips)
    code, text, err = tool("hue_share", tmp_path / "samples.npz", "--hues", 1)
    assert code == 0 and text.splitlines() == [
        "1 clips, 1 without colour left out",
        "coloured pixels within 15 degrees of a clip's 1 commonest hues: 30.0 %, at the lowest 30.0 %",
    ], err


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (np.zeros((2, 3, 8, 8, 3), np.uint8), [], "no clip has a coloured pixel"),
        (np.zeros((2, 3, 8, 8, 1), np.uint8), [], "are not clips in colour"),
        (np.zeros((2, 8, 8, 3), np.uint8), [], "are not clips in colour"),
        (np.zeros((2, 3, 8, 8, 3), np.uint8), ["--hues", 0], "--hues must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(samples, options, message, tool, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=samples)
    assert message in refusal(tool("hue_share", tmp_path / "samples.npz", *options))
