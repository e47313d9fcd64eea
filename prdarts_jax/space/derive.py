"""What methods share: the start of the architecture, and the derivation of a genotype from scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from prdarts_jax.gates import AnyArray
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space

if TYPE_CHECKING:
    from jaxtyping import Float, PRNGKeyArray, Real


def init_normal(key: PRNGKeyArray, space: Space, scale: float) -> dict[str, Float[jax.Array, "E O"]]:
    """{"normal", "reduce"} -> scale * N(0,1), float32[E,O]: the usual start of architecture parameters."""
    shape = (space.num_edges, space.num_ops)
    return {kind: scale * jax.random.normal(jax.random.fold_in(key, i), shape) for i, kind in enumerate(CELL_TYPES)}


def derive_pairs(
    scores: Mapping[str, Real[AnyArray, "E O"]],
    space: Space,
    *,
    distinct_inputs: bool = True,
    pairs: int = 2,
    least: float = -float("inf"),
) -> Genotype:
    """Per node the best (operation, input) pairs by score, `none` left out.

    With distinct inputs this is the rule of DARTS: the edges with the best operation, each with that operation.

    Args:
      scores: {"normal", "reduce"} -> [E,O]; equal scores keep the order of edges and operations.
      space: the search space.
      distinct_inputs: at most one pair an input.
      pairs: pairs kept a node.
      least: pairs with a lower score are left out, so that a node may have fewer, or none.

    >>> scores = {kind: np.arange(112.0).reshape(14, 8) for kind in ("normal", "reduce")}
    >>> derive_pairs(scores, Space()).normal[0]
    (('dil_conv_5x5', 1), ('dil_conv_5x5', 0))
    >>> derive_pairs(scores, Space(), distinct_inputs=False).normal[0]
    (('dil_conv_5x5', 1), ('dil_conv_3x3', 1))
    """
    none = space.group("none")

    def cell(kind: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        table = np.asarray(scores[kind], np.float64)
        usable = space.allowed[kind] & ~none[None, :]
        nodes = []
        for node in range(2, 2 + space.nodes):
            candidates = [
                (-table[e, o], e, o)
                for e, (_, target) in enumerate(space.edges)
                if target == node
                for o in range(space.num_ops)
                if usable[e, o] and table[e, o] >= least
            ]
            chosen: list[tuple[str, int]] = []
            for _, e, o in sorted(candidates):
                source = space.edges[e][0]
                if len(chosen) < pairs and not (distinct_inputs and source in [j for _, j in chosen]):
                    chosen.append((space.ops[o], source))
            nodes.append(tuple(chosen))
        return tuple(nodes)

    concat = tuple(range(2, 2 + space.nodes))
    return Genotype(cell("normal"), concat, cell("reduce"), concat)


def derive_edges(
    scores: Mapping[str, Real[AnyArray, "E O"]],
    space: Space,
    *,
    per_edge: int = 1,
    least: float = -float("inf"),
    none_competes: bool = False,
) -> Genotype:
    """Every edge with its best operations by score: a node has as many pairs as come of its edges, or none.

    Args:
      scores: {"normal", "reduce"} -> [E,O]; equal scores keep the order of operations.
      space: the search space.
      per_edge: operations of an edge, at most.
      least: operations with a lower score are left out.
      none_competes: whether `none` has a place among the best of an edge; it is left out then.

    >>> scores = {kind: np.eye(14, 8) for kind in ("normal", "reduce")}
    >>> derive_edges(scores, Space(), none_competes=True).normal[:2]  # the edges 0 to 4; `none` is best on the first
    ((('max_pool_3x3', 1),), (('avg_pool_3x3', 0), ('skip_connect', 1), ('sep_conv_3x3', 2)))
    """
    none = space.group("none")

    def cell(kind: str) -> tuple[tuple[tuple[str, int], ...], ...]:
        table = np.asarray(scores[kind], np.float64)
        competing = space.allowed[kind] & (~none[None, :] | none_competes)
        nodes: list[list[tuple[str, int]]] = [[] for _ in range(space.nodes)]
        for e, (source, target) in enumerate(space.edges):
            best = sorted(np.flatnonzero(competing[e]).tolist(), key=lambda o: -table[e, o])[:per_edge]
            nodes[target - 2] += [(space.ops[o], source) for o in best if table[e, o] >= least and not none[o]]
        return tuple(map(tuple, nodes))

    concat = tuple(range(2, 2 + space.nodes))
    return Genotype(cell("normal"), concat, cell("reduce"), concat)
