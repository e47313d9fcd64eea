"""After PNAS: cells grow node by node; a surrogate, fitted to what was judged, says which larger ones are judged next.

    size 1: one node of the normal cell;  size 2: one of the reduction cell as well;  ... size 2N: whole cells
    candidates of a size = every node that can be added to one of the best `beam` cells of the size before
    judged = those with the highest predicted worth, and some at random

Liu, Zoph, Neumann, Shlens, Hua, Li, Fei-Fei, Yuille, Huang, Murphy: Progressive Neural Architecture Search, ECCV 2018.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.config.schema import require
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import cells as choices
from prdarts_jax.strategies.gradient_free import Proposed, Round, check_counts, gradient_free
from prdarts_jax.strategy import Memory, Strategy

HIDDEN, RIDGE = 64, 1e-2  # of a surrogate's networks


def pnas(
    *,
    space: Space,
    cells: int = 20,
    beam: int = 8,
    explore: float = 0.25,
    members: int = 5,
    history: int = 256,
    warm_up: float = 0.25,
    batches: int = 0,
) -> Strategy:
    """The shared weights are trained on whole cells and on cells of the size of now, half of the steps each.

    The rounds are shared out among the sizes, so that a size may have several, each with the surrogate fitted anew; or
    a round several sizes, where there are fewer epochs. (Published: every judged cell is trained by itself, 256 a size,
    one surrogate a size, of LSTMs or perceptrons; one structure for both cell types; all cells of the first size are
    judged. Here the normal and the reduction cell grow in turn, `cells` cells are judged in a round, and the surrogate
    is `predicted`.)

    Args:
      space: the search space.
      cells: judged in a round, of one size.
      beam: cells of a size that are extended.
      explore: share of the judged cells that is drawn at random from the candidates.
      members: networks of the surrogate.
      history: judged cells that it is fitted to, the newest.
      warm_up: share of the epochs before the first round.
      batches: of validation images in a judgement; 0: all.

    Raises:
      UserError: a value that is not possible.

    >>> sorted(pnas(space=Space(nodes=1)).memory)
    ['beam', 'cells', 'count', 'size', 'worth']
    """
    check_counts(cells=cells, beam=beam, members=members, history=history)
    require(0 <= explore <= 1, "method.options.explore", explore, "in [0, 1]")
    require(history >= cells, "method.options.history", history, f">= cells ({cells})")
    blocks = choices.blocks(space)
    sizes, shape = len(blocks), (len(CELL_TYPES), space.num_edges)
    block_of = np.full(shape, sizes)
    for number, (kind, edges) in enumerate(blocks):
        block_of[kind, list(edges)] = number

    def grown(rows: np.ndarray) -> np.ndarray:
        """The size of each cell."""
        used = np.where(rows < space.num_ops, block_of, -1)
        return used.max(axis=(1, 2), initial=-1) + 1

    def propose(now: Round) -> Proposed:
        seen, worth, parents = (np.array(now.memory[name]) for name in ("cells", "worth", "beam"))
        count, rated = int(now.memory["count"]), list[tuple[float, np.ndarray]]()

        def leading(size: int) -> np.ndarray:
            """The best judged cells of a size, as many as the beam holds; the parents where there is none."""
            rows = np.flatnonzero(grown(seen[:count]) == size)
            order = rows[np.argsort(-worth[rows], kind="stable")]
            return np.resize(seen[order[:beam]], parents.shape) if len(rows) else parents

        for size in sizes_of(now.number, now.rounds, sizes):
            if grown(parents)[0] != size - 1:
                parents = leading(size - 1)
            known = {row.tobytes() for row in seen}
            fresh = [row for row in extended(parents, size - 1, space) if row.tobytes() not in known]
            guess = predicted(now.rng, seen[:count], worth[:count], np.array(fresh).reshape(-1, *shape), members, space)
            order, number = np.argsort(-guess, kind="stable"), min(cells, len(fresh))
            certain = number - round(explore * number)
            for i in [*order[:certain], *now.rng.permutation(order[certain:])[: number - certain]]:
                value, place = now.worth(fresh[i]), count % history
                seen[place], worth[place], count = fresh[i], value, count + 1
                if size == sizes:
                    rated.append((value, fresh[i]))
        trained = sizes_of(now.number + 1, now.rounds, sizes)[0]
        memory = {"cells": seen, "worth": worth, "beam": parents, "count": np.int32(count), "size": np.int32(trained)}
        return Proposed(memory, rated, choices.shares(leading(size), space))

    def sample(key: jax.Array, memory: Memory) -> jax.Array:
        cell_key, cut_key = jax.random.split(key)
        cut = jnp.where(jax.random.bernoulli(cut_key), memory["size"], sizes)
        return jnp.where(block_of < cut, choices.uniform(cell_key, space), space.num_ops)

    memory = {
        "cells": np.full((history, *shape), space.num_ops, np.int32),
        "worth": np.zeros(history, np.float32),
        "beam": np.full((beam, *shape), space.num_ops, np.int32),
        "count": np.int32(0),
        "size": np.int32(1),
    }
    return gradient_free(space=space, propose=propose, memory=memory, warm_up=warm_up, batches=batches, sample=sample)


def sizes_of(number: int, rounds: int, sizes: int) -> range:
    """The sizes that a round judges, numbers and rounds shared out evenly; of later rounds the last size.

    >>> [list(sizes_of(n, 6, 4)) for n in range(6)], [list(sizes_of(n, 2, 4)) for n in range(2)]
    ([[1], [2], [2], [3], [4], [4]], [[1, 2], [3, 4]])
    """
    before, last = (min(math.ceil(n * sizes / rounds), sizes) for n in (number, number + 1))
    return range(min(before + 1, last), last + 1)


def extended(parents: np.ndarray, block: int, space: Space) -> list[np.ndarray]:
    """Every cell that has one node more than one of these: two of its inputs, each with an operation.

    Args:
      parents: int32[n,2,E]; equal ones count once.
      block: number of the node, see `cells.blocks`.
      space: the search space.

    >>> one = Space(nodes=1, ops=("none", "skip_connect", "sep_conv_3x3"))
    >>> len(extended(np.full((4, 2, 2), 3, np.int32), 0, one))
    4
    """
    kind, edges = choices.blocks(space)[block]
    may = choices.usable(space)[kind]
    found = []
    for parent in np.unique(parents, axis=0):
        for inputs in itertools.combinations(edges, min(choices.PAIRS, len(edges))):
            for ops in itertools.product(*(np.flatnonzero(may[e]) for e in inputs)):
                child = parent.copy()
                child[kind, list(inputs)] = ops
                found.append(child)
    return found


def predicted(
    rng: np.random.Generator, seen: np.ndarray, worth: np.ndarray, fresh: np.ndarray, members: int, space: Space
) -> np.ndarray:
    """The worth of cells as an ensemble expects it, float64[m], up to its mean and scale.

    Each member is a network of one hidden layer that is drawn at random; its output layer, which sees the encoding
    too, is ridge regression on a bootstrap sample. The encoding has a column for each operation of each edge, and one
    for each operation of each cell type, so that something is known of an edge that no judged cell has used.

    Args:
      rng: of the hidden layers and the samples.
      seen: int32[n,2,E], the judged cells.
      worth: float32[n].
      fresh: int32[m,2,E].
      members: of the ensemble.
      space: the search space.
    """
    if len(seen) < 2 or not len(fresh):
        return np.zeros(len(fresh))
    scale = float(worth.std()) or 1.0
    target, known, asked = (worth - worth.mean()) / scale, _encoded(seen, space), _encoded(fresh, space)
    total = np.zeros(len(fresh))
    for _ in range(members):
        rows = rng.integers(len(seen), size=len(seen))
        matrix, offset = rng.normal(size=(known.shape[1], HIDDEN)) / 2, rng.normal(size=HIDDEN)
        inputs, outputs = (
            np.concatenate([x, np.tanh(x @ matrix + offset), np.ones((len(x), 1))], axis=1) for x in (known, asked)
        )
        inputs = inputs[rows]
        gram = inputs.T @ inputs + RIDGE * len(rows) * np.eye(inputs.shape[1])
        total += outputs @ np.linalg.solve(gram, inputs.T @ target[rows])
    return total / members


def _encoded(rows: np.ndarray, space: Space) -> np.ndarray:
    table = (rows[..., None] == np.arange(space.num_ops)).astype(np.float64)
    return np.concatenate([table.reshape(len(rows), -1), table.sum(axis=2).reshape(len(rows), -1)], axis=1)
