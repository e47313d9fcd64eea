"""The executed terms of a cell as arrays, and what both ways of running them share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.errors import UserError
from prdarts_jax.ops.layer_set import LayerSet
from prdarts_jax.ops.layers import Reduction
from prdarts_jax.ops.lowering import ANYWHERE, Lowering
from prdarts_jax.ops.pools import Pool
from prdarts_jax.ops.primitives import Params
from prdarts_jax.ops.separable import Unit
from prdarts_jax.space.noise import CellNoise, dropped, reaches
from prdarts_jax.space.spec import EdgeGroup, Space

CellWeights = dict[str, dict[str, Params]]  # stride1 | stride2 -> operation -> stacked arrays [rows, ...]


class CellProgram(NamedTuple):
    """Static arguments of a cell: hashable, so that equal cells share one trace."""

    space: Space
    kind: str
    axis_name: str | None
    dropout: tuple[str, ...] = ()  # operations of whose output elements are dropped
    lowering: Lowering = ANYWHERE


@jax.tree_util.register_static
class Wanted(NamedTuple):
    """Which cotangents the differentiation asks for; known when the forward rule is traced."""

    weights: bool
    values: bool
    factors: bool = False


def apply_op(
    space: Space,
    op: str,
    params: Params,
    x: jax.Array,
    stride: int,
    layers: LayerSet,
    noise: CellNoise | None = None,
    edge: int | jax.Array | None = None,
) -> jax.Array:
    """One primitive as the search uses it: pools are normalised (without affine) when the space says so; dropout."""
    primitive = space.table[op]
    y = primitive.apply(params, x, stride, layers)
    if primitive.group == "pool" and space.pool_norm:
        y = layers.norm("bn", y)
    return y if edge is None else dropped(noise, space, op, stride, edge, y)


class Terms(NamedTuple):
    """What the scan reads per executed term. Source and target, known statically, are rows of the cell's buffers."""

    source: Any  # int32[n]
    target: Any  # int32[n]
    branch: jax.Array  # int32[n]: operation index; O = nothing is executed
    row: jax.Array  # int32[n]: row of the operation's weight stack
    value: jax.Array  # float32[n]: the gate
    edge: Any = None  # int32[n]: the edge of the cell; None without noise


def rows_of(space: Space, kind: str, group: EdgeGroup) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of each edge of a group as rows of the cell's buffers.

    A normal cell has one buffer, of nodes 0..N+1; in a reduction cell the two inputs have one of their own.
    """
    source, target = np.asarray(space.edges)[np.asarray(group.edges)].T
    if kind == "normal":
        return source, target
    return source if group.stride == 2 else source - 2, target - 2


def terms_of(
    space: Space, kind: str, group: EdgeGroup, values: jax.Array, executed: jax.Array, noise: CellNoise | None = None
) -> Terms:
    """Terms of the edges of a group, edge-major."""
    edges = np.asarray(group.edges)
    k = executed.shape[1]
    void = space.num_ops
    # A row table with a void column: operations without weights, or not allowed on the edge, point at row 0 or at void.
    rows = np.zeros((len(edges), void + 1), np.int32)
    branch = np.full((len(edges), void + 1), void, np.int32)
    for o, members in enumerate(space.rows(kind, group).values()):
        for row, edge in enumerate(members):
            rows[group.edges.index(edge), o] = row
            if space.table[space.ops[o]].group != "none":
                branch[group.edges.index(edge), o] = o
    chosen = executed[edges]

    def pick(table: np.ndarray) -> jax.Array:
        return jnp.take_along_axis(jnp.asarray(table), chosen, axis=1).reshape(-1)

    source, target = (np.repeat(row, k).astype(np.int32) for row in rows_of(space, kind, group))
    own_edges = None if noise is None else np.repeat(edges, k).astype(np.int32)
    return Terms(source, target, pick(branch), pick(rows), values[edges].reshape(-1), own_edges)


def runs(program: CellProgram, group: EdgeGroup) -> dict[str, bool]:
    """Which operations compute anything on the edges of a group: `none`, and what no edge may use, do not."""
    rows = program.space.rows(program.kind, group)
    return {op: bool(edges) and program.space.table[op].group != "none" for op, edges in rows.items()}


def units_of(
    program: CellProgram, group: EdgeGroup, op: str, stacks: dict[str, Params]
) -> list[Unit] | Pool | Reduction | None:
    """What an operation on the edges of a group is made of, with stacked weights, if that is all of it.

    Raises:
      UserError: units that cannot be those of the operation; what is computed from them would not fit.
    """
    primitive = program.space.table[op]
    drops = op in program.dropout and reaches(program.space, op, group.stride)
    if primitive.units is None or not runs(program, group)[op] or drops:
        return None
    units = primitive.units(stacks.get(op, {}), group.stride)
    if isinstance(units, Pool):
        # All pools are normalised, or none.
        fits = units.stride == group.stride in (1, 2) and primitive.group == "pool"
        return units if fits else None
    if units is None or (primitive.group == "pool" and program.space.pool_norm):  # normalised once more, behind them
        return None
    if isinstance(units, Reduction):
        return units if group.stride == 2 else None
    rows = len(program.space.rows(program.kind, group)[op])
    strides = [unit.stride for unit in units]
    if strides != [group.stride, *[1] * (len(units) - 1)] and (units or group.stride != 1):
        raise UserError(f"units of {op!r}: strides {strides} on edges of stride {group.stride}; allowed: it, then 1")
    for unit in units:
        shapes = (np.shape(unit.depthwise), np.shape(unit.matrix))
        channels = shapes[1][-1] if shapes[1] else 0
        if len(shapes[0]) != 4 or shapes[0][::3] != (rows, channels) or shapes[1] != (rows, channels, channels):
            raise UserError(
                f"units of {op!r}: weights of shapes {shapes[0]} and {shapes[1]}; "
                f"allowed: ({rows}, k, k, C) and ({rows}, C, C), since those of {rows} edges are stacked"
            )
    return list(units)


def read_row(nodes: jax.Array, index: jax.Array) -> jax.Array:
    """nodes[index]."""
    return lax.dynamic_index_in_dim(nodes, index, 0, keepdims=False)


def write_row(nodes: jax.Array, index: jax.Array, node: jax.Array) -> jax.Array:
    """`nodes` with nodes[index] = node."""
    return lax.dynamic_update_index_in_dim(nodes, node, index, 0)


def weights_of(stacks: dict[str, Params], op: str, row: jax.Array) -> Params:
    """The weights of an operation on one edge; {} if it has none."""
    return jax.tree.map(lambda a: read_row(a, row), stacks.get(op, {}))


def output_shape(x: jax.Array, stride: int) -> tuple[int, int, int, int]:
    """Of an operation on x [B,H,W,C]."""
    b, h, w, c = x.shape
    return b, -(-h // stride), -(-w // stride), c
