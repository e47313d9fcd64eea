"""The mixed cell as a scan over the terms of each node."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops.batch_norm import inner
from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.layer_set import fast_layers
from prdarts_jax.ops.lowering import Branch, run_branch
from prdarts_jax.ops.primitives import Params
from prdarts_jax.space.noise import CellNoise, path_dropped
from prdarts_jax.space.partial import (
    edge_table,
    factor_cotangent,
    head,
    passed,
    shuffled,
    tabled,
    tail,
    unshuffled,
    weighted_sum,
)
from prdarts_jax.space.spec import EdgeGroup
from prdarts_jax.space.terms import (
    CellProgram,
    Terms,
    Wanted,
    apply_op,
    read_row,
    runs,
    weights_of,
    write_row,
)

_Cotangents = tuple[jax.Array, jax.Array, jax.Array]  # of the source, of the weights (flat), of the gate
_Read = tuple[dict[str, Params], jax.Array, jax.Array, Terms, CellNoise | None]  # stacks, source, cotangents of nodes


class _Gathering(NamedTuple):
    """Terms sorted by the node they add to, as rows of equal length.

    XLA:CPU does not split the update of a part of a buffer over threads, so the terms of a node are summed in an array
    of their own, which is written once.
    """

    node: np.ndarray  # int32[m]: the row of the buffer that is summed
    term: np.ndarray  # int32[m, w]: its terms; n, one past the last, fills up
    place: np.ndarray  # int32[n]: where in [m * w] a term lies

    def scope(self) -> AbstractContextManager[None]:
        """Says in the traced program how many of the scanned terms are real."""
        return jax.named_scope(f"{self.place.size}_of_{self.term.size}_terms")


def _gathering(ends: np.ndarray, *, reverse: bool) -> _Gathering:
    """`ends`: for each term the node that it adds to, from the last to the first if `reverse`."""
    order = -1 if reverse else 1
    node = np.unique(ends)[::order].astype(np.int32)
    members = [np.flatnonzero(ends == n)[::order] for n in node]
    term = np.full((len(node), max(map(len, members))), len(ends), np.int32)
    place = np.zeros(len(ends), np.int32)
    for i, mine in enumerate(members):
        term[i, : len(mine)] = mine
        place[mine] = i * term.shape[1] + np.arange(len(mine))
    return _Gathering(node, term, place)


def _filled(terms: Terms, void: int, rows: np.ndarray) -> Terms:
    """The terms in rows; what fills up executes nothing."""
    fill = Terms(0, 0, void, 0, 0, edge=terms.edge if terms.edge is None else 0)  # type: ignore[arg-type]
    return jax.tree.map(lambda a, f: jnp.concatenate([a, jnp.full(1, f, a.dtype)])[rows], terms, fill)


def _run_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    terms: Terms,
    sources: jax.Array | None,
    nodes: jax.Array,
    noise: CellNoise | None = None,
    factors: jax.Array | None = None,
) -> jax.Array:
    """Adds g * op(x) of every term to its target. Sources: a buffer of their own, or (None) the nodes themselves.

    With `factors` (partial channels) also what passes by; after the edges of stride 1, which come last, it is shuffled.
    """
    space, stride = program.space, group.stride
    layers = fast_layers(program.axis_name, own_kernels=program.lowering.own_kernels)

    def branch(op: str) -> Branch:
        def run(total: jax.Array, read: tuple[dict[str, Params], jax.Array, Terms, CellNoise | None]) -> jax.Array:
            stacks, inputs, term, noise = read
            params, x = weights_of(stacks, op, term.row), head(space, read_row(inputs, term.source))
            y = path_dropped(noise, term.edge, apply_op(space, op, params, x, stride, layers, noise, term.edge))
            return total + term.value.astype(y.dtype) * y

        return run

    branches = tuple(branch(op) if runs else None for op, runs in runs(program, group).items())

    passing = None if factors is None or sources is None else [passed(tail(space, x), stride) for x in sources]

    def node(nodes: jax.Array, of: tuple[jax.Array, Terms, jax.Array | None]) -> tuple[jax.Array, None]:
        index, mine, weights = of
        inputs = nodes if sources is None else sources

        def add(total: jax.Array, term: Terms) -> tuple[jax.Array, None]:
            return run_branch(branches, term.branch, total, (stacks, inputs, term, noise)), None

        before = read_row(nodes, index)
        total, _ = lax.scan(add, head(space, before), mine)
        if weights is not None:
            rows = tail(space, nodes) if passing is None else passing
            beside = tail(space, before) + weighted_sum(weights, rows)
            total = shuffled(space, total, beside) if stride == 1 else jnp.concatenate([total, beside], axis=-1)
        return write_row(nodes, index, total), None

    gathering = _gathering(terms.target, reverse=False)
    rows = _filled(terms, space.num_ops, gathering.term)
    weights = None
    if factors is not None:
        weights = tabled(factors, edge_table(space, program.kind, group)[gathering.node])
    with gathering.scope():
        return lax.scan(node, nodes, (jnp.asarray(gathering.node), rows, weights))[0]


def _flat_sizes(stacks: dict[str, Params]) -> dict[str, int]:
    return {op: sum(int(np.prod(a.shape[1:])) for a in jax.tree.leaves(params)) for op, params in stacks.items()}


def _reverse_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    terms: Terms,
    sources: jax.Array | None,
    nodes: jax.Array,
    cotangents: tuple[jax.Array | None, jax.Array],
    wanted: Wanted,
    noise: CellNoise | None = None,
    factors: jax.Array | None = None,
) -> tuple[tuple[jax.Array | None, jax.Array], jax.Array, jax.Array, jax.Array | None]:
    """From the last source to the first: cotangents of sources and nodes, flat weight gradients [n, P], gates' [n].

    The cotangent of a source is whole once the edges that leave it are done, and so are those of its targets before.
    With `factors` (partial channels) those of targets are kept as they were before the shuffle; the factors' come last.
    """
    space, stride = program.space, group.stride
    layers = fast_layers(program.axis_name, own_kernels=program.lowering.own_kernels)
    width = max(_flat_sizes(stacks).values(), default=0) if wanted.weights else 0
    flat_dtype = wide_dtype(*jax.tree.leaves(stacks))
    value_dtype = terms.value.dtype

    def branch(op: str) -> Branch:
        def run(before: _Cotangents, read: _Read) -> _Cotangents:
            total, flat, dvalue = before
            stacks, x, ct_nodes, term, noise = read
            params, ct = weights_of(stacks, op, term.row), head(space, read_row(ct_nodes, term.target))
            ct = path_dropped(noise, term.edge, ct)

            def apply(params: Params, x: jax.Array) -> jax.Array:
                return apply_op(space, op, params, x, stride, layers, noise, term.edge)

            # The gate multiplies what comes out: multiplying the cotangent would be a pass over it.
            if wanted.weights and params:
                y, pull = jax.vjp(apply, params, x)
                dp, dx = pull(ct)
                flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(dp)])
                flat = term.value.astype(flat.dtype) * jnp.pad(flat, (0, width - flat.shape[0]))
            else:
                y, pull = jax.vjp(lambda x: apply(params, x), x)
                (dx,) = pull(ct)
            if wanted.values:
                dvalue = inner(ct, y, own_kernels=program.lowering.own_kernels).astype(value_dtype)
            return total + term.value.astype(dx.dtype) * dx, flat, dvalue

        return run

    branches = tuple(branch(op) if runs else None for op, runs in runs(program, group).items())
    own = sources is None

    def source(carry: tuple[jax.Array | None, jax.Array], of: tuple[jax.Array, Terms, jax.Array | None]):
        index, mine, weights = of
        ct_sources, ct_nodes = carry
        whole = read_row(nodes if sources is None else sources, index)
        x = head(space, whole)

        def add(total: jax.Array, term: Terms) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            nothing = jnp.zeros((width,), flat_dtype), jnp.zeros((), value_dtype)
            read = (stacks, x, ct_nodes, term, noise)
            total, flat, dvalue = run_branch(branches, term.branch, (total, *nothing), read)
            return total, (flat, dvalue)

        before = ct_nodes if ct_sources is None else ct_sources
        ct = read_row(before, index)
        total, gradients = lax.scan(add, head(space, ct), mine)
        dweights = None
        if weights is not None:
            cts = tail(space, ct_nodes)
            beside, pull = jax.vjp(lambda x: passed(x, stride), tail(space, whole))
            (dtail,) = pull(weighted_sum(weights, cts))
            if wanted.factors:
                dweights = jnp.stack([factor_cotangent(weights, row, beside) for row in cts])
            total = jnp.concatenate([total, tail(space, ct) + dtail], axis=-1)
            if own:  # a node has been shuffled, an input of the cell has not
                first = 2 if program.kind == "normal" else 0
                total = jnp.where(index >= first, unshuffled(space, total), total)
        after = write_row(before, index, total)
        return ((None, after) if own else (after, ct_nodes)), (*gradients, dweights)

    gathering = _gathering(terms.source, reverse=True)
    rows = _filled(terms, space.num_ops, gathering.term)
    weights = table = None
    if factors is not None:
        table = edge_table(space, program.kind, group).T[gathering.node]
        weights = tabled(factors, table)
    with gathering.scope():
        scanned = (jnp.asarray(gathering.node), rows, weights)
        carry, (flats, dvalues, dweights) = lax.scan(source, cotangents, scanned)
    dfactors = None
    if factors is not None and dweights is not None:
        # What belongs to no edge goes into one row more, and is left out.
        dfactors = jnp.zeros((space.num_edges + 1, *factors.shape[1:]), factors.dtype).at[table].set(dweights)[:-1]
    flats, dvalues = flats.reshape(gathering.term.size, width)[gathering.place], dvalues.reshape(-1)[gathering.place]
    return carry, flats, dvalues, dfactors


def _unflatten(
    program: CellProgram, group: EdgeGroup, stacks: dict[str, Params], terms: Terms, flats: jax.Array
) -> dict[str, Params]:
    """Flat gradients per term [n, P] -> gradients of the stacks. An operation runs at most once an edge."""
    gradients: dict[str, Params] = {}
    branch = terms.branch.reshape(len(group.edges), -1)
    per_edge = flats.reshape(*branch.shape, flats.shape[1])  # no -1: the width is 0 where no operation has weights
    for o, (op, members) in enumerate(program.space.rows(program.kind, group).items()):
        if op not in stacks:
            continue
        size = _flat_sizes(stacks)[op]
        rows = np.asarray([group.edges.index(e) for e in members])
        mine = (branch[rows] == o)[:, :, None]
        total = jnp.sum(jnp.where(mine, per_edge[rows][:, :, :size], 0.0), axis=1)
        leaves, tree = jax.tree.flatten(stacks[op])
        ends = np.cumsum([int(np.prod(a.shape[1:])) for a in leaves])[:-1]
        parts = jnp.split(total, ends, axis=1)
        gradients[op] = jax.tree.unflatten(tree, [p.reshape(a.shape) for p, a in zip(parts, leaves, strict=True)])
    return gradients
