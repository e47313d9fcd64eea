"""The mixed cell: X_n = sum over edges and executed operations of g * op(x)   (eq. 7).

Only the executed operations of an edge are computed. `mixed_nodes` runs the edges of a cell in a `lax.scan` whose body
is one `lax.switch` over the primitives, so a primitive is compiled once a shape rather than once an edge, and carries a
differentiation rule of its own: autodiff of such a scan would build a zero buffer of all nodes for each slice, and a
switch would store the residuals of all branches. The rule keeps the final nodes only (a node is final before an edge
leaves it), runs the edges in reverse, and recomputes each executed operation.

`mixed_nodes_reference` is the same sum, dense, unrolled, with plain autodiff: the oracle, and the way to forward-mode
and exact second-order derivatives on small spaces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.layers import Leaves, Weight, fast_leaves, reference_leaves
from prdarts_jax.ops.primitives import Params
from prdarts_jax.space.spec import EdgeGroup, Space

_Cotangents = tuple[jax.Array, jax.Array, jax.Array]  # of x, of the weights (flat), of the gate
CellWeights = dict[str, dict[str, Params]]  # stride1 | stride2 -> operation -> stacked arrays [rows, ...]


class CellProgram(NamedTuple):
    """Static arguments of a cell: hashable, so that equal cells share one trace."""

    space: Space
    kind: str
    axis_name: str | None


@jax.tree_util.register_static
class _Wanted(NamedTuple):
    """Which cotangents the differentiation asks for; known when the forward rule is traced."""

    weights: bool
    values: bool


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


def _apply(space: Space, op: str, params: Params, x: jax.Array, stride: int, leaves: Leaves) -> jax.Array:
    """One primitive as the search uses it: pools are normalised (without affine) when the space says so."""
    primitive = space.table[op]
    y = primitive.apply(params, x, stride, leaves)
    if primitive.group == "pool" and space.pool_norm:
        y = leaves.norm("bn", y)
    return y


# --- the sparse path --------------------------------------------------------------------------------------------------


class _Slots(NamedTuple):
    """What the scan reads per executed slot."""

    source: jax.Array  # int32[n]
    target: jax.Array  # int32[n]
    branch: jax.Array  # int32[n]: operation index; O = nothing is executed
    row: jax.Array  # int32[n]: row of the operation's weight stack
    value: jax.Array  # float32[n]: the gate


def _slots(space: Space, kind: str, group: EdgeGroup, values: jax.Array, executed: jax.Array) -> _Slots:
    """Slots of the edges of a group, edge-major. Source and target are node numbers 0..N+1."""
    edges = np.asarray(group.edges)
    k = executed.shape[1]
    ends = np.asarray(space.edges)[edges]
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

    source, target = (jnp.asarray(np.repeat(ends[:, i], k).astype(np.int32)) for i in (0, 1))
    return _Slots(source, target, pick(branch), pick(rows), values[edges].reshape(-1))


def _runs(program: CellProgram, group: EdgeGroup) -> dict[str, bool]:
    """Which operations compute anything on the edges of a group: `none`, and what no edge may use, do not."""
    rows = program.space.rows(program.kind, group)
    return {op: bool(edges) and program.space.table[op].group != "none" for op, edges in rows.items()}


def _read(nodes: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(nodes, index, 0, keepdims=False)


def _accumulate(nodes: jax.Array, index: jax.Array, term: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(nodes, _read(nodes, index) + term, index, 0)


def _row(stacks: dict[str, Params], op: str, row: jax.Array) -> Params:
    return jax.tree.map(lambda a: _read(a, row), stacks.get(op, {}))


def _output_shape(x: jax.Array, stride: int) -> tuple[int, int, int, int]:
    b, h, w, c = x.shape
    return b, -(-h // stride), -(-w // stride), c


def _run_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    slots: _Slots,
    sources: jax.Array | None,
    nodes: jax.Array,
) -> jax.Array:
    """Adds g * op(x) of every slot to its target. Sources: a buffer of their own, or (None) the nodes themselves."""
    space, stride = program.space, group.stride
    leaves = fast_leaves(program.axis_name)
    template = nodes[0] if sources is None else sources[0]

    def branch(op: str) -> Callable[..., jax.Array]:
        return lambda x, row: _apply(space, op, _row(stacks, op, row), x, stride, leaves)

    def void(x: jax.Array, row: jax.Array) -> jax.Array:
        return jnp.zeros(_output_shape(template, stride), x.dtype)

    branches = [branch(op) if runs else void for op, runs in _runs(program, group).items()] + [void]

    def body(nodes: jax.Array, slot: _Slots) -> tuple[jax.Array, None]:
        x = _read(nodes if sources is None else sources, slot.source)
        y = lax.switch(slot.branch, branches, x, slot.row)
        return _accumulate(nodes, slot.target, slot.value.astype(y.dtype) * y), None

    return lax.scan(body, nodes, slots)[0]


def _flat_sizes(stacks: dict[str, Params]) -> dict[str, int]:
    return {op: sum(int(np.prod(a.shape[1:])) for a in jax.tree.leaves(params)) for op, params in stacks.items()}


def _reverse_group(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    slots: _Slots,
    sources: jax.Array | None,
    nodes: jax.Array,
    cotangents: tuple[jax.Array | None, jax.Array],
    wanted: _Wanted,
) -> tuple[tuple[jax.Array | None, jax.Array], jax.Array, jax.Array]:
    """The slots in reverse: cotangents of sources and nodes, flat weight gradients [n, P], gate gradients [n]."""
    space, stride = program.space, group.stride
    leaves = fast_leaves(program.axis_name)
    width = max(_flat_sizes(stacks).values(), default=0) if wanted.weights else 0
    flat_dtype = wide_dtype(*jax.tree.leaves(stacks))
    value_dtype = slots.value.dtype

    def branch(op: str) -> Callable[..., _Cotangents]:
        def run(x: jax.Array, ct: jax.Array, row: jax.Array, value: jax.Array) -> _Cotangents:
            params = _row(stacks, op, row)
            seed = value.astype(ct.dtype) * ct
            if wanted.weights and params:
                y, pull = jax.vjp(lambda p, x: _apply(space, op, p, x, stride, leaves), params, x)
                dp, dx = pull(seed)
                flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(dp)])
                flat = jnp.pad(flat, (0, width - flat.shape[0]))
            else:
                y, pull = jax.vjp(lambda x: _apply(space, op, params, x, stride, leaves), x)
                (dx,) = pull(seed)
                flat = jnp.zeros((width,), flat_dtype)
            return dx, flat, _inner(y, ct).astype(value_dtype) if wanted.values else jnp.zeros((), value_dtype)

        return run

    def void(x: jax.Array, ct: jax.Array, row: jax.Array, value: jax.Array) -> _Cotangents:
        return jnp.zeros_like(x), jnp.zeros((width,), flat_dtype), jnp.zeros((), value_dtype)

    branches = [branch(op) if runs else void for op, runs in _runs(program, group).items()] + [void]
    own = sources is None

    def body(carry: tuple[jax.Array | None, jax.Array], slot: _Slots):
        ct_sources, ct_nodes = carry
        x = _read(nodes if sources is None else sources, slot.source)
        dx, flat, dvalue = lax.switch(slot.branch, branches, x, _read(ct_nodes, slot.target), slot.row, slot.value)
        if own:
            return (None, _accumulate(ct_nodes, slot.source, dx)), (flat, dvalue)
        assert ct_sources is not None
        return (_accumulate(ct_sources, slot.source, dx), ct_nodes), (flat, dvalue)

    carry, (flats, dvalues) = lax.scan(body, cotangents, slots, reverse=True)
    return carry, flats, dvalues


def _inner(y: jax.Array, ct: jax.Array) -> jax.Array:
    wide = wide_dtype(y)
    return jnp.sum(y.astype(wide) * ct.astype(wide))


def _unflatten(
    program: CellProgram, group: EdgeGroup, stacks: dict[str, Params], slots: _Slots, flats: jax.Array
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
    """All nodes after the cell: [2+N,B,H,W,C] for a normal cell, [N,B,h,w,C] for a reduction cell."""
    space, kind = program.space, program.kind
    inputs = jnp.stack([s0, s1])
    groups = space.edge_groups(kind)
    if kind == "normal":
        nodes = jnp.concatenate([inputs, jnp.zeros((space.nodes, *s0.shape), s0.dtype)])
        slots = _slots(space, kind, groups[0], values, executed)
        return _run_group(program, groups[0], weights["stride1"], slots, None, nodes)
    nodes = jnp.zeros((space.nodes, *_output_shape(s0, 2)), s0.dtype)
    for group in groups:
        slots = _shifted(_slots(space, kind, group, values, executed), group)
        nodes = _run_group(program, group, weights[group.name], slots, inputs if group.stride == 2 else None, nodes)
    return nodes


def _shifted(slots: _Slots, group: EdgeGroup) -> _Slots:
    """Node numbers of a reduction cell -> rows of its buffers: the nodes have a buffer without the two inputs."""
    source = slots.source if group.stride == 2 else slots.source - 2
    return slots._replace(source=source, target=slots.target - 2)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
    program: CellProgram, weights: CellWeights, values: jax.Array, s0: jax.Array, s1: jax.Array, executed: jax.Array
) -> jax.Array:
    nodes = _forward(program, weights, values, s0, s1, executed)
    return nodes[2:] if program.kind == "normal" else nodes


def _mixed_fwd(
    program: CellProgram, weights: Any, values: Any, s0: Any, s1: Any, executed: Any
) -> tuple[jax.Array, Any]:
    wanted = _Wanted(any(a.perturbed for a in jax.tree.leaves(weights, is_leaf=_is_primal)), values.perturbed)
    plain = jax.tree.map(lambda a: a.value, (weights, values, s0, s1, executed), is_leaf=_is_primal)
    nodes = _forward(program, *plain)
    out = nodes[2:] if program.kind == "normal" else nodes
    # The inputs of a normal cell are rows 0 and 1 of its nodes: keeping them again would double the residuals.
    inputs = None if program.kind == "normal" else plain[2:4]
    return out, (wanted, plain[0], plain[1], inputs, plain[4], nodes)


def _is_primal(a: Any) -> bool:
    return hasattr(a, "perturbed")


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
        slots = _slots(space, kind, group, values, executed)
        slots = slots if kind == "normal" else _shifted(slots, group)
        outer = group.stride == 2
        carry, flats, dvalue = _reverse_group(
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
        if wanted.weights:
            dweights[group.name] = _unflatten(program, group, weights[group.name], slots, flats)
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
            y = _apply(space, op, params, nodes[j], group.stride, leaves)
            term = gates[e, o].astype(y.dtype) * y
            nodes[n] = nodes[n] + term if n in nodes else term
    shape = _output_shape(s0, 1 if kind == "normal" else 2)
    return jnp.stack([nodes.get(n, jnp.zeros(shape, s0.dtype)) for n in range(2, 2 + space.nodes)])
