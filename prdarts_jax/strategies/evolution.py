"""Regularized evolution with shared weights: tournament, one mutation, the oldest dies.

    parent = the best of `tournament` members drawn with replacement;  child = parent with one pair changed
    the child takes the place of the oldest member, whatever that is worth

Real, Aggarwal, Huang, Le: Regularized Evolution for Image Classifier Architecture Search, AAAI 2019.
"""

from __future__ import annotations

import numpy as np

from prdarts_jax.config.schema import require
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import cells as choices
from prdarts_jax.strategies.gradient_free import Proposed, Round, check_counts, gradient_free
from prdarts_jax.strategy import Strategy


def evolution(
    *,
    space: Space,
    population: int = 100,
    tournament: int = 25,
    identity: float = 0.05,
    cells: int = 20,
    warm_up: float = 0.5,
    batches: int = 0,
) -> Strategy:
    """The weights are trained on cells drawn uniformly; a population of cells evolves on them.

    A member keeps the worth it was born with, though the weights move on: it dies by age. The champion, which need not
    live any more, is judged again after every epoch. (The published search trains every member by itself.)

    Args:
      space: the search space.
      population: members; until there are so many, random cells are born.
      tournament: members that are drawn for each birth.
      identity: probability that a child is its parent's double.
      cells: born, and judged, after an epoch.
      warm_up: share of the epochs of which none is born.
      batches: of validation images in a judgement; 0: all.

    Raises:
      UserError: a value that is not possible.

    >>> sorted(evolution(space=Space(nodes=1), population=3).memory)
    ['cells', 'count', 'worth']
    """
    check_counts(population=population, tournament=tournament, cells=cells)
    require(0 <= identity < 1, "method.options.identity", identity, "in [0, 1)")

    def propose(now: Round) -> Proposed:
        living, worth = np.array(now.memory["cells"]), np.array(now.memory["worth"])
        count, rated = int(now.memory["count"]), []
        for _ in range(cells):
            if count < population:
                child = choices.random(now.rng, space)
            else:
                drawn = now.rng.integers(population, size=tournament)
                child = choices.mutated(now.rng, living[max(drawn, key=lambda i: worth[i])], space, identity=identity)
            rated.append((now.worth(child), child))
            place = count % population  # of the oldest
            worth[place], living[place] = rated[-1]
            count += 1
        memory = {"cells": living, "worth": worth, "count": np.int32(count)}
        return Proposed(memory, rated, choices.shares(living[:count], space))

    memory = {
        "cells": np.full((population, len(CELL_TYPES), space.num_edges), space.num_ops, np.int32),
        "worth": np.zeros(population, np.float32),
        "count": np.int32(0),
    }
    return gradient_free(space=space, propose=propose, memory=memory, warm_up=warm_up, batches=batches)
