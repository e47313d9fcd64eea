"""The mixed cell of partial channels on a CPU: its nodes one after the other, the mixed operations in place by kernels.

The kernels read and write whole rows, so the channels that go through the operations lie in a buffer of their own: of a
node first the sum of its terms, then, once the node is whole and shuffled, its first C/K channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.ops.primitives import Params
from prdarts_jax.space.cell_kernels import _run_group, reverse_group
from prdarts_jax.space.noise import CellNoise
from prdarts_jax.space.partial import factor_cotangent, head, passed, scaled, shuffled, tail, unshuffled
from prdarts_jax.space.spec import EdgeGroup, Space
from prdarts_jax.space.terms import CellProgram, CellWeights, Terms, Wanted, output_shape, rows_of, terms_of


def _incoming(space: Space, node: int) -> list[tuple[int, int]]:
    """(edge, source) of the edges that end in a node, numbered as in `Space.edges`."""
    return [(e, j) for e, (j, n) in enumerate(space.edges) if n == node]


def _of_node(space: Space, kind: str, group: EdgeGroup, terms: Terms, row: int) -> tuple[np.ndarray, Terms]:
    """The places of the terms that end in a row of the nodes, and these terms."""
    k = terms.branch.shape[0] // len(group.edges)
    places = np.flatnonzero(np.repeat(rows_of(space, kind, group)[1], k) == row)
    return places, jax.tree.map(lambda a: a[places], terms)


def _input_stride(kind: str) -> int:
    return 1 if kind == "normal" else 2


def forward(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array,
) -> jax.Array:
    """All nodes after the cell, the inputs of a normal cell among them."""
    space, kind = program.space, program.kind
    inputs, stride = jnp.stack([s0, s1]), _input_stride(kind)
    batch, h, w, channels = output_shape(s0, stride)
    heads = jnp.zeros((space.nodes, batch, h, w, channels // space.partial), s0.dtype)
    first = 0
    if kind == "normal":
        heads, first = jnp.concatenate([head(space, inputs), heads]), 2
    passing = {j: passed(tail(space, x), stride) for j, x in enumerate((s0, s1))}
    nodes = []
    by_stride = {group.stride: group for group in space.edge_groups(kind)}
    if outer := by_stride.get(2):
        terms = terms_of(space, kind, outer, values, executed, noise)
        heads = _run_group(program, outer, weights[outer.name], terms, head(space, inputs), heads, noise)
    for n in range(2, 2 + space.nodes):
        row = first + n - 2
        if inner := by_stride.get(1):
            terms = terms_of(space, kind, inner, values, executed, noise)
            places, mine = _of_node(space, kind, inner, terms, row)
            if len(places):
                heads = _run_group(program, inner, weights[inner.name], mine, None, heads, noise)
        beside = sum(scaled(factors[e], passing[j]) for e, j in _incoming(space, n))
        node = shuffled(space, heads[row], jnp.asarray(beside))
        heads, passing[n] = heads.at[row].set(head(space, node)), tail(space, node)
        nodes.append(node)
    return jnp.concatenate([inputs, jnp.stack(nodes)]) if kind == "normal" else jnp.stack(nodes)


def reverse(
    program: CellProgram,
    weights: CellWeights,
    values: jax.Array,
    inputs: tuple[jax.Array, jax.Array] | None,
    executed: jax.Array,
    noise: CellNoise | None,
    factors: jax.Array,
    nodes: jax.Array,
    ct: jax.Array,
    wanted: Wanted,
) -> tuple[CellWeights, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cotangents of weights (empty unless they are wanted), gates, both inputs and factors.

    Args:
      inputs: of a reduction cell; those of a normal one are its first two nodes.
      nodes: what `forward` gives.
      ct: [N,B,h,w,C], of the intermediate nodes.
    """
    space, kind, stride = program.space, program.kind, _input_stride(program.kind)
    first = 2 if inputs is None else 0
    s0, s1 = (nodes[0], nodes[1]) if inputs is None else inputs
    heads, cts = head(space, nodes), head(space, ct)
    if kind == "normal":
        cts = jnp.concatenate([jnp.zeros_like(cts[:1]), jnp.zeros_like(cts[:1]), cts])
    by_stride = {group.stride: group for group in space.edge_groups(kind)}
    dvalues, dfactors = jnp.zeros_like(values), jnp.zeros_like(factors)
    dweights: CellWeights = {}

    def add(group: EdgeGroup, places: np.ndarray, dstacks: dict[str, Params], dvalue: jax.Array) -> None:
        nonlocal dvalues
        edges, k = np.asarray(group.edges)[places // values.shape[1]], places % values.shape[1]
        dvalues = dvalues.at[edges, k].set(dvalue)
        before = dweights.get(group.name)
        dweights[group.name] = dstacks if before is None else jax.tree.map(jnp.add, before, dstacks)

    ct_passing = {2 + n: tail(space, ct[n]) for n in range(space.nodes)}
    passing = {2 + n: tail(space, nodes[first + n]) for n in range(space.nodes)}
    pulls = {}
    for j, x in enumerate((s0, s1)):
        passing[j], pulls[j] = jax.vjp(lambda x: passed(x, stride), tail(space, x))
        ct_passing[j] = jnp.zeros_like(passing[j])
    for n in range(1 + space.nodes, 1, -1):
        row = first + n - 2
        whole = unshuffled(space, jnp.concatenate([cts[row], ct_passing[n]], axis=-1))
        cts, beside = cts.at[row].set(head(space, whole)), tail(space, whole)
        for e, j in _incoming(space, n):
            ct_passing[j] = ct_passing[j] + scaled(factors[e], beside)
            if wanted.factors:
                dfactors = dfactors.at[e].set(factor_cotangent(factors, beside, passing[j]))
        if inner := by_stride.get(1):
            terms = terms_of(space, kind, inner, values, executed, noise)
            places, mine = _of_node(space, kind, inner, terms, row)
            if len(places):
                stacks = weights[inner.name]
                (_, cts), dstacks, dvalue = reverse_group(
                    program, inner, stacks, mine, None, heads, (None, cts), wanted, noise
                )
                add(inner, places, dstacks, dvalue)
    ct_inputs = (cts[0], cts[1])
    if outer := by_stride.get(2):
        terms, sources = terms_of(space, kind, outer, values, executed, noise), head(space, jnp.stack([s0, s1]))
        before, stacks = (jnp.zeros_like(sources), cts), weights[outer.name]
        (after, _), dstacks, dvalue = reverse_group(
            program, outer, stacks, terms, sources, heads, before, wanted, noise
        )
        assert after is not None
        ct_inputs = (after[0], after[1])
        add(outer, np.arange(terms.branch.shape[0]), dstacks, dvalue)
    ds0, ds1 = (jnp.concatenate([ct_inputs[j], pulls[j](ct_passing[j])[0]], axis=-1) for j in (0, 1))
    return dweights, dvalues, ds0, ds1, dfactors
