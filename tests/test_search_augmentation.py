"""What reaches a step: the images of both halves, augmented as the config says, from draws of their own.

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

from prdarts_jax import bilevel, search_inputs, search_program
from prdarts_jax.data.sources import Dataset, from_arrays
from prdarts_jax.dispatch import Images

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


def _batches(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **flags: object):
    """(train, validation) images [S,B,H,W,C] of a dispatch in which both read the same images."""
    seen: list[tuple[np.ndarray, ...]] = []

    def make_search_step(**_: object):
        def step(state, batches, key, progress):  # type: ignore[no-untyped-def]
            jax.debug.callback(
                lambda *a: seen.append(tuple(map(np.asarray, a))), state.step, batches.train.images, batches.val.images
            )
            return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}

        return step

    monkeypatch.setattr(bilevel, "make_search_step", make_search_step)
    config = search_cases.config(**flags)
    with search_cases.standard_promotion():
        inputs = search_inputs.prepare(config, data=dataset)
        key, progress = jax.random.key(seed), inputs.problem.strategy.schedule(0, 1)
        carry = search_program.initial_carry(inputs.problem, inputs.mesh, key, progress, (*SIZE, 1))
        order = np.tile(np.arange(BATCH, dtype=np.int32), (STEPS, 1))
        program = search_program.make_dispatch(inputs.problem, inputs.mesh)
        data = Images(dataset.train_images, dataset.train_labels)
        positions = np.arange(BATCH, dtype=np.int32)
        orders = search_program.Orders(order, order)
        jax.block_until_ready(program(carry, STEPS, True, orders, positions, key, progress, data))
    jax.effects_barrier()
    assert sorted(int(step) for step, *_ in seen) == list(range(STEPS))
    seen.sort(key=lambda one: int(one[0]))
    return np.stack([train for _, train, _ in seen]), np.stack([val for *_, val in seen])


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


def _explain_all(outs: np.ndarray, dataset: Dataset, padding: int, cutout: int) -> list[Found]:
    return [
        _explain(out[i, :, :, 0], dataset.train_images[i, :, :, 0], dataset, padding, cutout)
        for out in outs
        for i in range(BATCH)
    ]


def test_crop_flip_and_cutout_reach_both_halves_with_draws_of_their_own(dataset, monkeypatch):
    flags = {"data__crop_padding": 2, "data__flip": True, "data__cutout": 3}
    train, val = (_explain_all(b, dataset, 2, 3) for b in _batches(dataset, monkeypatch, **flags))
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
    for batches in _batches(dataset, monkeypatch, **flags):
        found = _explain_all(batches, dataset, padding, cutout)
        assert {one.flip for one in found} == flips
        assert len({one.crop for one in found}) >= (7 if padding else 1)  # 40 draws of 9 places, or of one
        assert (max(one.hole for one in found) > 0) == (cutout > 0)


def test_another_seed_draws_otherwise(dataset, monkeypatch):
    flags = {"data__crop_padding": 2, "data__flip": True}
    one, same, other = (_batches(dataset, monkeypatch, seed, **flags)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.mean(one == other) < 0.5
