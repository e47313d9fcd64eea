"""Order of the examples: what a search may and may not see, and when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prdarts_jax.data import batches
from prdarts_jax.data.batches import (
    check_batch,
    epoch_order,
    hold_out,
    padded_batches,
    process_slice,
    split_indices,
    stream_order,
)
from prdarts_jax.errors import UserError


@pytest.mark.parametrize("n", [2, 7, 100, 1437])
def test_halves_are_disjoint_and_equal(n):
    train, val = split_indices(n, seed=1)
    assert len(train) == len(val) == n // 2
    assert train.dtype == val.dtype == np.int32
    both = np.concatenate([train, val])
    assert len(set(both.tolist())) == len(both) and both.min() >= 0 and both.max() < n


@pytest.mark.parametrize(
    ("n", "shares", "sizes"),
    [(10, (0.9, 0.1), (9, 1)), (100, (0.29, 0.71), (29, 71)), (9, (0.8, 0.2), (7, 1)), (40, (0.1, 0.025), (4, 1))],
)
def test_sizes_of_an_uneven_split(n, shares, sizes):
    train, val = split_indices(n, 0, shares=shares)
    assert (len(train), len(val)) == sizes and not set(train.tolist()) & set(val.tolist())


def test_one_set_for_both_is_a_permutation_of_all():
    train, val = split_indices(20, 0, shares=None)
    np.testing.assert_array_equal(train, val)
    assert sorted(train.tolist()) == list(range(20)) != train.tolist()


def test_split_is_a_seeded_permutation():
    np.testing.assert_array_equal(split_indices(50, 3)[0], split_indices(50, 3)[0])
    assert not np.array_equal(split_indices(50, 3)[0], split_indices(50, 4)[0])
    # Not the first half in order: over many seeds each example is as often in one half as in the other.
    share = np.mean([np.bincount(split_indices(20, s)[0], minlength=20) for s in range(400)], 0)
    assert np.abs(share - 0.5).max() < 4 * 0.5 / 400**0.5


@pytest.mark.parametrize(
    ("n", "shares"),
    [(1, (0.5, 0.5)), (10, (0.0, 0.5)), (10, (0.6, 0.6)), (10, (0.05, 0.5)), (10, (float("nan"), 0.5)), (10, (0.5,))],
)
def test_impossible_splits(n, shares):
    with pytest.raises(UserError, match=r"data.split: .*allowed:"):
        split_indices(n, 0, shares=shares)


@pytest.mark.parametrize(("holdout", "count"), [(0.0, 0), (0.1, 10), (0.29, 29), (1, 1), (37, 37)])
def test_images_that_are_held_out(holdout, count):
    kept, held = hold_out(100, holdout, seed=3)
    assert len(held) == count and kept.dtype == held.dtype == np.int32
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(100))
    assert kept.tolist() == sorted(kept.tolist()) and held.tolist() == sorted(held.tolist())


def test_the_choice_of_what_is_held_out_is_a_seeded_permutation():
    assert hold_out(100, 10, seed=0)[1].tolist() == hold_out(100, 0.1, seed=0)[1].tolist()
    assert hold_out(100, 10, seed=0)[1].tolist() != hold_out(100, 10, seed=1)[1].tolist()
    share = np.mean([np.bincount(hold_out(20, 5, s)[1], minlength=20) for s in range(400)], 0)
    assert np.abs(share - 0.25).max() < 4 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize(("n", "holdout"), [(10, 10), (10, 11), (10, 0.01)])
def test_what_cannot_be_held_out(n, holdout):
    with pytest.raises(UserError, match=r"data.holdout: .* allowed: 1..9 of them"):
        hold_out(n, holdout, seed=0)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_passes_of_a_stream_do_not_end_with_an_epoch(steps):
    """Three batches a pass, in epochs that are shorter, as long and longer."""
    indices = np.arange(100, 113)
    epochs = [stream_order(indices, 4, 1, epoch, "val", steps) for epoch in range(6)]
    assert all(epoch.shape == (steps, 4) for epoch in epochs)
    stream = np.concatenate(epochs)
    for one in range(len(stream) // 3):
        np.testing.assert_array_equal(stream[3 * one : 3 * one + 3], epoch_order(indices, 4, 1, one, "val"))


def test_an_epoch_is_a_permutation_without_replacement_and_drops_the_remainder():
    indices = np.arange(100, 123)
    order = epoch_order(indices, 5, seed=0, epoch=0, purpose="train")
    assert order.shape == (4, 5) and order.dtype == np.int32
    seen = order.ravel().tolist()
    assert len(set(seen)) == 20 and set(seen) <= set(indices.tolist())
    assert seen != sorted(seen)


def test_order_depends_on_seed_epoch_and_purpose_and_nothing_else():
    indices = np.arange(40)
    reference = epoch_order(indices, 8, 1, 2, "train")
    np.random.default_rng().random(7)  # no hidden state
    np.testing.assert_array_equal(epoch_order(indices, 8, 1, 2, "train"), reference)
    for other in ((2, 2, "train"), (1, 3, "train"), (1, 2, "val"), (2, 1, "train")):
        assert not np.array_equal(epoch_order(indices, 8, *other), reference), other
    # The batch size cuts the same permutation elsewhere.
    np.testing.assert_array_equal(epoch_order(indices, 4, 1, 2, "train").ravel(), reference.ravel())


def test_over_the_epochs_every_example_is_seen_equally_often():
    counts = sum(np.bincount(epoch_order(np.arange(11), 5, 0, e, "train").ravel(), minlength=11) for e in range(1100))
    expected, spread = 1000, (1100 * 10 / 11 * 1 / 11) ** 0.5
    assert np.abs(counts - expected).max() < 4.5 * spread


def test_order_is_the_same_in_another_process():
    call = "epoch_order(np.arange(9), 3, 1, 2, 'val')"
    code = f"import numpy as np; from prdarts_jax.data.batches import epoch_order; print({call}.tolist())"
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(epoch_order(np.arange(9), 3, 1, 2, "val").tolist())


def test_negative_seed():
    with pytest.raises(UserError, match="seed: -1 is negative; allowed:"):
        epoch_order(np.arange(4), 2, -1, 0, "train")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_process_slices_side_by_side_are_the_global_batches(count):
    order = epoch_order(np.arange(30), 8, 0, 0, "train")
    parts = [process_slice(order, p, count) for p in range(count)]
    assert all(p.shape == (3, 8 // count) for p in parts)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), order)


@pytest.mark.parametrize(
    ("index", "count", "word"), [(0, 3, "batch_size: 8"), (2, 2, "process_index: 2"), (-1, 2, "-1")]
)
def test_impossible_slices(index, count, word):
    with pytest.raises(UserError, match=f"{word}.*allowed:"):
        process_slice(np.zeros((2, 8), np.int32), index, count)


@pytest.mark.parametrize(
    ("batch_size", "examples", "devices", "words"),
    [
        (0, 10, 1, "batch_size: 0 is too small"),
        (11, 10, 1, "batch_size: 11 is larger than the 10 examples; allowed: 1..10"),
        (6, 10, 4, "batch_size: 6 is not divisible by 4 devices; allowed: a multiple of 4"),
    ],
)
def test_check_batch(batch_size, examples, devices, words):
    with pytest.raises(UserError) as caught:
        check_batch(batch_size, examples, devices)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    check_batch(8, 8, 4)
    if devices == 1:
        with pytest.raises(UserError):
            epoch_order(np.arange(examples), batch_size, 0, 0, "train")


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (7, 3), (8, 4), (5, 12), (360, 128)])
def test_padded_batches_count_every_example_once(n, batch_size):
    indices, mask = padded_batches(n, batch_size)
    assert indices.shape == mask.shape == (-(-n // batch_size), batch_size)
    assert indices.dtype == np.int32 and mask.dtype == bool
    assert indices[mask].tolist() == list(range(n))
    assert indices.min() >= 0 and indices.max() < n
    if n > 0 and (~mask).any():
        assert indices[~mask].tolist() == [i % n for i in range((~mask).sum())]


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (4, 0)])
def test_impossible_padding(n, batch_size):
    with pytest.raises(UserError, match="allowed:"):
        padded_batches(n, batch_size)


def test_module_needs_numpy_only():
    assert not {"jax", "jnp"} & set(vars(batches))
