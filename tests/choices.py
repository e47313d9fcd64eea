"""Cells as choices, by brute force: all of a space, and the probabilities with which a policy draws them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np

from prdarts_jax.config.search import OPS
from prdarts_jax.space.spec import Space

SPACE = Space(nodes=2, ops=("none", "skip_connect", "sep_conv_3x3"))
_LISTS = (("skip_connect",), ("none",), OPS, ("sep_conv_3x3", "skip_connect", "none"), ("dil_conv_5x5",))
RESTRICTED = Space(nodes=2, edge_ops=(_LISTS, _LISTS[::-1]))


def every_cell(space: Space, kind: str) -> list[tuple[int, ...]]:
    """All choices of one cell type, by brute force over all assignments of an operation or nothing to each edge."""
    none, edges = space.ops.index("none") if "none" in space.ops else -1, range(space.num_edges)
    may = [[o for o in range(space.num_ops) if o != none and space.allowed[kind][e, o]] for e in edges]
    found = []
    for choice in itertools.product(*([*ops, space.num_ops] for ops in may)):
        used = [e for e in edges if choice[e] < space.num_ops]
        counts = [sum(space.edges[e][1] == node for e in used) for node in range(2, 2 + space.nodes)]
        most = [
            min(2, sum(bool(may[e]) for e in edges if space.edges[e][1] == node)) for node in range(2, 2 + space.nodes)
        ]
        if counts == most:
            found.append(choice)
    return found


def frequencies(choices: np.ndarray, kind: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(row.tolist()) for row in choices[:, kind])


def logits_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, SPACE.num_edges)), rng.normal(size=(2, SPACE.num_edges, SPACE.num_ops))


def probability_of(choice: np.ndarray, edges: Any, ops: Any, xp: Any = np) -> Any:
    """pi(c), both orders of the inputs of a node added up; by the formula of drawing without replacement."""
    total = 1.0
    for kind, node in itertools.product(range(2), range(2, 2 + SPACE.nodes)):
        into = [e for e, (_, target) in enumerate(SPACE.edges) if target == node]
        used = [e for e in into if choice[kind, e] < SPACE.num_ops]
        weights = {e: xp.exp(edges[kind, e]) for e in into}
        both = 0.0
        for a, b in itertools.permutations(used):
            both = both + weights[a] / sum(weights.values()) * weights[b] / (sum(weights.values()) - weights[a])
        total = total * both
        for e in used:
            scores = xp.exp(ops[kind, e, 1:])  # `none` is first
            total = total * scores[choice[kind, e] - 1] / xp.sum(scores)
    return total
