"""Noise of the search network as an operand: cells compute their forward pass again, and draw the same masks then.

    drop_path     m op(x), m = 0 with probability p, else 1 / (1 - p), drawn for each image and edge
    dropout/OP    m * op(x), m drawn so for each element of what the operation OP makes

A mask depends on key, cell, edge, operation and the place of the image in the global batch alone: it is the same in
every lowering of the cell and on any number of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from prdarts_jax.errors import unknown
from prdarts_jax.ops.drop_path import drop_path_draws, dropout, kept
from prdarts_jax.space.spec import Space

DROP_PATH = "drop_path"
DROPOUT = "dropout/"
_EDGES, _OPERATIONS = range(2)  # purposes of the keys of a cell


class Noise(NamedTuple):
    """What a search step adds to the gates, see `supernet.apply`.

    Attributes:
      key: PRNG key, the same on all devices.
      positions: int32[B], of the images in the global batch.
      rates: {"drop_path", "dropout/<operation>"} -> a scalar array in [0, 1). The names are static, the rates are not.
    """

    key: jax.Array
    positions: jax.Array
    rates: Mapping[str, jax.Array]


class CellNoise(NamedTuple):
    """The noise of one cell."""

    key: jax.Array
    positions: jax.Array  # int32[B]
    edges: jax.Array | None  # float32[E,B]: what an edge's output is multiplied by, for each image
    rates: dict[str, jax.Array]  # of operations


def cell_noise(noise: Noise, space: Space, cell: int | jax.Array) -> CellNoise:
    """The noise of a cell of the network.

    Args:
      noise: of the step.
      space: static.
      cell: its place in the network.

    Raises:
      UserError: a rate that is neither drop-path's nor that of an operation of the space.

    >>> import jax.numpy as jnp
    >>> rates = {"drop_path": jnp.float32(0.5)}
    >>> cell_noise(Noise(jax.random.key(0), jnp.arange(3), rates), Space(), 0).edges.shape
    (14, 3)
    """
    names = [DROP_PATH, *(f"{DROPOUT}{op}" for op in space.ops)]
    for name in noise.rates:
        if name not in names:
            raise unknown("noise", name, names)
    key = jax.random.fold_in(noise.key, cell)
    rates = {name.removeprefix(DROPOUT): rate for name, rate in noise.rates.items() if name != DROP_PATH}
    edges = None
    if DROP_PATH in noise.rates:
        draws = drop_path_draws(jax.random.fold_in(key, _EDGES), noise.positions, (space.num_edges,))
        edges = kept(draws, noise.rates[DROP_PATH]).T
    return CellNoise(jax.random.fold_in(key, _OPERATIONS), noise.positions, edges, rates)


def reaches(space: Space, op: str, stride: int) -> bool:
    """Whether a dropout of an operation acts on edges of a stride: of a skip connection on the identity alone.

    With stride 2 a skip connection is a convolution and a normalisation. Source: the program of P-DARTS, which drops
    what `Identity` makes.
    """
    return space.table[op].group != "skip" or stride == 1


def dropped(
    noise: CellNoise | None, space: Space, op: str, stride: int, edge: int | jax.Array, y: jax.Array
) -> jax.Array:
    """What an operation has made on an edge of the cell, with its dropout."""
    if noise is None or op not in noise.rates or not reaches(space, op, stride):
        return y
    key = jax.random.fold_in(jax.random.fold_in(noise.key, edge), space.ops.index(op))
    return dropout(key, noise.positions, y, noise.rates[op])


def path_dropped(noise: CellNoise | None, edge: int | jax.Array, y: jax.Array) -> jax.Array:
    """y [B,H,W,C], what an edge makes or its cotangent, times the multipliers of its images."""
    if noise is None or noise.edges is None:
        return y
    return noise.edges[edge].astype(y.dtype).reshape(-1, 1, 1, 1) * y
