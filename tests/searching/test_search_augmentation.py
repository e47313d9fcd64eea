"""What reaches a step: the batches of both halves, augmented as the config says, from draws of their own.

The step is replaced by one that hands its batches out, and the transformation of every image is found by trying all.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_cases

from prdarts_jax.data.batches import Images
from prdarts_jax.data.sources import Dataset, from_arrays
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import program as search_program

SIZE, BATCH, STEPS = (6, 8), 8, 5


class Found(NamedTuple):
    """How an image was changed."""

    flip: bool
    crop: tuple[int, int]
    hole: int  # pixels set to zero


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (40, *SIZE, 1), dtype=np.uint8)  # no pixel is that of the padding
    return from_arrays("noise", images, np.arange(40) % 2)


class Half(NamedTuple):
    """What the steps of a dispatch got of one half."""

    order: np.ndarray  # [S,B]: which images it was to be
    images: np.ndarray  # [S,B,H,W,C]
    labels: np.ndarray  # [S,B]
    keys: list[bytes]  # of the augmentation


class Seen(NamedTuple):
    train: Half
    val: Half
    keys: list[bytes]  # of the gates


def _dispatch(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **flags: object) -> Seen:
    """The batches of a dispatch. The halves read different images."""
    steps: dict[int, tuple[np.ndarray, ...]] = {}
    load_images = search_program.load_images
    loaded: list[jax.Array] = []  # keys, in the order of the trace: train, validation

    def spying(key, images, positions, **options):  # type: ignore[no-untyped-def]
        loaded.append(jax.random.key_data(key))
        return load_images(key, images, positions, **options)

    def make_search_step(**_: object):
        def step(state, batches, key, progress):  # type: ignore[no-untyped-def]
            keys = (*loaded[-2:], jax.random.key_data(key)) if loaded else ()
            values = (*batches.train, *batches.val, *keys)
            jax.debug.callback(lambda i, *a: steps.update({int(i): tuple(map(np.asarray, a))}), state.step, *values)
            return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}

        return step

    monkeypatch.setattr(search_program, "make_search_step", make_search_step)
    monkeypatch.setattr(search_program, "load_images", spying)
    config = search_cases.config(**flags)
    with search_cases.standard_promotion():
        inputs = search_inputs.prepare(config, data=dataset)
        key, progress = jax.random.key(seed), inputs.problem.strategy.schedule(0, 1)
        carry = search_program.SearchPrograms(inputs.problem, inputs.mesh, (*SIZE, 1)).initial(key, progress)
        order = np.random.default_rng(1).permutation(40).reshape(STEPS, BATCH).astype(np.int32)
        orders = search_program.Orders(order, order[::-1].copy())
        program = search_program.make_dispatch(inputs.problem, inputs.mesh)
        data = Images(dataset.train_images, dataset.train_labels)
        positions = np.arange(BATCH, dtype=np.int32)
        jax.block_until_ready(program(carry, STEPS, True, orders, positions, key, progress, data))
    jax.effects_barrier()
    assert sorted(steps) == list(range(STEPS))
    train, train_labels, val, val_labels, *keys = map(np.stack, zip(*(steps[i] for i in range(STEPS)), strict=True))
    train_keys, val_keys, gate_keys = ([row.tobytes() for row in rows] for rows in keys)
    return Seen(
        Half(orders.train, train, train_labels, train_keys), Half(orders.val, val, val_labels, val_keys), gate_keys
    )


def _explain(out: np.ndarray, image: np.ndarray, dataset: Dataset, padding: int, cutout: int) -> Found:
    """The only flip and crop that give this image, up to a square of zeros."""
    scaled = (image / 255.0 - dataset.mean[0]) / dataset.std[0]
    edge = -dataset.mean[0] / dataset.std[0]
    answers = []
    for flip, y, x in itertools.product((False, True), range(2 * padding + 1), range(2 * padding + 1)):
        padded = np.pad(scaled[:, ::-1] if flip else scaled, padding, constant_values=edge)
        crop = padded[y : y + SIZE[0], x : x + SIZE[1]]
        hole = ~np.isclose(out, crop, atol=1e-5)
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        square = hole[np.ix_(rows, columns)].all() and max(len(rows), len(columns)) <= cutout
        if square and np.all(out[hole] == 0.0):
            answers.append(Found(flip, (y, x), int(hole.sum())))
    assert len(answers) == 1, answers
    return answers[0]


def _explain_all(half: Half, dataset: Dataset, padding: int, cutout: int) -> list[Found]:
    np.testing.assert_array_equal(half.labels, dataset.train_labels[half.order])
    pairs = zip(half.images.reshape(-1, *SIZE), dataset.train_images[half.order].reshape(-1, *SIZE), strict=True)
    return [_explain(out, image, dataset, padding, cutout) for out, image in pairs]


def test_crop_flip_and_cutout_reach_both_halves_with_draws_of_their_own(dataset, monkeypatch):
    flags = {"data__crop_padding": 2, "data__flip": True, "data__cutout": 3}
    seen = _dispatch(dataset, monkeypatch, **flags)
    assert len({*seen.train.keys, *seen.val.keys, *seen.keys}) == 3 * STEPS  # no draw shares a key with another
    train, val = (_explain_all(half, dataset, 2, 3) for half in (seen.train, seen.val))
    for found in (train, val):
        assert {one.flip for one in found} == {False, True}
        assert len({one.crop for one in found}) > 10  # of 25; 40 uniform draws give 20 on average
        assert {one.hole for one in found} >= {9, 6} and min(one.hole for one in found) >= 4
    # Equal draws of two halves or two steps agree everywhere; independent ones in 1 of 50 places.
    assert sum(a[:2] == b[:2] for a, b in zip(train, val, strict=True)) < 10
    steps = [train[i * BATCH : (i + 1) * BATCH] for i in range(STEPS)]
    assert all(sum(a[:2] == b[:2] for a, b in zip(*pair, strict=True)) < 4 for pair in itertools.combinations(steps, 2))


@pytest.mark.parametrize(
    ("flags", "padding", "cutout", "flips"),
    [
        ({"data__crop_padding": 0, "data__flip": False, "data__cutout": 0}, 0, 0, {False}),
        ({"data__crop_padding": 0, "data__flip": True, "data__cutout": 0}, 0, 0, {False, True}),
        ({"data__crop_padding": 1, "data__flip": False, "data__cutout": 0}, 1, 0, {False}),
        ({"data__crop_padding": 0, "data__flip": False, "data__cutout": 2}, 0, 2, {False}),
    ],
)
def test_each_setting_does_its_own_part(dataset, monkeypatch, flags, padding, cutout, flips):
    seen = _dispatch(dataset, monkeypatch, **flags)
    for half in (seen.train, seen.val):
        found = _explain_all(half, dataset, padding, cutout)
        assert {one.flip for one in found} == flips
        assert len({one.crop for one in found}) >= (7 if padding else 1)  # 40 draws of 9 places, or of one
        assert (max(one.hole for one in found) > 0) == (cutout > 0)


def test_another_seed_draws_otherwise(dataset, monkeypatch):
    flags = {"data__crop_padding": 2, "data__flip": True}
    one, same, other = (_dispatch(dataset, monkeypatch, seed, **flags).train.images for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.mean(one == other) < 0.5
