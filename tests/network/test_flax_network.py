"""Every primitive, whole cells and the search network against flax.linen, in float64: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax_oracles
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax.gates import Gates
from prdarts_jax.ops.layer_set import fast_layers
from prdarts_jax.ops.primitives import PRIMITIVES
from prdarts_jax.space import supernet
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.spec import CELL_TYPES, Space


def _assert_same(ours: Callable[..., jax.Array], theirs: Callable[..., jax.Array], *args: Any) -> None:
    """Values, and gradients in every argument for a random cotangent."""

    @oracles.quick_jit
    def run(*args: Any) -> Any:
        both = []
        for f in (ours, theirs):
            y, pull = jax.vjp(f, *args)
            both.append((y, pull(jnp.asarray(oracles.normal(99, y.shape)))))
        return both

    a, b = run(*jax.tree.map(jnp.asarray, args))
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, mine), other in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert mine.dtype == np.float64
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-10, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name: str, stride: int) -> None:
    with jax.enable_x64(True):
        params = oracles.float64(oracles.drawn(PRIMITIVES[name].weights(4, stride)))
        _assert_same(
            lambda p, x: PRIMITIVES[name].apply(p, x, stride, fast_layers()),
            lambda p, x: flax_oracles.primitive(name, p, x, stride),
            params,
            oracles.normal(2, (3, 7, 6, 4)),
        )


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize(
    "space",
    [pytest.param(Space(nodes=1), marks=pytest.mark.slow), Space(nodes=2, ops=("skip_connect", "dil_conv_3x3"))],
    ids=["all-ops", "two-nodes"],
)
def test_cell(space: Space, kind: str) -> None:
    """All operations on all edges of a cell, through the scan and its rule."""
    with jax.enable_x64(True):
        executed = oracles.all_executed(space, kind)
        _assert_same(
            lambda w, g, s0, s1: mixed_nodes(w, g, executed, s0, s1, space=space, kind=kind),
            lambda w, g, s0, s1: flax_oracles.cell(space, kind, w, g, s0, s1),
            oracles.float64(oracles.drawn(declare_edges(space, kind, 4))),
            oracles.normal(3, (space.num_edges, space.num_ops)),
            oracles.normal(4, (2, 7, 6, 4)),
            oracles.normal(5, (2, 7, 6, 4)),
        )


@pytest.mark.slow
def test_search_network() -> None:
    """Stem, both kinds of preprocessing, both cell types, the order of the nodes, head with its norm; an odd size."""
    ops = ("none", "avg_pool_3x3", "skip_connect")
    space = Space(nodes=2, cells=4, channels=4, classes=5, ops=ops, head_norm=True)
    assert [c.kind[0] for c in space.layout] == list("nrrn")
    with jax.enable_x64(True):
        executed = {kind: oracles.all_executed(space, kind) for kind in CELL_TYPES}
        _assert_same(
            lambda w, g, x: supernet.apply(w, Gates(g, executed), x, space=space)[0],
            lambda w, g, x: flax_oracles.supernet(space, w, g, x),
            oracles.float64(oracles.drawn(supernet.declare(space))),
            {kind: oracles.normal(6 + i, (space.num_edges, space.num_ops)) for i, kind in enumerate(CELL_TYPES)},
            oracles.normal(8, (3, 9, 7, 3)),
        )
