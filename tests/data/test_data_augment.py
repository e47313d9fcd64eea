"""Augmentation against slicing in numpy, with the draws recomputed from the same keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prdarts_jax.data.augment import augment, check_augment, normalize
from prdarts_jax.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
KEY = jax.random.key(3)


def images(batch=6, height=9, width=7, channels=3, low=0):
    return np.random.default_rng(batch).integers(low, 256, (batch, height, width, channels)).astype(np.uint8)


def plain(x, mean=MEAN, std=STD):
    return (x.astype(np.float64) / 255 - np.array(mean)) / np.array(std)


def draws(position, height, width, padding):
    top, left, flip, y, x = np.asarray(jax.random.uniform(jax.random.fold_in(KEY, position), (5,)))
    choices = 2 * padding + 1
    return (int(top * choices), int(left * choices)), flip >= 0.5, (int(y * height), int(x * width))


def oracle(batch, positions, *, crop_padding, flip, cutout):
    out = []
    for image, position in zip(batch, positions, strict=True):
        height, width, _ = image.shape
        (top, left), flipped, (y, x) = draws(int(position), height, width, crop_padding)
        image = image[:, ::-1] if flip and flipped else image
        padded = np.zeros((height + 2 * crop_padding, width + 2 * crop_padding, image.shape[2]), np.uint8)
        padded[crop_padding : crop_padding + height, crop_padding : crop_padding + width] = image
        image = padded[top : top + height, left : left + width] if crop_padding else image
        image = plain(image)
        if cutout:
            y0, x0 = y - cutout // 2, x - cutout // 2
            image[max(y0, 0) : max(y0 + cutout, 0), max(x0, 0) : max(x0 + cutout, 0)] = 0
        out.append(image)
    return np.stack(out)


@pytest.mark.parametrize("crop_padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cutout", [0, 3, 4, 7])
def test_equals_slicing_in_numpy(crop_padding, flip, cutout):
    batch, positions = images(), np.array([0, 1, 2, 3, 17, 100], np.int32)
    options = {"crop_padding": crop_padding, "flip": flip, "cutout": cutout}
    found = augment(KEY, batch_of(batch), jnp.asarray(positions), mean=MEAN, std=STD, **options)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, oracle(batch, positions, **options), rtol=1e-5, atol=1e-6)


def batch_of(x):
    return jnp.asarray(x)


def test_normalize():
    x = images()
    np.testing.assert_allclose(normalize(batch_of(x), MEAN, STD), plain(x), rtol=1e-5, atol=1e-6)
    half = normalize(batch_of(x), MEAN, STD, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, normalize(batch_of(x), MEAN, STD).astype(jnp.bfloat16))


def test_padding_is_black_before_normalisation_and_cutout_is_the_mean():
    white = jnp.full((64, 8, 8, 1), 255, jnp.uint8)
    options = {"mean": (0.5,), "std": (0.25,), "flip": False}
    cropped = augment(KEY, white, jnp.arange(64), crop_padding=3, **options)
    assert set(np.unique(cropped)) == {-2.0, 2.0}  # (0 - .5) / .25 and (1 - .5) / .25
    cut = augment(KEY, white, jnp.arange(64), crop_padding=0, cutout=4, **options)
    assert set(np.unique(cut)) == {0.0, 2.0}


OPTIONS = {"mean": MEAN, "std": STD, "crop_padding": 4, "flip": True, "cutout": 4}


def test_halves_of_a_batch_see_the_numbers_of_the_whole_bit_for_bit():
    batch, positions = batch_of(images(8, 12, 12)), jnp.arange(8)
    step = jax.jit(lambda k, x, p: augment(k, x, p, **OPTIONS))
    whole = step(KEY, batch, positions)
    halves = jnp.concatenate([step(KEY, batch[i : i + 4], positions[i : i + 4]) for i in (0, 4)])
    np.testing.assert_array_equal(whole, halves)
    eager = augment(KEY, batch, positions, **OPTIONS)
    np.testing.assert_allclose(whole, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.multidevice
def test_shards_see_the_numbers_of_the_whole_bit_for_bit():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec
    batch, positions = batch_of(images(8, 12, 12)), jnp.arange(8)
    step = jax.shard_map(
        lambda k, x, p: augment(k, x, p, **OPTIONS),
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec("data")),
        out_specs=spec("data"),
        check_vma=False,
    )
    whole = jax.jit(lambda k, x, p: augment(k, x, p, **OPTIONS))(KEY, batch, positions)
    np.testing.assert_array_equal(jax.jit(step)(KEY, batch, positions), whole)


def test_draws_depend_on_the_key_and_the_position_alone():
    same = jnp.tile(batch_of(images(1, 12, 12)), (4, 1, 1, 1))
    one = augment(KEY, same, jnp.array([5, 5, 6, 7]), **OPTIONS)
    np.testing.assert_array_equal(one[0], one[1])
    assert not np.array_equal(one[1], one[2]) and not np.array_equal(one[2], one[3])
    other = augment(jax.random.key(4), same, jnp.array([5, 5, 6, 7]), **OPTIONS)
    assert not np.array_equal(one[0], other[0])


def test_switching_one_augmentation_leaves_the_draws_of_the_others():
    white = jnp.full((16, 8, 8, 1), 255, jnp.uint8)
    options = {"mean": (0.5,), "std": (0.25,), "cutout": 4}
    holes = augment(KEY, white, jnp.arange(16), crop_padding=0, flip=False, **options) == 0
    both = augment(KEY, white, jnp.arange(16), crop_padding=2, flip=True, **options) == 0
    np.testing.assert_array_equal(holes, both)


def chi_square(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_offsets_flips_and_centres_are_uniform():
    """Each pixel of the input is its own number, so the output tells which draw was made."""
    n, size, padding = 8192, 8, 2
    code = jnp.asarray(np.arange(1, size * size + 1, dtype=np.uint8).reshape(1, size, size, 1))
    batch = jnp.tile(code, (n, 1, 1, 1))
    options = {"mean": (0.0,), "std": (1 / 255,)}
    crops = augment(KEY, batch, jnp.arange(n), crop_padding=padding, flip=False, **options)
    inner = np.rint(np.asarray(crops[:, padding, padding, 0])).astype(int) - 1  # pixel (top, left) of the input
    top, left = inner // size, inner % size
    counts = np.histogram2d(top, left, bins=[np.arange(6) - 0.5] * 2)[0]
    assert counts.min() > 0 and counts.sum() == n
    assert chi_square(counts) < 51.2  # 24 degrees of freedom, p = 0.001
    flips = augment(KEY, batch, jnp.arange(n), crop_padding=0, flip=True, **options)
    share = float((np.rint(np.asarray(flips[:, 0, 0, 0])) == size).mean())
    assert abs(share - 0.5) < 3.3 * 0.5 / n**0.5
    holes = augment(KEY, batch, jnp.arange(n), crop_padding=0, flip=False, cutout=1, **options) == 0
    assert (np.asarray(holes).sum((1, 2, 3)) == 1).all()
    assert chi_square(np.asarray(holes).sum((0, 3))) < 103.4  # 63 degrees of freedom, p = 0.001


def test_one_compilation_serves_every_key_and_position():
    traces = []

    @jax.jit
    def step(key, x, positions):
        traces.append(1)
        return augment(key, x, positions, **OPTIONS)

    for i in range(3):
        step(jax.random.key(i), batch_of(images(4, 12, 12)), jnp.arange(4) + i)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop_padding": 8, "cutout": 0}, "data.crop_padding: 8 does not fit 8x9 images; allowed: 0..7"),
        ({"crop_padding": -1, "cutout": 0}, "data.crop_padding: -1"),
        ({"crop_padding": 0, "cutout": 9}, "data.cutout: 9 is larger than the 8x9 images; allowed: 0..8"),
        ({"crop_padding": 0, "cutout": -2}, "data.cutout: -2 is negative"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(UserError) as caught:
        augment(KEY, batch_of(images(2, 8, 9)), jnp.arange(2), mean=MEAN, std=STD, flip=False, **options)
    assert words in str(caught.value)
    check_augment((8, 9), crop_padding=7, cutout=8)


def test_wrong_number_of_channels():
    with pytest.raises(UserError, match="mean: 3 values for 1 channels"):
        normalize(batch_of(images(channels=1)), MEAN, STD)
    with pytest.raises(UserError, match="std: 3 values for 1 channels"):
        normalize(batch_of(images(channels=1)), (0.5,), STD)
