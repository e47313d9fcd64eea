"""The mixed cell: X_n = sum over edges and executed operations of g * op(x)   (eq. 7).

Only the executed operations of an edge are computed. `mixed_nodes` runs the edges of a cell in a `lax.scan` whose body
is one `lax.switch` over the primitives, so a primitive is compiled once a shape rather than once an edge, and carries a
differentiation rule of its own: autodiff of such a scan would build a zero buffer of all nodes for each slice, and a
switch would store the residuals of all branches. The rule keeps the final nodes only (a node is final before an edge
leaves it), runs the edges in reverse, and recomputes each executed operation. On a CPU, where kernels of ours serve,
`cell_in_place` does the same with sums in place.

`mixed_nodes_reference` is the same sum, dense, unrolled, with plain autodiff: the oracle, and the way to forward-mode
and exact second-order derivatives on small spaces.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.layers import Weight
from prdarts_jax.ops.leaves import fast_leaves, reference_leaves
from prdarts_jax.ops.moments import inner
from prdarts_jax.ops.primitives import Params
from prdarts_jax.space import cell_in_place
from prdarts_jax.space.branching import Branch, run_branch
from prdarts_jax.space.slots import (
    CellProgram,
    CellWeights,
    Slots,
    Wanted,
    apply_op,
    output_shape,
    read_row,
    runs,
    slots_of,
    weights_of,
    write_row,
)
from prdarts_jax.space.spec import EdgeGroup, Space

_Cotangents = tuple[jax.Array, jax.Array, jax.Array]  # of the source, of the weights (flat), of the gate


def declare_edges(space: Space, kind: str, channels: int) -> dict[str, dict[str, dict[str, Weight]]]:
    """The weights of all edges of a cell: {group: {op: {name: Weight stacked over the edges that may use the op}}}."""
    declared: dict[str, dict[str, dict[str, Weight]]] = {}
    for group in space.edge_groups(kind):
        stacks: dict[str, dict[str, Weight]] = {}
        for op, edges in space.rows(kind, group).items():
            one = space.table[op].weights(channels, group.stride)
            if edges and one:
                stacks[op] = {name: w._replace(shape=(len(edges), *w.shape)) for name, w in one.items()}
        declared[group.name] = stacks
    return declared


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


def _forward(
    program: CellProgram, weights: CellWeights, values: jax.Array, s0: jax.Array, s1: jax.Array, executed: jax.Array
) -> jax.Array:
    """All nodes after the cell: [2+N,B,H,W,C], or [N,B,h,w,C] of a reduction cell."""
    if cell_in_place.serves(program, weights, values, s0, s1):
        return cell_in_place.forward(program, weights, values, s0, s1, executed)
    space, kind = program.space, program.kind
    inputs = jnp.stack([s0, s1])
    groups = space.edge_groups(kind)
    if kind == "normal":
        nodes = jnp.concatenate([inputs, jnp.zeros((space.nodes, *s0.shape), s0.dtype)])
        slots = slots_of(space, kind, groups[0], values, executed)
        return _run_group(program, groups[0], weights["stride1"], slots, None, nodes)
    nodes = jnp.zeros((space.nodes, *output_shape(s0, 2)), s0.dtype)
    for group in groups:
        slots = slots_of(space, kind, group, values, executed)
        nodes = _run_group(program, group, weights[group.name], slots, inputs if group.stride == 2 else None, nodes)
    return nodes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
    program: CellProgram, weights: CellWeights, values: jax.Array, s0: jax.Array, s1: jax.Array, executed: jax.Array
) -> jax.Array:
    nodes = _forward(program, weights, values, s0, s1, executed)
    return nodes[2:] if program.kind == "normal" else nodes


def _mixed_fwd(
    program: CellProgram, weights: Any, values: Any, s0: Any, s1: Any, executed: Any
) -> tuple[jax.Array, Any]:
    wanted = Wanted(any(a.perturbed for a in jax.tree.leaves(weights, is_leaf=_is_primal)), values.perturbed)
    plain = jax.tree.map(lambda a: a.value, (weights, values, s0, s1, executed), is_leaf=_is_primal)
    nodes = _forward(program, *plain)
    out = nodes[2:] if program.kind == "normal" else nodes
    # The inputs of a normal cell are rows 0 and 1 of its nodes: keeping them again would double the residuals.
    inputs = None if program.kind == "normal" else plain[2:4]
    return out, (wanted, plain[0], plain[1], inputs, plain[4], nodes)


def _is_primal(a: Any) -> bool:
    return hasattr(a, "perturbed")


def _reverse(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    slots: Slots,
    sources: jax.Array | None,
    nodes: jax.Array,
    cotangents: tuple[jax.Array | None, jax.Array],
    wanted: Wanted,
) -> tuple[tuple[jax.Array | None, jax.Array], dict[str, Params], jax.Array]:
    """Cotangents of sources and nodes, of the stacks of a group, and of its gates [n]."""
    if cell_in_place.serves(program, {"": stacks}, slots.value, nodes, cotangents[1]):
        return cell_in_place.reverse_group(program, group, stacks, slots, sources, nodes, cotangents, wanted)
    carry, flats, dvalues = _reverse_group(program, group, stacks, slots, sources, nodes, cotangents, wanted)
    return carry, _unflatten(program, group, stacks, slots, flats) if wanted.weights else {}, dvalues


def _mixed_bwd(program: CellProgram, res: Any, ct: Any) -> Any:
    wanted, weights, values, inputs, executed, nodes = res
    space, kind = program.space, program.kind
    dvalues = jnp.zeros(values.shape, values.dtype)
    dweights: CellWeights = {}
    if isinstance(ct, SymbolicZero):
        ct = jnp.zeros(ct.shape, ct.dtype)
    sources = None if inputs is None else jnp.stack(inputs)
    ct_sources = None if sources is None else jnp.zeros_like(sources)
    ct_nodes = jnp.concatenate([jnp.zeros_like(nodes[:2]), ct]) if kind == "normal" else ct
    for group in reversed(space.edge_groups(kind)):
        slots = slots_of(space, kind, group, values, executed)
        outer = group.stride == 2
        carry, dstacks, dvalue = _reverse(
            program,
            group,
            weights[group.name],
            slots,
            sources if outer else None,
            nodes,
            (ct_sources if outer else None, ct_nodes),
            wanted,
        )
        ct_sources, ct_nodes = (carry[0] if outer else ct_sources), carry[1]
        dvalues = dvalues.at[np.asarray(group.edges)].set(dvalue.reshape(len(group.edges), -1))
        dweights[group.name] = dstacks
    source_cts = ct_nodes if kind == "normal" else ct_sources
    assert source_cts is not None
    return (
        dweights if wanted.weights else jax.tree.map(jnp.zeros_like, weights),
        dvalues,
        source_cts[0],
        source_cts[1],
        np.zeros(executed.shape, jax.dtypes.float0),
    )


_mixed.defvjp(_mixed_fwd, _mixed_bwd, symbolic_zeros=True)


def mixed_nodes(
    weights: CellWeights,
    values: jax.Array,
    executed: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    *,
    space: Space,
    kind: str,
    axis_name: str | None = None,
) -> jax.Array:
    """The intermediate nodes of a cell, executed operations only: X_n = sum_{edges into n} sum_k g_k op_k(x)  (eq. 7).

    Args:
      weights: as declared by `declare_edges`.
      values: float32[E,K], the gates of the executed slots.
      executed: int32[E,K], their operations; O (one past the last) executes nothing. Distinct within an edge.
      s0, s1: [B,H,W,C], the preprocessed outputs of the two previous cells.
      space, kind: static; kind is "normal" or "reduce".
      axis_name: mapped axis over which the batch is split.

    Returns:
      [N,B,h,w,C]; h = H, or ceil(H/2) in a reduction cell. Reverse mode only (see `mixed_nodes_reference`).
    """
    return _mixed(CellProgram(space, kind, axis_name), weights, values, s0, s1, executed)


def mixed_nodes_reference(
    weights: CellWeights,
    gates: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    *,
    space: Space,
    kind: str,
    axis_name: str | None = None,
) -> jax.Array:
    """The same nodes from all operations, X_n = sum_{edges into n} sum_o g_o op_o(x), unrolled, with plain autodiff.

    Args:
      gates: float32[E,O]; zeros for what is not executed.
      weights, s0, s1, space, kind, axis_name: as in `mixed_nodes`.

    Returns:
      [N,B,h,w,C]; any order and mode of derivative.
    """
    leaves = reference_leaves(axis_name)
    nodes: dict[int, jax.Array] = {0: s0, 1: s1}
    groups = space.edge_groups(kind)
    for e, (j, n) in enumerate(space.edges):
        group = next(g for g in groups if e in g.edges)
        for o, op in enumerate(space.ops):
            members = space.rows(kind, group)[op]
            if e not in members:
                continue
            row = members.index(e)
            params = {name: stack[row] for name, stack in weights[group.name].get(op, {}).items()}
            y = apply_op(space, op, params, nodes[j], group.stride, leaves)
            term = gates[e, o].astype(y.dtype) * y
            nodes[n] = nodes[n] + term if n in nodes else term
    shape = output_shape(s0, 1 if kind == "normal" else 2)
    return jnp.stack([nodes.get(n, jnp.zeros(shape, s0.dtype)) for n in range(2, 2 + space.nodes)])
