"""The mixed cell unrolled, with plain automatic differentiation: the oracle of the other lowerings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prdarts_jax.ops.layer_set import reference_layers
from prdarts_jax.space.noise import CellNoise, path_dropped
from prdarts_jax.space.partial import factors_of, head, passed, scaled, shuffled, tail
from prdarts_jax.space.spec import Space
from prdarts_jax.space.terms import (
    CellWeights,
    apply_op,
    output_shape,
)


def mixed_nodes_reference(
    weights: CellWeights,
    gates: jax.Array,
    s0: jax.Array,
    s1: jax.Array,
    *,
    space: Space,
    kind: str,
    axis_name: str | None = None,
    noise: CellNoise | None = None,
    multipliers: jax.Array | None = None,
) -> jax.Array:
    """The same nodes from all operations, X_n = sum_{edges into n} sum_o g_o op_o(x), unrolled, with plain autodiff.

    Args:
      gates: float32[E,O]; zeros for what is not executed.
      weights, s0, s1, space, kind, axis_name, noise, multipliers: as in `mixed_nodes`.

    Returns:
      [N,B,h,w,C]; any order and mode of derivative.
    """
    layers = reference_layers(axis_name)
    nodes: dict[int, jax.Array] = {0: s0, 1: s1}
    groups = space.edge_groups(kind)
    factors = factors_of(space, multipliers, None, gates)
    for e, (j, n) in enumerate(space.edges):
        group = next(g for g in groups if e in g.edges)
        parts: list[jax.Array] = []
        for o, op in enumerate(space.ops):
            members = space.rows(kind, group)[op]
            if e not in members:
                continue
            row = members.index(e)
            params = {name: stack[row] for name, stack in weights[group.name].get(op, {}).items()}
            y = path_dropped(
                noise, e, apply_op(space, op, params, head(space, nodes[j]), group.stride, layers, noise, e)
            )
            parts.append(gates[e, o].astype(y.dtype) * y)
        if factors is not None:
            passing = path_dropped(noise, e, scaled(factors[e], passed(tail(space, nodes[j]), group.stride)))
            empty = jnp.zeros((*passing.shape[:3], nodes[j].shape[3] // space.partial), passing.dtype)
            parts = [shuffled(space, sum(parts, empty), passing)]
        for part in parts:
            nodes[n] = nodes[n] + part if n in nodes else part
    shape = output_shape(s0, 1 if kind == "normal" else 2)
    return jnp.stack([nodes.get(n, jnp.zeros(shape, s0.dtype)) for n in range(2, 2 + space.nodes)])
