"""Normalisation and augmentation inside jit: pure functions of a key, uint8 images and their positions in the batch.

Every per-sample draw comes from fold_in(key, position in the global batch), never from the shape of the batch: a batch
that is split over devices or processes sees the numbers of the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from prdarts_jax.config.search import ImagesConfig
from prdarts_jax.errors import UserError


class Draws(NamedTuple):
    """The random numbers of each image in a batch."""

    crop: jax.Array  # int32 [B, 2], row and column of the crop in the padded image, 0..2 crop_padding
    flip: jax.Array  # bool [B]
    cutout: jax.Array  # int32 [B, 2], row and column of the centre of the square, 0..H-1 and 0..W-1


def draw(key: jax.Array, positions: ArrayLike, size: tuple[int, ...], *, crop_padding: int) -> Draws:
    """All draws of a step; those of one augmentation do not depend on whether another one is on.

    Args:
        key: one key a step.
        positions: int32 [B], the position of each image in the global batch.
        size: (H, W) in pixels.
        crop_padding: pixels on each side.

    >>> draw(jax.random.key(0), jnp.array([3, 3]), (8, 8), crop_padding=0).crop.tolist()
    [[0, 0], [0, 0]]
    """
    # One block of bits a sample and floor(u n), not one randint a draw: half the compilation time. Each probability
    # is off by at most 2^-23.
    uniform = jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p), (5,)))(jnp.asarray(positions))
    height, width = size
    choices = jnp.array([2 * crop_padding + 1, 2 * crop_padding + 1, 2, height, width], jnp.float32)
    index = jnp.floor(uniform * choices[None, :]).astype(jnp.int32)
    return Draws(crop=index[:, :2], flip=index[:, 2] == 1, cutout=index[:, 3:])


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """(x / 255 - mean) / std per channel, computed in float32.

    Args:
        images: uint8 [B, H, W, C].
        mean: [C], of images scaled to 0..1.
        std: [C], of images scaled to 0..1.
        dtype: of the result.

    Returns:
        `dtype` [B, H, W, C].

    Raises:
        UserError: `mean` or `std` of another length than C.

    >>> float(normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.25,))[0, 0, 0, 0])
    2.0
    """
    chex.assert_rank(images, 4)
    chex.assert_type(images, jnp.uint8)
    for name, value in (("mean", mean), ("std", std)):
        if len(value) != images.shape[-1]:
            raise UserError(f"{name}: {len(value)} values for {images.shape[-1]} channels; allowed: one a channel")
    scaled = images.astype(jnp.float32) / jnp.float32(255)
    shifted = scaled - jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
    return (shifted / jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)).astype(dtype)


def augment(
    key: jax.Array,
    images: jax.Array,
    positions: ArrayLike,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_padding: int,
    flip: bool,
    cutout: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Random horizontal flip, random crop, normalisation, cutout: the CIFAR recipe of DARTS.

    The crop pads the raw pixels with zeros, before normalisation, and draws each offset uniformly from
    0..2 crop_padding; the flip has probability 1/2; cutout sets to zero, after normalisation, the part inside the image
    of the square whose rows are y - L // 2 .. y - L // 2 + L - 1 (columns alike) around a uniform pixel (y, x).

    Args:
        key: one key a step.
        images: uint8 [B, H, W, C].
        positions: int32 [B], the position of each image in the global batch.
        mean: [C], of images scaled to 0..1.
        std: [C], of images scaled to 0..1.
        crop_padding: pixels on each side; 0 = no crop.
        flip: whether to flip.
        cutout: side L of the square; 0 = none.
        dtype: of the result.

    Returns:
        `dtype` [B, H, W, C].

    Raises:
        UserError: padding or square that does not fit the images.

    References:
        Liu et al. 2019 (DARTS); DeVries and Taylor 2017 (cutout).

    >>> batch = jnp.full((2, 4, 4, 1), 255, jnp.uint8)
    >>> options = {"mean": (0.0,), "std": (1.0,), "crop_padding": 0, "flip": True, "cutout": 2}
    >>> out = augment(jax.random.key(0), batch, jnp.arange(2), **options)
    >>> out.shape, float(out.min()), float(out.max())
    ((2, 4, 4, 1), 0.0, 1.0)
    """
    chex.assert_rank(images, 4)
    positions = jnp.asarray(positions)
    chex.assert_shape(positions, (images.shape[0],))
    check_augment(images.shape[1:3], crop_padding=crop_padding, cutout=cutout)
    draws = draw(key, positions, images.shape[1:3], crop_padding=crop_padding)
    # Flip first: offsets are uniform, so the order is free in distribution, and XLA would fuse a flip that follows the
    # crop into its gather, pixel by pixel, which is several times slower on a CPU.
    if flip:
        images = jnp.where(draws.flip[:, None, None, None], images[:, :, ::-1], images)
    if crop_padding:
        images = _crop(images, draws.crop, crop_padding)
    out = normalize(images, mean, std, dtype)
    if cutout:
        hole = _holes(draws.cutout, images.shape[1], images.shape[2], cutout)
        out = jnp.where(hole[..., None], jnp.zeros((), out.dtype), out)
    return out


def check_augment(size: tuple[int, ...], *, crop_padding: int, cutout: int) -> None:
    """Refuses augmentation that cannot be meant for images of this size.

    Args:
        size: (H, W) in pixels.
        crop_padding: pixels on each side, below the shorter side (an image must not vanish from its crop).
        cutout: side of the square, at most the shorter side.

    Raises:
        UserError: one line.

    >>> check_augment((8, 8), crop_padding=1, cutout=16)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: data.cutout: 16 is larger than the 8x8 images; allowed: 0..8
    """
    height, width = size
    side = min(height, width)
    if not 0 <= crop_padding < side:
        raise UserError(
            f"data.crop_padding: {crop_padding} does not fit {height}x{width} images; allowed: 0..{side - 1}"
        )
    if cutout < 0:
        raise UserError(f"data.cutout: {cutout} is negative; allowed: 0..{side}")
    if cutout > side:
        raise UserError(f"data.cutout: {cutout} is larger than the {height}x{width} images; allowed: 0..{side}")


def _crop(images: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
    # A batched dynamic_slice is the fastest way on a CPU, much faster than one-hot products, shifts or selects.
    _, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def one(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], jnp.zeros_like(offset[0]))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(one)(padded, offsets)


def _holes(centres: jax.Array, height: int, width: int, side: int) -> jax.Array:
    """bool [B, H, W], True inside the square."""
    first = centres - side // 2
    rows = jnp.arange(height)[None, :] - first[:, :1]
    columns = jnp.arange(width)[None, :] - first[:, 1:]
    in_rows, in_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return in_rows[:, :, None] & in_columns[:, None, :]


def load_images(
    key: jax.Array,
    images: jax.Array,
    positions: jax.Array,
    *,
    data: ImagesConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: str,
) -> jax.Array:
    """A batch as the network sees it: augmented as the config says, and normalised."""
    return augment(
        key,
        images,
        positions,
        mean=mean,
        std=std,
        crop_padding=data.crop_padding,
        flip=data.flip,
        cutout=data.cutout,
        dtype=dtype,
    )
