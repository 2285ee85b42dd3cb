import cv2
import numpy as np
import pytest

from mambavision.diffusion.generated import FONTS, SHAPES, THICKNESSES, BouncingShapes, MovingDigits, _digit

BOTH = pytest.mark.parametrize("kind", [MovingDigits, BouncingShapes])


@BOTH
@pytest.mark.parametrize("size", [(16, 32, 32), (400, 32, 32), (20, 64, 48)])
def test_clips_have_the_size_asked_for(kind, size):
    dataset = kind(2, size)
    frames, label = dataset[1]
    assert frames.dtype == np.uint8 and frames.shape == (size[0], dataset.channels, *size[1:])
    assert dataset.size == size and len(dataset) == 2
    assert 0 <= label < max(len(dataset.class_names), 1)
    lit = frames.max(1) > 100
    assert (lit.reshape(size[0], -1).sum(1) > 5).all()  # something is in every frame
    assert lit.any(0).mean() > lit[0].mean()  # and moves


@BOTH
def test_a_clip_is_a_function_of_seed_and_index(kind):
    frames = kind(4, (12, 32, 32), seed=3)[2].frames
    assert (kind(9, (40, 32, 32), seed=3)[2].frames[:12] == frames).all()
    assert (kind(4, (12, 32, 32), seed=4)[2].frames != frames).any()
    assert (kind(4, (12, 32, 32), seed=3)[1].frames != frames).any()


@BOTH
def test_objects_stay_inside_and_bounce(kind):
    dataset = kind(1, (120, 32, 40), objects=1, speed=(1.5, 1.5))
    frames = dataset[0].frames.max(1).astype(float)
    mass = frames.sum((1, 2))
    assert np.ptp(mass) < 0.1 * mass.mean()  # nothing is cut off
    x = (frames * np.arange(40)).sum((1, 2)) / mass
    y = (frames * np.arange(32)[:, None]).sum((1, 2)) / mass
    step = np.hypot(np.diff(x), np.diff(y))
    assert np.median(step) == pytest.approx(1.5, abs=0.05)
    assert (np.sign(np.diff(x)) > 0).any() and (np.sign(np.diff(x)) < 0).any()


def test_every_digit_of_every_font_is_whole_and_different():
    drawn = set()
    for font in range(len(FONTS)):
        for thickness in range(len(THICKNESSES)):
            glyphs = [_digit(digit, font, thickness) for digit in range(10)]
            for glyph in glyphs:
                assert glyph.max() == 255
                assert not glyph[[0, -1]].any() and not glyph[:, [0, -1]].any()
            assert len({glyph.tobytes() for glyph in glyphs}) == 10
            drawn.add(glyphs[4].tobytes())
    assert len(drawn) >= 4 * len(THICKNESSES)  # OpenCV 5 draws some fonts alike


def test_the_class_of_shapes_is_their_form():
    dataset = BouncingShapes(60, (1, 64, 64), objects=1)
    labels = [dataset[i].label for i in range(60)]
    assert set(labels) == set(range(len(SHAPES)))
    corners = {label: [] for label in range(3)}
    for i, label in enumerate(labels):
        mask = (dataset[i].frames[0].max(0) > 128).astype(np.uint8)
        (outline, *_), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        fill = mask.sum() / cv2.minEnclosingCircle(outline)[1] ** 2 / np.pi
        corners[label].append(fill)
    disc, square, triangle = (np.median(corners[label]) for label in range(3))
    assert disc > 0.85 > square > 0.55 > triangle


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num=0), "must be positive.* got 0"),
        (dict(size=(4, 8, 32)), "16x16 pixels at least"),
        (dict(size=(32, 32)), "frames, height, width"),
        (dict(speed=(2.0, 1.0)), "lowest and the highest"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**dict(num=2, size=(4, 32, 32)) | arguments)


def test_an_index_beyond_the_end_is_refused():
    with pytest.raises(IndexError):
        MovingDigits(2, (4, 32, 32))[2]
