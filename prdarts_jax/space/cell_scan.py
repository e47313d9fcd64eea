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
from prdarts_jax.ops.layer_set import fast_leaves
from prdarts_jax.ops.lowering import Branch, run_branch
from prdarts_jax.ops.primitives import Params
from prdarts_jax.space.spec import EdgeGroup
from prdarts_jax.space.terms import (
    CellProgram,
    Slots,
    Wanted,
    apply_op,
    read_row,
    runs,
    weights_of,
    write_row,
)

_Cotangents = tuple[jax.Array, jax.Array, jax.Array]  # of the source, of the weights (flat), of the gate


class _Gathering(NamedTuple):
    """Slots sorted by the node they add to, as rows of equal length.

    XLA:CPU does not split the update of a part of a buffer over threads, so the terms of a node are summed in an array
    of their own, which is written once.
    """

    node: np.ndarray  # int32[m]: the row of the buffer that is summed
    slot: np.ndarray  # int32[m, w]: its slots; n, one past the last, fills up
    place: np.ndarray  # int32[n]: where in [m * w] a slot lies

    def scope(self) -> AbstractContextManager[None]:
        """Says in the traced program how many of the scanned slots are real."""
        return jax.named_scope(f"{self.place.size}_of_{self.slot.size}_slots")


def _gathering(ends: np.ndarray, *, reverse: bool) -> _Gathering:
    """`ends`: for each slot the node that it adds to, from the last to the first if `reverse`."""
    order = -1 if reverse else 1
    node = np.unique(ends)[::order].astype(np.int32)
    members = [np.flatnonzero(ends == n)[::order] for n in node]
    slot = np.full((len(node), max(map(len, members))), len(ends), np.int32)
    place = np.zeros(len(ends), np.int32)
    for i, mine in enumerate(members):
        slot[i, : len(mine)] = mine
        place[mine] = i * slot.shape[1] + np.arange(len(mine))
    return _Gathering(node, slot, place)


def _filled(slots: Slots, void: int, rows: np.ndarray) -> Slots:
    """The slots in rows; what fills up executes nothing."""
    fill = Slots(source=0, target=0, branch=void, row=0, value=0)  # type: ignore[arg-type]
    return jax.tree.map(lambda a, f: jnp.concatenate([a, jnp.full(1, f, a.dtype)])[rows], slots, fill)


def _run_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    slots: Slots,
    sources: jax.Array | None,
    nodes: jax.Array,
) -> jax.Array:
    """Adds g * op(x) of every slot to its target. Sources: a buffer of their own, or (None) the nodes themselves."""
    space, stride = program.space, group.stride
    leaves = fast_leaves(program.axis_name)

    def branch(op: str) -> Branch:
        def run(total: jax.Array, read: tuple[dict[str, Params], jax.Array, Slots]) -> jax.Array:
            stacks, inputs, slot = read
            y = apply_op(space, op, weights_of(stacks, op, slot.row), read_row(inputs, slot.source), stride, leaves)
            return total + slot.value.astype(y.dtype) * y

        return run

    branches = tuple(branch(op) if runs else None for op, runs in runs(program, group).items())

    def node(nodes: jax.Array, of: tuple[jax.Array, Slots]) -> tuple[jax.Array, None]:
        index, mine = of
        inputs = nodes if sources is None else sources

        def add(total: jax.Array, slot: Slots) -> tuple[jax.Array, None]:
            return run_branch(branches, slot.branch, total, (stacks, inputs, slot)), None

        total, _ = lax.scan(add, read_row(nodes, index), mine)
        return write_row(nodes, index, total), None

    gathering = _gathering(slots.target, reverse=False)
    rows = _filled(slots, space.num_ops, gathering.slot)
    with gathering.scope():
        return lax.scan(node, nodes, (jnp.asarray(gathering.node), rows))[0]


def _flat_sizes(stacks: dict[str, Params]) -> dict[str, int]:
    return {op: sum(int(np.prod(a.shape[1:])) for a in jax.tree.leaves(params)) for op, params in stacks.items()}


def _reverse_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    slots: Slots,
    sources: jax.Array | None,
    nodes: jax.Array,
    cotangents: tuple[jax.Array | None, jax.Array],
    wanted: Wanted,
) -> tuple[tuple[jax.Array | None, jax.Array], jax.Array, jax.Array]:
    """From the last source to the first: cotangents of sources and nodes, flat weight gradients [n, P], gates' [n].

    The cotangent of a source is whole once the edges that leave it are done, and so are those of its targets before.
    """
    space, stride = program.space, group.stride
    leaves = fast_leaves(program.axis_name)
    width = max(_flat_sizes(stacks).values(), default=0) if wanted.weights else 0
    flat_dtype = wide_dtype(*jax.tree.leaves(stacks))
    value_dtype = slots.value.dtype

    def branch(op: str) -> Branch:
        def run(before: _Cotangents, read: tuple[dict[str, Params], jax.Array, jax.Array, Slots]) -> _Cotangents:
            total, flat, dvalue = before
            stacks, x, ct_nodes, slot = read
            params, ct = weights_of(stacks, op, slot.row), read_row(ct_nodes, slot.target)
            # The gate multiplies what comes out: multiplying the cotangent would be a pass over it.
            if wanted.weights and params:
                y, pull = jax.vjp(lambda p, x: apply_op(space, op, p, x, stride, leaves), params, x)
                dp, dx = pull(ct)
                flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(dp)])
                flat = slot.value.astype(flat.dtype) * jnp.pad(flat, (0, width - flat.shape[0]))
            else:
                y, pull = jax.vjp(lambda x: apply_op(space, op, params, x, stride, leaves), x)
                (dx,) = pull(ct)
            if wanted.values:
                dvalue = inner(ct, y).astype(value_dtype)
            return total + slot.value.astype(dx.dtype) * dx, flat, dvalue

        return run

    branches = tuple(branch(op) if runs else None for op, runs in runs(program, group).items())
    own = sources is None

    def source(carry: tuple[jax.Array | None, jax.Array], of: tuple[jax.Array, Slots]):
        index, mine = of
        ct_sources, ct_nodes = carry
        x = read_row(nodes if sources is None else sources, index)

        def add(total: jax.Array, slot: Slots) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            nothing = jnp.zeros((width,), flat_dtype), jnp.zeros((), value_dtype)
            read = (stacks, x, ct_nodes, slot)
            total, flat, dvalue = run_branch(branches, slot.branch, (total, *nothing), read)
            return total, (flat, dvalue)

        before = ct_nodes if ct_sources is None else ct_sources
        total, gradients = lax.scan(add, read_row(before, index), mine)
        after = write_row(before, index, total)
        return ((None, after) if own else (after, ct_nodes)), gradients

    gathering = _gathering(slots.source, reverse=True)
    rows = _filled(slots, space.num_ops, gathering.slot)
    with gathering.scope():
        carry, (flats, dvalues) = lax.scan(source, cotangents, (jnp.asarray(gathering.node), rows))
    return carry, flats.reshape(gathering.slot.size, width)[gathering.place], dvalues.reshape(-1)[gathering.place]


def _unflatten(
    program: CellProgram, group: EdgeGroup, stacks: dict[str, Params], slots: Slots, flats: jax.Array
) -> dict[str, Params]:
    """Flat gradients per slot [n, P] -> gradients of the stacks. An operation runs at most once an edge."""
    gradients: dict[str, Params] = {}
    branch = slots.branch.reshape(len(group.edges), -1)
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
