"""The mixed cell: X_n = sum over edges and executed operations of g * op(x)   (eq. 7).

Only the executed operations of an edge are computed. `mixed_nodes` runs the edges of a cell in a `lax.scan` whose body
is one `lax.switch` over the primitives, so a primitive is compiled once a shape rather than once an edge, and carries a
differentiation rule of its own: autodiff of such a scan would build a zero buffer of all nodes for each slice, and a
switch would store the residuals of all branches. The rule keeps the final nodes only (a node is final before an edge
leaves it), runs the edges in reverse, and recomputes each executed operation. On a CPU, where CPU kernels serve,
`cell_kernels` does the same with sums in place.

`mixed_nodes_reference` is the same sum, dense, unrolled, with plain autodiff: the oracle, and the way to forward-mode
and exact second-order derivatives on small spaces.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from prdarts_jax.ops.layers import Weight
from prdarts_jax.ops.lowering import ANYWHERE, Lowering
from prdarts_jax.ops.primitives import Params
from prdarts_jax.space import cell_kernels, cell_partial, cell_waves
from prdarts_jax.space.cell_scan import _reverse_group, _run_group, _unflatten
from prdarts_jax.space.noise import CellNoise
from prdarts_jax.space.partial import factors_of, head, shuffled, tail, unshuffled
from prdarts_jax.space.spec import EdgeGroup, Space
from prdarts_jax.space.terms import (
    CellProgram,
    CellWeights,
    Terms,
    Wanted,
    output_shape,
    terms_of,
)


def declare_edges(space: Space, kind: str, channels: int) -> dict[str, dict[str, dict[str, Weight]]]:
    """The weights of all edges of a cell: {group: {op: {name: Weight stacked over the edges that may use the op}}}."""
    declared: dict[str, dict[str, dict[str, Weight]]] = {}
    for group in space.edge_groups(kind):
        stacks: dict[str, dict[str, Weight]] = {}
        for op, edges in space.rows(kind, group).items():
            one = space.table[op].weights(channels // space.partial, group.stride)
            if edges and one:
                stacks[op] = {name: w._replace(shape=(len(edges), *w.shape)) for name, w in one.items()}
        declared[group.name] = stacks
    return declared


def _forward(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array | None,
) -> jax.Array:
    """All nodes after the cell: [2+N,B,H,W,C], or [N,B,h,w,C] of a reduction cell."""
    args = (program, weights, values, s0, s1, executed, noise)

    def in_place() -> jax.Array:
        return cell_kernels.forward(*args) if factors is None else cell_partial.forward(*args, factors)

    return cell_kernels.where_served(program, (weights, values, s0, s1), in_place, lambda: _scanned(*args, factors))


def _scanned(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array | None,
) -> jax.Array:
    space, kind = program.space, program.kind
    inputs = jnp.stack([s0, s1])
    groups = space.edge_groups(kind)
    if kind == "normal":
        nodes = jnp.concatenate([inputs, jnp.zeros((space.nodes, *s0.shape), s0.dtype)])
        terms = terms_of(space, kind, groups[0], values, executed, noise)
        return _run_group(program, groups[0], weights["stride1"], terms, None, nodes, noise, factors)
    nodes = jnp.zeros((space.nodes, *output_shape(s0, 2)), s0.dtype)
    for group in groups:
        terms = terms_of(space, kind, group, values, executed, noise)
        sources = inputs if group.stride == 2 else None
        nodes = _run_group(program, group, weights[group.name], terms, sources, nodes, noise, factors)
        if group.stride == 2 and factors is not None:  # no edge of stride 1 ends in the first node
            nodes = nodes.at[0].set(shuffled(space, head(space, nodes[0]), tail(space, nodes[0])))
    return nodes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array | None,
) -> jax.Array:
    nodes = _forward(program, weights, values, s0, s1, executed, noise, factors)
    return nodes[2:] if program.kind == "normal" else nodes


def _mixed_fwd(
    program: CellProgram, weights: Any, values: Any, s0: Any, s1: Any, executed: Any, noise: Any, factors: Any
) -> tuple[jax.Array, Any]:
    some = [any(a.perturbed for a in jax.tree.leaves(tree, is_leaf=_is_primal)) for tree in (weights, values, factors)]
    wanted = Wanted(*some)
    plain = jax.tree.map(lambda a: a.value, (weights, values, s0, s1, executed, noise, factors), is_leaf=_is_primal)
    nodes = _forward(program, *plain)
    out = nodes[2:] if program.kind == "normal" else nodes
    # The inputs of a normal cell are rows 0 and 1 of its nodes: keeping them again would double the residuals.
    inputs = None if program.kind == "normal" else plain[2:4]
    return out, (wanted, plain[0], plain[1], inputs, *plain[4:], nodes)


def _is_primal(a: Any) -> bool:
    return hasattr(a, "perturbed")


def _reverse(
    program: CellProgram,
    group: EdgeGroup,
    stacks: dict[str, Params],
    terms: Terms,
    sources: jax.Array | None,
    nodes: jax.Array,
    cotangents: tuple[jax.Array | None, jax.Array],
    wanted: Wanted,
    noise: CellNoise | None,
    factors: jax.Array | None,
) -> tuple[tuple[jax.Array | None, jax.Array], dict[str, Params], jax.Array, jax.Array | None]:
    """Cotangents of sources and nodes, of the stacks of a group, of its gates [n], and of the factors of its edges."""
    args = (program, group, stacks, terms, sources, nodes, cotangents, wanted, noise)

    def in_place() -> Any:
        return *cell_kernels.reverse_group(*args), None

    def scanned() -> Any:
        carry, flats, dvalues, dfactors = _reverse_group(*args, factors)
        return carry, _unflatten(program, group, stacks, terms, flats) if wanted.weights else {}, dvalues, dfactors

    if factors is not None:
        return scanned()
    return cell_kernels.where_served(program, (stacks, terms.value, nodes, cotangents[1]), in_place, scanned)


def _mixed_bwd(program: CellProgram, res: Any, ct: Any) -> Any:
    wanted, weights, values, inputs, executed, noise, factors, nodes = res
    if isinstance(ct, SymbolicZero):
        ct = jnp.zeros(ct.shape, ct.dtype)
    args = (program, weights, values, inputs, executed, noise, factors, nodes, ct, wanted)
    if factors is None:
        found = _reverse_groups(*args)
    else:
        in_place, elsewhere = partial(cell_partial.reverse, *args), partial(_reverse_groups, *args)
        found = cell_kernels.where_served(program, (weights, values, nodes, ct), in_place, elsewhere)
    dweights, dvalues, ds0, ds1, dfactors = found
    if not wanted.weights:
        dweights = jax.tree.map(jnp.zeros_like, weights)
    return dweights, dvalues, ds0, ds1, None, None, dfactors


def _reverse_groups(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    inputs: tuple[jax.Array, jax.Array] | None,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array | None,
    nodes: jax.Array,
    ct: jax.Array,
    wanted: Wanted,
) -> tuple[CellWeights, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Cotangents of weights (empty unless they are wanted), gates, both inputs and factors; see `cell_partial`."""
    space, kind = program.space, program.kind
    dvalues = jnp.zeros(values.shape, values.dtype)
    dweights: CellWeights = {}
    dfactors = None
    if factors is not None:
        dfactors = jnp.zeros_like(factors)
        ct = ct.at[-1].set(unshuffled(space, ct[-1]))  # no edge leaves the last node
    sources = None if inputs is None else jnp.stack(inputs)
    ct_sources = None if sources is None else jnp.zeros_like(sources)
    ct_nodes = jnp.concatenate([jnp.zeros_like(nodes[:2]), ct]) if kind == "normal" else ct
    for group in reversed(space.edge_groups(kind)):
        terms = terms_of(space, kind, group, values, executed, noise)
        outer = group.stride == 2
        carry, dstacks, dvalue, dfactor = _reverse(
            program,
            group,
            weights[group.name],
            terms,
            sources if outer else None,
            nodes,
            (ct_sources if outer else None, ct_nodes),
            wanted,
            noise,
            factors,
        )
        ct_sources, ct_nodes = (carry[0] if outer else ct_sources), carry[1]
        dvalues = dvalues.at[np.asarray(group.edges)].set(dvalue.reshape(len(group.edges), -1))
        dweights[group.name] = dstacks
        if dfactors is not None and dfactor is not None:
            dfactors = dfactors + dfactor
    source_cts = ct_nodes if kind == "normal" else ct_sources
    assert source_cts is not None
    return dweights, dvalues, source_cts[0], source_cts[1], dfactors


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
    noise: CellNoise | None = None,
    multipliers: jax.Array | None = None,
    lowering: Lowering = ANYWHERE,
) -> jax.Array:
    """The intermediate nodes of a cell, executed operations only: X_n = sum_{edges into n} sum_k g_k op_k(x)  (eq. 7).

    Args:
      weights: as declared by `declare_edges`.
      values: float32[E,K], the gates of the executed terms.
      executed: int32[E,K], their operations; O (one past the last) executes nothing. Distinct within an edge.
      s0, s1: [B,H,W,C], the preprocessed outputs of the two previous cells.
      space, kind: static; kind is "normal" or "reduce".
      axis_name: mapped axis over which the batch is split.
      noise: drop-path and dropout of this cell; no gradient flows through it.
      multipliers: [E], of the edges, which `values` contain already: what the channels that pass by are multiplied by
        in a space of partial channels; None: 1.
      lowering: what the program is lowered for; a known platform is traced alone.

    Returns:
      [N,B,h,w,C]; h = H, or ceil(H/2) in a reduction cell. Reverse mode only (see `mixed_nodes_reference`).
    """
    dropout = () if noise is None else tuple(sorted(noise.rates))
    factors = factors_of(space, multipliers, noise, values)
    program = CellProgram(space, kind, axis_name, dropout, lowering)
    nodes = cell_waves.nodes if in_waves(lowering) else _mixed
    return nodes(program, weights, values, s0, s1, executed, noise, factors)


_GPU = ("gpu", "cuda", "rocm")  # what JAX calls a GPU, and its makers


def in_waves(lowering: Lowering) -> bool:
    """Whether a cell is run in waves: where it is asked for, and of itself on a GPU (docs/lowerings.md).

    >>> [in_waves(Lowering(platform)) for platform in ("cpu", "gpu", "tpu")]
    [False, True, False]
    >>> in_waves(Lowering("gpu", "scan")), in_waves(Lowering("tpu", "waves"))
    (False, True)
    """
    return lowering.cell == "waves" or (lowering.cell == "auto" and lowering.platform in _GPU)
