"""The mixed cell on a CPU: every executed operation adds to its node in place.

    nodes[t] += g op(nodes[s])        forward, in the order of the edges
    ct[s] += g (d op)^T ct[t]         backward, in the opposite order

An operation that is a row of units or a pool (`Primitive.units`; the identity is the empty row) is one kernel a
direction: it reads and writes rows of whole buffers, which XLA would copy. Others are computed as elsewhere, and added
by a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops import kernels
from prdarts_jax.ops.batch_norm import BN_EPS, inner
from prdarts_jax.ops.layer_set import fast_layers
from prdarts_jax.ops.layers import Reduction
from prdarts_jax.ops.lowering import Branch, run_branch
from prdarts_jax.ops.pools import Pool
from prdarts_jax.ops.primitives import Params
from prdarts_jax.ops.separable import Unit
from prdarts_jax.space.noise import CellNoise, path_dropped
from prdarts_jax.space.spec import EdgeGroup
from prdarts_jax.space.terms import (
    CellProgram,
    CellWeights,
    Terms,
    Wanted,
    apply_op,
    output_shape,
    read_row,
    runs,
    terms_of,
    units_of,
    weights_of,
)


class _Table(NamedTuple):
    """Static: of each operation the number of its units, -1 where it is no row of units; their geometry; the pools."""

    units: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pools: tuple[int, ...]  # of each operation: 0, or 1 + its index in _POOLS
    pool_stride: int
    pool_norm: bool

    def attributes(self) -> dict[str, Any]:
        lists = {name: np.asarray(values, np.int64) for name, values in self._asdict().items()}
        return {**lists, "pool_stride": self.pool_stride, "pool_norm": int(self.pool_norm), "eps": np.float32(BN_EPS)}

    def elsewhere(self) -> tuple[bool, ...]:
        """Which operations the kernels leave alone."""
        return tuple(n < 0 and not pool for n, pool in zip(self.units, self.pools, strict=True))

    def work(self, like: jax.Array) -> jax.Array:
        """Memory for what the units of one operation compute: rows of the shape of a node."""
        return kernels.unwritten((max(1, *self.units), *like.shape[1:]), like)


_POOLS = ("average", "maximum")


def _units_of(program: CellProgram, group: EdgeGroup, op: str, stacks: dict[str, Params]) -> list[Unit] | Pool | None:
    """The units of an operation, with stacked weights, or its pool, if the kernels compute all of it."""
    units = units_of(program, group, op, stacks)
    if isinstance(units, Reduction):
        return None
    if isinstance(units, list):
        windows = [(*unit.depthwise.shape[1:3], unit.stride, unit.dilation) for unit in units]
        return units if all(kernels.compiled(*window) for window in windows) else None
    return units


def _table(program: CellProgram, group: EdgeGroup, stacks: dict[str, Params]) -> _Table:
    found = [_units_of(program, group, op, stacks) for op in program.space.ops]
    flat = [unit for units in found if isinstance(units, list) for unit in units]
    return _Table(
        units=tuple(len(units) if isinstance(units, list) else -1 for units in found),
        strides=tuple(unit.stride for unit in flat),
        dilations=tuple(unit.dilation for unit in flat),
        pools=tuple(1 + _POOLS.index(units.kind) if isinstance(units, Pool) else 0 for units in found),
        pool_stride=group.stride,
        pool_norm=program.space.pool_norm,
    )


def _arrays(program: CellProgram, group: EdgeGroup, stacks: dict[str, Params]) -> list[jax.Array]:
    """The stacked weights of all units in turn: depthwise, matrix."""
    found = [_units_of(program, group, op, stacks) for op in program.space.ops]
    return [a for units in found if isinstance(units, list) for unit in units for a in (unit.depthwise, unit.matrix)]


def _others(program: CellProgram, table: _Table, stacks: dict[str, Params]) -> dict[str, Params]:
    """The stacks of the operations that the kernels leave alone."""
    pairs = zip(program.space.ops, table.elsewhere(), strict=True)
    return {op: stacks[op] for op, elsewhere in pairs if elsewhere and op in stacks}


def _numbers(terms: Terms) -> jax.Array:
    """int32[n,4]: source, target, operation, row of its weights."""
    columns = (terms.source, terms.target, terms.branch, terms.row)
    return jnp.stack([jnp.asarray(c, jnp.int32) for c in columns], axis=1)


def where_served(program: CellProgram, arrays: Any, in_place: Callable[[], Any], elsewhere: Callable[[], Any]) -> Any:
    """in_place() on a CPU, if the kernels can run the cell there; else elsewhere(), which gives the same shapes.

    They take float32 `arrays`, and statistics in which no other device has a part.
    """
    lowering = program.lowering
    wanted = lowering.own_kernels and lowering.cell in ("auto", "kernels")
    if not (wanted and program.axis_name is None and kernels.serve(*jax.tree.leaves(arrays))):
        return elsewhere()
    if lowering.platform is not None:
        return in_place()
    return lax.platform_dependent(cpu=in_place, default=elsewhere)


def _add(rows: jax.Array, y: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    """rows[index] += value y; a value for all images, or one for each."""
    return kernels.call("add_to_row", [rows.shape], rows, y, index, value, in_place={0: 0})[0]


def _nothing(x: jax.Array) -> jax.Array:
    return jnp.zeros((0,) * x.ndim, x.dtype)


# --- forward ----------------------------------------------------------------------------------------------------------

_Carry = tuple[jax.Array, jax.Array]  # nodes, memory of the units


def _run_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    terms: Terms,
    sources: jax.Array | None,
    nodes: jax.Array,
    noise: CellNoise | None = None,
) -> jax.Array:
    space, stride = program.space, group.stride
    table, arrays = _table(program, group, stacks), _arrays(program, group, stacks)
    layers = fast_layers()

    def branch(op: str) -> Branch:
        def run(nodes: jax.Array, operands: tuple[dict[str, Params], Any, Terms, jax.Array, Any]) -> jax.Array:
            stacks, sources, term, value, noise = operands
            x = read_row(nodes if sources is None else sources, term.source)
            y = apply_op(space, op, weights_of(stacks, op, term.row), x, stride, layers, noise, term.edge)
            return _add(nodes, y, term.target, value)

        return run

    executes = zip(runs(program, group).items(), table.elsewhere(), strict=True)
    branches = tuple(branch(op) if runs_ and elsewhere else None for (op, runs_), elsewhere in executes)
    others = _others(program, table, stacks)

    def one(carry: _Carry, of: tuple[jax.Array, Terms]) -> tuple[_Carry, None]:
        (nodes, work), (numbers, term) = carry, of
        value = term.value if noise is None or noise.edges is None else term.value * noise.edges[term.edge]
        operands = (nodes, work, _nothing(nodes) if sources is None else sources, numbers, value, *arrays)
        shapes = [nodes.shape, work.shape]
        nodes, work = kernels.call("term_forward", shapes, *operands, in_place={0: 0, 1: 1}, **table.attributes())
        return (run_branch(branches, term.branch, nodes, (others, sources, term, value, noise)), work), None

    scanned = (_numbers(terms), jax.tree.map(jnp.asarray, terms))
    (nodes, _), _ = lax.scan(one, (nodes, table.work(nodes)), scanned)
    return nodes


def forward(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    executed: jax.Array,
    noise: CellNoise | None,
) -> jax.Array:
    """All nodes after the cell, the inputs of a normal cell among them."""
    space, kind = program.space, program.kind
    inputs = jnp.stack([s0, s1])
    shape = output_shape(s0, 1 if kind == "normal" else 2)
    nodes = jnp.zeros((space.nodes, *shape), s0.dtype)
    if kind == "normal":
        nodes = jnp.concatenate([inputs, nodes])
    for group in space.edge_groups(kind):
        terms = terms_of(space, kind, group, values, executed, noise)
        sources = inputs if group.stride == 2 else None
        nodes = _run_group(program, group, weights[group.name], terms, sources, nodes, noise)
    return nodes


# --- backward ---------------------------------------------------------------------------------------------------------

_Cotangents = tuple[jax.Array, jax.Array, dict[str, Params]]  # of the sources, of the gate, of the other stacks


def reverse_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    terms: Terms,
    sources: jax.Array | None,
    nodes: jax.Array,
    cotangents: tuple[jax.Array | None, jax.Array],
    wanted: Wanted,
    noise: CellNoise | None = None,
) -> tuple[tuple[jax.Array | None, jax.Array], dict[str, Params], jax.Array]:
    """From the last term to the first: cotangents of sources and nodes, of the stacks, and of the gates [n].

    The cotangent of a node is whole once the edges that leave it are done: they come after those that reach it.
    """
    space, stride = program.space, group.stride
    table = _table(program, group, stacks)
    arrays, pull_arrays = jax.vjp(lambda stacks: _arrays(program, group, stacks), stacks)
    layers, value_dtype = fast_layers(), terms.value.dtype
    own = sources is None
    others = _others(program, table, stacks)

    def branch(op: str) -> Branch:
        def run(before: _Cotangents, operands: tuple[dict[str, Params], Any, Any, jax.Array, Terms, Any]) -> Any:
            cts, dvalue, dothers = before
            stacks, inputs, ct_nodes, target, term, noise = operands
            params, x = weights_of(stacks, op, term.row), read_row(inputs, term.source)
            ct = read_row(cts if ct_nodes is None else ct_nodes, target)

            def apply(params: Params, x: jax.Array) -> jax.Array:
                return apply_op(space, op, params, x, stride, layers, noise, term.edge)

            # The gate multiplies what comes out: multiplying the cotangent would be a pass over it.
            if wanted.weights and params:
                y, pull = jax.vjp(apply, params, x)
                dp, dx = pull(ct)
                scaled = jax.tree.map(lambda d: term.value.astype(d.dtype) * d, dp)
                mine = jax.tree.map(lambda all, d: all.at[term.row].add(d), dothers[op], scaled)
                dothers = {**dothers, op: mine}
            else:
                y, pull = jax.vjp(lambda x: apply(params, x), x)
                (dx,) = pull(ct)
            if wanted.values:
                dvalue = inner(ct, y).astype(value_dtype)
            return _add(cts, dx, term.source, term.value), dvalue, dothers

        return run

    executes = zip(runs(program, group).items(), table.elsewhere(), strict=True)
    branches = tuple(branch(op) if runs_ and elsewhere else None for (op, runs_), elsewhere in executes)
    inputs = nodes if sources is None else sources

    def one(
        carry: tuple[jax.Array, jax.Array, list[jax.Array], dict[str, Params]], of: tuple[jax.Array, Terms]
    ) -> tuple[tuple[jax.Array, jax.Array, list[jax.Array], dict[str, Params]], jax.Array]:
        (cts, work, gradients, dothers), (numbers, term) = carry, of
        ct_nodes = None if own else cotangents[1]
        if noise is not None and noise.edges is not None:
            # The kernels read a cotangent as it is: here that of this edge, the one row of a buffer of its own.
            ct = read_row(cts if ct_nodes is None else ct_nodes, term.target)
            ct_nodes = path_dropped(noise, term.edge, ct)[None]
            numbers = numbers.at[1].set(0)
        operands = [cts, work, _nothing(cts) if ct_nodes is None else ct_nodes, inputs, numbers, term.value, *arrays]
        in_place = {0: 0, 1: 1} | {len(operands) + i: 3 + i for i in range(len(gradients))}
        shapes = [cts.shape, work.shape, (), *(g.shape for g in gradients)]
        name = "term_backward" if wanted.weights else "term_input_gradient"
        cts, work, dvalue, *gradients = kernels.call(
            name, shapes, *operands, *gradients, in_place=in_place, **table.attributes()
        )
        read = (others, inputs, ct_nodes, numbers[1], term, noise)
        cts, dvalue, dothers = run_branch(branches, term.branch, (cts, dvalue, dothers), read)
        return (cts, work, gradients, dothers), dvalue

    before = cotangents[1] if cotangents[0] is None else cotangents[0]
    zeros = jax.tree.map(jnp.zeros_like, (arrays, others) if wanted.weights else ([], {}))
    scanned = (_numbers(terms), jax.tree.map(jnp.asarray, terms))
    carry = (before, table.work(cotangents[1]), *zeros)
    (after, _, gradients, dothers), dvalues = lax.scan(one, carry, scanned, reverse=True)
    dstacks: dict[str, Params] = {}
    if wanted.weights:
        (dstacks,) = pull_arrays(gradients)
        dstacks = {**dstacks, **dothers}
    return ((None, after) if own else (after, cotangents[1])), dstacks, dvalues
