"""A cell as a choice an edge: what searches without gradients draw, change and evaluate.

A choice is int32[2,E], a row a cell type: the operation of each edge, or O where the edge is not used. A node has two
distinct inputs with an operation each, as a derived cell has; fewer where fewer edges may have an operation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import gates as gating
from prdarts_jax.gates import Gates
from prdarts_jax.space.spec import CELL_TYPES, Space

PAIRS = 2  # inputs of a node


def usable(space: Space) -> np.ndarray:
    """bool[2,E,O]: the operations that an edge may have in a derived cell, `none` left out."""
    return np.stack([space.allowed[kind] & ~space.group("none")[None, :] for kind in CELL_TYPES])


@functools.cache
def blocks(space: Space) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(cell type, edges that may be used) of every node that has some, as a cell grows: normal, reduce, normal...

    >>> blocks(Space(nodes=2))
    ((0, (0, 1)), (1, (0, 1)), (0, (2, 3, 4)), (1, (2, 3, 4)))
    """
    there, found = np.any(usable(space), axis=2), list[tuple[int, tuple[int, ...]]]()
    for node in range(2, 2 + space.nodes):
        for kind in range(len(CELL_TYPES)):
            edges = tuple(e for e, (_, target) in enumerate(space.edges) if target == node and there[kind, e])
            found += [(kind, edges)] if edges else []
    return tuple(found)


def best(edges: Any, ops: Any, space: Space) -> Any:
    """The choice of the largest scores: the two best edges of each node, and the best operation of each.

    Args:
      edges: float[2,E]; equal ones keep the order of edges.
      ops: float[2,E,O].
      space: the search space.

    Returns:
      int32[2,E], of numpy for arrays of numpy, of JAX for those of JAX.
    """
    xp: Any = jnp if isinstance(edges, jax.Array) else np
    may = usable(space)
    into = np.array([target for _, target in space.edges])
    scores = xp.where(may.any(axis=2), edges, -np.inf)
    # Of the edges into the same node those that are ahead of an edge: its rank.
    higher = scores[:, None, :] > scores[:, :, None]
    equal = (scores[:, None, :] == scores[:, :, None]) & np.tri(len(into), k=-1, dtype=bool)[None]
    ahead = ((higher | equal) & (into[None, :] == into[:, None])[None]).sum(axis=2)
    op = xp.argmax(xp.where(may, ops, -np.inf), axis=2)
    used = (ahead < PAIRS) & may.any(axis=2)
    return xp.where(used, op, space.num_ops).astype(np.int32)


def draw(key: jax.Array, edges: jax.Array, ops: jax.Array, space: Space) -> jax.Array:
    """A choice drawn from logits: inputs of a node one after the other from a softmax, each with an operation from one.

    Args:
      key: PRNG key.
      edges: float32[2,E]; zeros: uniform.
      ops: float32[2,E,O]; likewise.
      space: the search space.

    >>> shape = (2, Space(nodes=1).num_edges)
    >>> draw(jax.random.key(0), jnp.zeros(shape), jnp.zeros((*shape, 8)), Space(nodes=1)).shape
    (2, 2)
    """
    edge_key, op_key = jax.random.split(key)
    # The order of logits with Gumbel noise is that of drawing without replacement.
    return best(edges + gating.gumbel(edge_key, edges.shape), ops + gating.gumbel(op_key, ops.shape), space)


def uniform(key: jax.Array, space: Space) -> jax.Array:
    """A choice drawn uniformly, in a compiled step."""
    shape = (len(CELL_TYPES), space.num_edges)
    return draw(key, jnp.zeros(shape), jnp.zeros((*shape, space.num_ops)), space)


def random(rng: np.random.Generator, space: Space) -> np.ndarray:
    """A choice drawn uniformly, on the host.

    >>> random(np.random.default_rng(0), Space(nodes=1, ops=("none", "skip_connect"))).tolist()
    [[1, 1], [1, 1]]
    """
    shape = (len(CELL_TYPES), space.num_edges)
    return best(rng.random(shape), rng.random((*shape, space.num_ops)), space)


def gates(choice: Any, space: Space) -> Gates:
    """The gates of a choice: 1 for the operation of an edge that is used, which alone is executed.

    >>> made = gates(np.array([[1, 2], [0, 1]]), Space(nodes=1, ops=("skip_connect", "sep_conv_3x3")))
    >>> made.ops["normal"].tolist(), made.executed["normal"].tolist()
    ([[0.0, 1.0], [0.0, 0.0]], [[1], [2]])
    """
    xp: Any = jnp if isinstance(choice, jax.Array) else np
    columns = np.arange(space.num_ops)
    ops = {kind: (choice[i][:, None] == columns[None]).astype(np.float32) for i, kind in enumerate(CELL_TYPES)}
    executed = {kind: xp.asarray(choice[i][:, None], np.int32) for i, kind in enumerate(CELL_TYPES)}
    return Gates(ops, executed)


def of_table(tables: Mapping[str, Any]) -> np.ndarray:
    """The choice whose gates are these: the inverse of `gates(...).ops`.

    >>> of_table({kind: np.array([[0.0, 1.0], [0.0, 0.0]]) for kind in ("normal", "reduce")}).tolist()
    [[1, 2], [1, 2]]
    """
    stacked = np.stack([np.asarray(tables[kind]) for kind in CELL_TYPES])
    return np.where(stacked.any(axis=2), stacked.argmax(axis=2), stacked.shape[2]).astype(np.int32)


def shares(choices: Any, space: Space) -> dict[str, np.ndarray]:
    """The share of choices that use an operation on an edge, {"normal", "reduce"} -> float32[E,O].

    Args:
      choices: int32[n,2,E], n >= 1.
      space: the search space.
    """
    table = (np.asarray(choices)[..., None] == np.arange(space.num_ops)).mean(axis=0).astype(np.float32)
    return {kind: table[i] for i, kind in enumerate(CELL_TYPES)}


def even(space: Space) -> dict[str, np.ndarray]:
    """Equal shares of the operations that an edge may have."""
    may = usable(space).astype(np.float32)
    table = may / np.maximum(may.sum(axis=2, keepdims=True), 1)
    return {kind: table[i] for i, kind in enumerate(CELL_TYPES)}


def mutated(rng: np.random.Generator, choice: np.ndarray, space: Space, *, identity: float = 0.05) -> np.ndarray:
    """A choice with one change: another operation, or another input, of one pair; each half of the time.

    The pair is drawn uniformly from both cells. A change that no pair can have is replaced by the other kind. An
    operation goes with its pair to the new input, or is drawn anew where that edge may not have it.

    Args:
      rng: of the host.
      choice: int32[2,E].
      space: the search space.
      identity: probability of no change.
    """
    new, may = choice.copy(), usable(space)
    if rng.random() < identity:
        return new
    pairs = rng.permutation(np.argwhere(choice < space.num_ops))
    first = rng.random() < 0.5
    for of_input in (first, not first):
        for kind, e in pairs:
            if of_input:
                target = space.edges[e][1]
                free = [
                    other
                    for other, (_, into) in enumerate(space.edges)
                    if into == target and choice[kind, other] == space.num_ops and may[kind, other].any()
                ]
                if free:
                    to, op = rng.choice(free), choice[kind, e]
                    new[kind, e] = space.num_ops
                    new[kind, to] = op if may[kind, to, op] else rng.choice(np.flatnonzero(may[kind, to]))
                    return new
            else:
                others = np.flatnonzero(may[kind, e] & (np.arange(space.num_ops) != choice[kind, e]))
                if len(others):
                    new[kind, e] = rng.choice(others)
                    return new
    return new
