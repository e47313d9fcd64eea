"""Partial channels: of an edge's C channels the first C/K go through the mixed operation, the others pass it by.

    out = shuffle([sum_k g_k op_k(x[:C/K]), w x[C/K:]])        w: the multiplier of the edge, which is part of g too

A node is the sum of what its edges give. The shuffle is linear, so it is done once a node: of [sum of the mixed
operations, sum of what passes]. With stride 2 the passing channels go through a 2x2 max pool.

Source: Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search" (ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.ops.pools import max_pool_2x2
from prdarts_jax.space.noise import CellNoise
from prdarts_jax.space.spec import EdgeGroup, Space
from prdarts_jax.space.terms import rows_of


def head(space: Space, x: jax.Array) -> jax.Array:
    """The channels [..., C/K] that go through the mixed operation; all of them with K = 1."""
    return x if space.partial == 1 else x[..., : x.shape[-1] // space.partial]


def tail(space: Space, x: jax.Array) -> jax.Array:
    """The channels that pass it by."""
    return x[..., x.shape[-1] // space.partial :]


def passed(x: jax.Array, stride: int) -> jax.Array:
    """What the passing channels become on an edge, but for its multiplier."""
    return x if stride == 1 else max_pool_2x2(x)


def shuffled(space: Space, mixed: jax.Array, passing: jax.Array) -> jax.Array:
    """Channel i of group g of the K groups becomes channel i K + g.

    >>> shuffled(Space(partial=2), jnp.arange(2), jnp.arange(2, 4)).tolist()
    [0, 2, 1, 3]
    """
    x = jnp.concatenate([mixed, passing], axis=-1)
    return jnp.swapaxes(x.reshape(*x.shape[:-1], space.partial, -1), -1, -2).reshape(x.shape)


def unshuffled(space: Space, x: jax.Array) -> jax.Array:
    """The inverse, and so the transpose, of the permutation of `shuffled`.

    >>> unshuffled(Space(partial=2), jnp.asarray([0, 2, 1, 3])).tolist()
    [0, 1, 2, 3]
    """
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, space.partial), -1, -2).reshape(x.shape)


def factors_of(space: Space, edges: jax.Array | None, noise: CellNoise | None, like: jax.Array) -> jax.Array | None:
    """What the passing channels of each edge are multiplied by: [E,1], or [E,B] under drop-path; None with K = 1.

    Args:
      edges: [E], the multipliers of the edges; None: 1.
      like: whose dtype they have.
    """
    if space.partial == 1:
        return None
    factors = jnp.ones((space.num_edges, 1), like.dtype) if edges is None else edges[:, None].astype(like.dtype)
    return factors if noise is None or noise.edges is None else factors * noise.edges.astype(like.dtype)


def edge_table(space: Space, kind: str, group: EdgeGroup) -> np.ndarray:
    """int[targets, sources]: the edge of the group between two rows of the buffers of a cell; E where there is none."""
    source, target = rows_of(space, kind, group)
    sizes = (space.nodes + 2,) * 2 if kind == "normal" else (space.nodes, 2 if group.stride == 2 else space.nodes)
    table = np.full(sizes, space.num_edges)
    table[target, source] = group.edges
    return table


def tabled(factors: jax.Array, table: np.ndarray) -> jax.Array:
    """The factors of a table of edges: [*table.shape, 1 or B]; zeros where there is no edge."""
    return jnp.concatenate([factors, jnp.zeros_like(factors[:1])])[table]


def scaled(factor: jax.Array, x: jax.Array) -> jax.Array:
    """x [B,H,W,C] times one number [1], or one for each image [B]."""
    return factor.astype(x.dtype).reshape(-1, 1, 1, 1) * x


def weighted_sum(factors: jax.Array, rows: Iterable[jax.Array]) -> jax.Array:
    """sum_r factors[r] rows[r], in the order of the rows."""
    terms = [scaled(factors[r], x) for r, x in enumerate(rows)]
    return sum(terms[1:], terms[0])


def factor_cotangent(factors: jax.Array, ct: jax.Array, x: jax.Array) -> jax.Array:
    """Of one factor [1] or [B]: the inner product of what it multiplies and its cotangent, over all or by image."""
    by_image = jnp.sum(ct.astype(factors.dtype) * x.astype(factors.dtype), axis=(1, 2, 3))
    return by_image if factors.shape[-1] > 1 else jnp.sum(by_image, keepdims=True)
