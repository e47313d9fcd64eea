"""Which examples form which global batch: numpy index arithmetic from (seed, epoch, purpose) alone.

A run on several processes computes the same global order everywhere and reads its own columns of it, so the content of
a batch depends on neither the number of devices nor that of processes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prdarts_jax.errors import UserError

if TYPE_CHECKING:
    import jax


def _rng(seed: int, *words: int | str) -> np.random.Generator:
    if seed < 0:
        raise UserError(f"seed: {seed} is negative; allowed: an integer >= 0")
    # crc32 and not hash(): the latter differs from one Python process to the next.
    numbers = [zlib.crc32(word.encode()) if isinstance(word, str) else word for word in words]
    return np.random.default_rng(np.random.SeedSequence([seed, *numbers]))


def stream_of(seed: int, epoch: int, purpose: str, place: int) -> np.random.Generator:
    """The random numbers of one image, from (seed, epoch, place in the epoch's global order) and a purpose alone.

    >>> float(stream_of(0, 0, "transform", 3).random()) == float(stream_of(0, 0, "transform", 3).random())
    True
    """
    return _rng(seed, epoch, purpose, place)


def split_indices(n: int, seed: int, *, shares: Sequence[float] | None = (0.5, 0.5)) -> tuple[np.ndarray, np.ndarray]:
    """The examples of the weights and of the architecture: one seeded permutation, cut once, or all of it twice.

    train = pi[: floor(n a)], val = the floor(n b) that follow; at a = b = 1/2 both have floor(n/2) examples.

    Args:
        n: number of training images.
        seed: seed of the run.
        shares: (a, b), positive, of sum at most 1; None: both are the whole permutation.

    Returns:
        train and val, int32, in the order of the permutation.

    Raises:
        UserError: shares that are not possible, or a part without examples.

    >>> train, val = split_indices(7, seed=0)
    >>> len(train), len(val), len({*train.tolist(), *val.tolist()})
    (3, 3, 6)
    """
    order = _rng(seed, "split").permutation(n).astype(np.int32)
    if shares is None:
        return order, order
    shown = ",".join(map(str, shares))
    if len(shares) != 2 or not all(share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise UserError(f"data.split: {shown!r} is not possible; allowed: two shares > 0 of sum <= 1")
    # 100 * 0.29 is 28.999999999999996 in floating point; the slack makes it the 29 that is meant.
    train, val = (int(n * share + 1e-9) for share in shares)
    if train < 1 or val < 1:
        raise UserError(
            f"data.split: {shown!r} of {n} images leaves {train} for the weights and {val} for the architecture; "
            "allowed: at least one each"
        )
    return order[:train], order[train : train + val]


def hold_out(n: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): the training images that a run may see, and those that it never sees, in ascending order.

    Args:
        n: number of training images.
        holdout: the share of them that is held out, below 1, or from 1 on how many; 0 = none.
        seed: of the choice, apart from the seed of a run: runs of any seed hold out the same images.

    Returns:
        int32 each; together they are 0..n-1.

    Raises:
        UserError: no image would be held out, or none be left.

    >>> [len(part) for part in hold_out(50, 0.1, seed=0)], [len(part) for part in hold_out(50, 7, seed=0)]
    ([45, 5], [43, 7])
    """
    count = int(holdout if holdout >= 1 else n * holdout + 1e-9)
    if holdout and not 0 < count < n:
        raise UserError(f"data.holdout: {holdout:g} of {n} images holds out {count}; allowed: 1..{n - 1} of them")
    order = np.arange(n) if count == 0 else _rng(seed, "holdout").permutation(n)
    return np.sort(order[count:]).astype(np.int32), np.sort(order[:count]).astype(np.int32)


def epoch_order(indices: np.ndarray, batch_size: int, seed: int, epoch: int, purpose: str) -> np.ndarray:
    """The global batches of one epoch: `indices` shuffled anew, without replacement, the remainder left out.

    Args:
        indices: int [n], the examples to draw from.
        batch_size: B, global.
        seed: seed of the run.
        epoch: counted from 0.
        purpose: names the stream ("train", "val"): two purposes are shuffled independently.

    Returns:
        int32 [floor(n / B), B].

    Raises:
        UserError: a batch size below 1 or above n, or a negative seed.

    >>> epoch_order(np.arange(5), 2, seed=0, epoch=0, purpose="train").shape
    (2, 2)
    """
    check_batch(batch_size, len(indices), 1)
    steps = len(indices) // batch_size
    order = _rng(seed, epoch, purpose).permutation(np.asarray(indices, np.int32))
    return order[: steps * batch_size].reshape(steps, batch_size)


def held_out_digest(n: int, holdout: float, seed: int) -> dict[str, str]:
    """{"data.holdout": SHA-256 of the indices that `hold_out` leaves out}; empty where it leaves out none.

    >>> held_out_digest(50, 0.0, seed=0), len(held_out_digest(50, 5, seed=0)["data.holdout"])
    ({}, 64)
    """
    held = hold_out(n, holdout, seed)[1]
    return {"data.holdout": hashlib.sha256(held.astype("<i4").tobytes()).hexdigest()} if len(held) else {}


def stream_order(indices: np.ndarray, batch_size: int, seed: int, epoch: int, purpose: str, steps: int) -> np.ndarray:
    """The global batches of an epoch of so many steps, from passes over `indices` that follow one another.

    Batch s of the whole run is batch s mod T of pass s // T, T = floor(n / B): where an epoch ends, a pass goes on in
    the next one, so every example is met once a pass. With T steps an epoch it is `epoch_order`.

    Args:
        indices, batch_size, seed, epoch, purpose: as in `epoch_order`.
        steps: S, of every epoch.

    Returns:
        int32 [S, B].

    >>> stream_order(np.arange(5), 2, seed=0, epoch=1, purpose="val", steps=3).shape
    (3, 2)
    """
    check_batch(batch_size, len(indices), 1)
    own, first = len(indices) // batch_size, epoch * steps
    passes = range(first // own, -(-(first + steps) // own))
    rows = np.concatenate([epoch_order(indices, batch_size, seed, one, purpose) for one in passes])
    return rows[first % own :][:steps]


def process_slice(order: np.ndarray, process_index: int, process_count: int) -> np.ndarray:
    """One process's columns of every global batch; process p holds positions p B/P .. (p+1) B/P - 1.

    Args:
        order: [steps, B], the same on every process.
        process_index: p, 0..P-1.
        process_count: P.

    Returns:
        [steps, B/P].

    Raises:
        UserError: B not divisible by P, or p out of range.

    >>> process_slice(np.arange(8).reshape(2, 4), 1, 2).tolist()
    [[2, 3], [6, 7]]
    """
    batch_size = order.shape[1]
    if process_count < 1 or not 0 <= process_index < process_count:
        raise UserError(f"process_index: {process_index} of {process_count} processes; allowed: 0 <= index < count")
    if batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} is not divisible by {process_count} processes; allowed: a multiple")
    share = batch_size // process_count
    return order[:, process_index * share : (process_index + 1) * share]


def check_batch(batch_size: int, examples: int, devices: int) -> None:
    """Refuses a global batch that the data cannot fill or the devices cannot share.

    Args:
        batch_size: global.
        examples: examples to draw from (in a search, those of the smaller part).
        devices: number of devices over all processes.

    Raises:
        UserError: one line.

    >>> check_batch(6, 100, 4)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: batch_size: 6 is not divisible by 4 devices; allowed: a multiple of 4
    """
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is too small; allowed: an integer >= 1")
    if batch_size > examples:
        raise UserError(f"batch_size: {batch_size} is larger than the {examples} examples; allowed: 1..{examples}")
    if batch_size % devices:
        allowed = f"a multiple of {devices}"
        raise UserError(f"batch_size: {batch_size} is not divisible by {devices} devices; allowed: {allowed}")


def padded_batches(n: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches of one fixed shape that count every example exactly once.

    The last batch is filled up with examples from the front (real images, so that nothing unusual passes through the
    network) whose mask is False.

    Args:
        n: number of examples.
        batch_size: B; may exceed n.

    Returns:
        indices int32 [ceil(n / B), B] and mask bool of the same shape.

    Raises:
        UserError: no examples, or a batch size below 1.

    >>> indices, mask = padded_batches(3, 2)
    >>> indices.tolist(), mask.tolist()
    ([[0, 1], [2, 0]], [[True, True], [True, False]])
    """
    if n < 1:
        raise UserError(f"examples: {n} is too few to evaluate; allowed: at least 1")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is too small; allowed: an integer >= 1")
    steps = -(-n // batch_size)
    flat = np.arange(steps * batch_size)
    shape = (steps, batch_size)
    return (flat % n).astype(np.int32).reshape(shape), (flat < n).reshape(shape)


class Batch(NamedTuple):
    """One batch, as the network sees it."""

    images: jax.Array  # [B,H,W,C], normalised, compute dtype
    labels: jax.Array  # int32[B]


class Images(NamedTuple):
    """Images as they are stored, of a batch or of a whole set: arrays of numpy, or on the devices."""

    images: Any  # uint8[N,H,W,C]
    labels: Any  # int32[N]
