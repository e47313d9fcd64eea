"""The ImageNet transforms on one Pillow image: pure functions of the image and of uniform random numbers.

Training: random resized crop -> colour jitter. Test: shorter side to a fixed length -> centre crop. All of them end as
uint8 pixels; flip, normalisation and cutout follow inside jit (`augment`), where they cost nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageEnhance

from prdarts_jax.data.batches import stream_of

Box: TypeAlias = tuple[int, int, int, int]  # left, upper, right, lower, in pixels

TRIES = 10  # rejected crops before the fallback
RATIO = (3 / 4, 4 / 3)  # width / height of a crop


class Draws(NamedTuple):
    """The random numbers of one image, uniform in [0, 1)."""

    crop: np.ndarray  # float64 [TRIES, 4]: area, ratio, row, column of each try
    factors: np.ndarray  # float64 [4]: brightness, contrast, saturation, hue
    order: np.ndarray  # float64 [4]: their ranks are the order of the four


class Jitter(NamedTuple):
    """Strengths s: a factor is uniform in [max(0, 1 - s), 1 + s], the hue moves by at most +-hue of a turn."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


def draw(seed: int, epoch: int, place: int) -> Draws:
    """The random numbers of the image at a place of an epoch; they depend on nothing else.

    Args:
      seed: of the run.
      epoch: counted from 0.
      place: step in the epoch times global batch size + position in the global batch.

    >>> bool((draw(0, 1, 2).factors == draw(0, 1, 2).factors).all())
    True
    """
    # `random` alone: its stream does not change between numpy versions, those of other distributions may.
    numbers = stream_of(seed, epoch, "transform", place).random(4 * TRIES + 8)
    return Draws(numbers[: 4 * TRIES].reshape(TRIES, 4), numbers[-8:-4], numbers[-4:])


def crop_box(width: int, height: int, uniform: np.ndarray, smallest: float) -> Box:
    """The box of a random resized crop.

    A try has area a w h with a uniform in [smallest, 1], ratio r = width / height with log r uniform in the logarithms
    of `RATIO`, sides rounded, and a uniform place. The first try that fits is taken; if none does, the largest box in
    the centre whose ratio is the image's own, moved into `RATIO`.

    Args:
      width, height: of the image, in pixels.
      uniform: float64 [tries, 4] in [0, 1), see `Draws.crop`.
      smallest: share of the image's area, in (0, 1].

    Source: Szegedy et al., "Going deeper with convolutions" (CVPR 2015), section 6; the tries and the fallback are
      those of torchvision's RandomResizedCrop.

    >>> crop_box(10, 10, np.array([[1.0, 0.5, 0.0, 0.0]]), 0.08)
    (0, 0, 10, 10)
    """
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for share, shape, row, column in uniform.tolist():
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(row * (height - h + 1)), int(column * (width - w + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, factors: np.ndarray, order: np.ndarray, strengths: Jitter) -> Image.Image:
    """Brightness, contrast, saturation and hue, one after the other in a random order.

    With a grey image of the same luma y, each of the first three is f x + (1 - f) z: z = 0 (brightness), the mean of y
    (contrast), y (saturation).

    Args:
      image: RGB.
      factors: float64 [4] in [0, 1), see `Draws`.
      order: float64 [4] in [0, 1), see `Draws`.
      strengths: 0 leaves a property as it is.

    >>> color_jitter(Image.new("RGB", (1, 1), (100, 50, 0)), np.zeros(4), np.arange(4.0), Jitter(0.5)).getpixel((0, 0))
    (50, 25, 0)
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in np.argsort(order, kind="stable").tolist():
        strength, uniform = strengths[which], float(factors[which])
        if not strength:
            continue
        if which == 3:
            image = shift_hue(image, strength * (2 * uniform - 1))
        else:
            low = max(0.0, 1 - strength)
            image = enhancers[which](image).enhance(low + (1 + strength - low) * uniform)
    return image


def shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Moves the hue by a share of a whole turn, in 256ths.

    >>> shift_hue(Image.new("RGB", (1, 1), (255, 0, 0)), 1 / 3).getpixel((0, 0))
    (0, 255, 0)
    """
    hue, saturation, value = image.convert("HSV").split()
    moved = ((np.asarray(hue, np.int32) + round(turn * 256)) % 256).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")


def for_training(image: Image.Image, draws: Draws, size: int, *, smallest: float, strengths: Jitter) -> np.ndarray:
    """Random resized crop (bilinear) and colour jitter.

    Args:
      image: RGB, of any size.
      draws: random numbers of the image.
      size: side of the result, in pixels.
      smallest: see `crop_box`.
      strengths: of the colour jitter.

    Returns:
      uint8 [size, size, 3].

    >>> for_training(Image.new("RGB", (9, 7)), draw(0, 0, 0), 4, smallest=0.08, strengths=Jitter()).shape
    (4, 4, 3)
    """
    # Cropped first: a resize of a box would read pixels beside the box.
    box = crop_box(*image.size, draws.crop, smallest)
    image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(color_jitter(image, draws.factors, draws.order, strengths))


def for_test(image: Image.Image, size: int, shorter: int) -> np.ndarray:
    """The shorter side to `shorter` pixels (bilinear, the longer one in proportion, rounded down), then the centre.

    Args:
      image: RGB, of any size.
      size: side of the result, in pixels; at most `shorter`.
      shorter: pixels.

    Returns:
      uint8 [size, size, 3].

    >>> for_test(Image.new("RGB", (9, 7)), 4, 5).shape
    (4, 4, 3)
    """
    width, height = image.size
    least = min(width, height)
    width, height = shorter * width // least, shorter * height // least
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))
