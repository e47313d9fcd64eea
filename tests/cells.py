"""Small cells and their two programs: executed operations only, and all of them with plain autodiff."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from prdarts_jax.gates import Gates
from prdarts_jax.ops.lowering import ANYWHERE, Lowering
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.spec import Space

CHANNELS = 4
ALL_OPS = Space(nodes=1)
# Edges with one, two and three operations, in another order of edges for the reduction cell; not all of them on every
# edge, since the unrolled reference takes as long to compile as they are many.
_ALL = ("none", "skip_connect", "sep_conv_3x3")
_SKIP, _SEP, _TWO = _ALL[1:2], _ALL[2:], (_ALL[0], _ALL[2])
_LISTS = (_SKIP, _ALL, _TWO, _SEP, _SKIP, _ALL[1:], _SKIP, _TWO, _ALL)
SPACES = {
    "two-nodes": Space(nodes=2, ops=("skip_connect", "dil_conv_3x3", "none")),
    "three-nodes": Space(nodes=3, ops=_ALL, edge_ops=(_LISTS, _LISTS[::-1])),
    "no-pool-norm": Space(nodes=1, ops=("avg_pool_3x3", "max_pool_3x3"), pool_norm=False),
}


def cell_data(
    space: Space,
    kind: str,
    size: tuple[int, int],
    dtype: Any = np.float64,
    *,
    batch: int = 2,
    channels: int = CHANNELS,
) -> tuple[Any, ...]:
    """Weights, the inputs, gates [E,O] of both signs, a cotangent of the nodes."""
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda a: jnp.asarray(a, dtype), oracles.drawn(declare_edges(space, kind, channels)))
    out = tuple(-(-n // 2) for n in size) if kind == "reduce" else size
    shapes = [(batch, *size, channels)] * 2 + [(space.num_edges, space.num_ops), (space.nodes, batch, *out, channels)]
    return weights, *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def random_terms(space: Space, kind: str, k: int, seed: int, *, void: int = 0) -> np.ndarray:
    """k random allowed operations an edge (void where there are fewer), then `void` more terms emptied."""
    rng = np.random.default_rng(seed)
    chosen = np.full((space.num_edges, k), space.num_ops, np.int32)
    for e in range(space.num_edges):
        allowed = rng.permutation(np.flatnonzero(space.allowed[kind][e]))[:k]
        chosen[e, : len(allowed)] = allowed
    for _ in range(void):
        chosen[rng.integers(space.num_edges), rng.integers(k)] = space.num_ops
    return chosen


@cache
def sparse(space: Space, kind: str, lowering: Lowering = ANYWHERE) -> Any:
    """Compiled once a space, kind, lowering and K: nodes and gradients in weights, gates [E,O] and inputs."""

    @oracles.quick_jit
    def run(weights: Any, s0: jax.Array, s1: jax.Array, ops: jax.Array, ct: jax.Array, executed: jax.Array) -> Any:
        def nodes(weights: Any, ops: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
            values, terms = Gates({kind: ops}, {kind: executed}).terms(kind)
            return mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind, lowering=lowering)

        y, pull = jax.vjp(nodes, weights, ops, s0, s1)
        return y, pull(ct)

    return run


@cache
def dense_reference(space: Space, kind: str) -> Any:
    @oracles.quick_jit
    def run(weights: Any, s0: jax.Array, s1: jax.Array, ops: jax.Array, ct: jax.Array, executed: jax.Array) -> Any:
        def nodes(weights: Any, ops: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
            dense = Gates({kind: ops}, {kind: executed}).dense(kind)
            return mixed_nodes_reference(weights, dense, s0, s1, space=space, kind=kind)

        y, pull = jax.vjp(nodes, weights, ops, s0, s1)
        return y, pull(ct)

    return run
