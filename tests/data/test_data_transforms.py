"""ImageNet's transforms against closed forms, counting, and brute force."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
from data_cases import random_image
from PIL import Image

from prdarts_jax.data.transforms import Draws, Jitter, color_jitter, crop_box, draw, for_test, for_training, shift_hue


def test_draws_belong_to_seed_epoch_and_place():
    rows = {
        place: np.concatenate([part.ravel() for part in draw(*place)])
        for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert (rows[0, 0, 0] == np.concatenate([part.ravel() for part in draw(0, 0, 0)])).all()
    assert len({row.tobytes() for row in rows.values()}) == 4


@pytest.mark.parametrize("size", [(500, 375), (64, 90), (33, 33)])
def test_crops_have_the_areas_and_ratios_asked_for(size):
    width, height = size
    boxes = np.array([crop_box(width, height, draw(0, 0, i).crop, 0.08) for i in range(2000)], float)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    slack = 1 / w + 1 / h  # sides are rounded
    share, ratio = w * h / (width * height), w / h
    assert (share > 0.08 * (1 - slack)).all() and (share <= 1).all()
    assert (ratio > 3 / 4 * (1 - slack)).all() and (ratio < 4 / 3 * (1 + slack)).all()
    small = share < 0.35  # crops of this size fit whatever their ratio, so nothing was rejected among them
    assert abs(np.mean(share[small]) - (0.08 + 0.35) / 2) < 0.02
    assert abs(np.mean(np.log(ratio[small]))) < 0.02
    assert abs(np.std(np.log(ratio[small])) - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.02
    place = (boxes[small, 0] / np.maximum(width - w[small], 1)).mean()
    assert abs(place - 0.5) < 0.04


@pytest.mark.parametrize(
    ("size", "box"), [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56)), ((12, 10), (0, 0, 12, 10))]
)
def test_ten_tries_that_do_not_fit_take_the_centre(size, box):
    # Area 1 of a long image has a side above the other one at any allowed ratio; 12x10 fails at ratio 3/4.
    tries = np.array([[1 - 1e-12, 0.0, 0.5, 0.5]] * 10)
    assert crop_box(*size, tries, 0.08) == box


def test_the_first_try_that_fits_is_taken():
    tries = np.array([[1 - 1e-12, 0.0, 0, 0], [0.25, 0.5, 0, 0], [0.0, 0.5, 0, 0]])
    side = round(math.sqrt(100 * 100 * (0.08 + 0.92 * 0.25)))
    assert crop_box(100, 100, tries, 0.08) == (0, 0, side, side)


def test_a_resized_crop_is_the_crop_resized():
    pixels, draws = random_image(20, 30, 3), draw(3, 1, 4)
    left, top, right, bottom = crop_box(30, 20, draws.crop, 0.08)
    expected = Image.fromarray(pixels[top:bottom, left:right]).resize((8, 8), Image.Resampling.BILINEAR)
    found = for_training(Image.fromarray(pixels), draws, 8, smallest=0.08, strengths=Jitter())
    np.testing.assert_array_equal(found, np.asarray(expected))


def _luma(x):
    return np.rint(x @ np.array([299, 587, 114]) / 1000)


def _blend(pixels, which, factor):
    x = pixels.astype(float)
    grey = {0: np.zeros_like(x[..., :1]), 1: np.full_like(x[..., :1], np.rint(_luma(x).mean())), 2: _luma(x)[..., None]}
    return np.clip(factor * x + (1 - factor) * grey[which], 0, 255)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.9])
def test_brightness_contrast_and_saturation_are_their_blends(which, uniform):
    pixels, strengths = random_image(6, 7, 3), [0.0] * 4
    strengths[which] = 0.4
    factors = np.full(4, uniform)
    found = np.asarray(color_jitter(Image.fromarray(pixels), factors, np.arange(4.0), Jitter(*strengths)), float)
    expected = _blend(pixels, which, 0.6 + 0.8 * uniform)
    assert np.abs(found - expected).max() <= 2  # luma and result are rounded
    assert np.abs(expected - pixels).max() > 10


def test_the_order_of_the_four_is_drawn():
    pixels = random_image(6, 7, 3)
    factors, strengths = np.array([0.9, 0.9, 0.5, 0.5]), Jitter(0.9, 0.9)
    for order, (first, second) in (([0.1, 0.2, 0, 0], (0, 1)), ([0.2, 0.1, 0, 0], (1, 0))):
        found = np.asarray(color_jitter(Image.fromarray(pixels), factors, np.array(order), strengths), float)
        expected = _blend(np.rint(_blend(pixels, first, 0.1 + 1.8 * 0.9)), second, 0.1 + 1.8 * 0.9)
        assert np.abs(found - expected).max() <= 4


def test_hue_turns_as_in_colorsys():
    rgb = [(200, 40, 40), (30, 180, 90), (10, 20, 240)]
    for colour in rgb:
        for turn in (-0.2, 0.1, 0.5):
            h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
            expected = np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255
            found = shift_hue(Image.new("RGB", (1, 1), colour), turn).getpixel((0, 0))
            assert np.abs(np.array(found) - expected).max() <= 6  # 8 bits a component of HSV
    moved = color_jitter(Image.new("RGB", (1, 1), rgb[0]), np.zeros(4), np.zeros(4), Jitter(hue=0.2))
    assert moved.getpixel((0, 0)) == shift_hue(Image.new("RGB", (1, 1), rgb[0]), -0.2).getpixel((0, 0))


@pytest.mark.parametrize(("width", "height"), [(30, 20), (20, 31), (16, 16)])
def test_test_images_are_resized_and_cut_from_the_centre(width, height):
    pixels = random_image(height, width, 3)
    long = 16 * max(width, height) // min(width, height)
    size = (long, 16) if width > height else (16, long)
    whole = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    top, left = round((whole.shape[0] - 14) / 2), round((whole.shape[1] - 14) / 2)
    np.testing.assert_array_equal(for_test(Image.fromarray(pixels), 14, 16), whole[top : top + 14, left : left + 14])


def test_a_flip_before_the_jitter_is_one_after_it():
    draws, image, flip = draw(0, 0, 0), Image.fromarray(random_image(5, 7, 3)), Image.Transpose.FLIP_LEFT_RIGHT
    before, after = (
        np.asarray(color_jitter(given, draws.factors, draws.order, Jitter(0.4, 0.4, 0.4, 0.2)))
        for given in (image.transpose(flip), image)
    )
    np.testing.assert_array_equal(before, after[:, ::-1])
    assert (after != np.asarray(image)).any()


def test_no_strength_changes_no_pixel():
    draws, image = draw(0, 0, 0), Image.fromarray(random_image(5, 5, 3))
    assert isinstance(draws, Draws)
    np.testing.assert_array_equal(color_jitter(image, draws.factors, draws.order, Jitter()), np.asarray(image))
