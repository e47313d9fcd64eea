"""The cell whose terms are kernels (float32) against all operations with plain autodiff in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cells import ALL_OPS, CHANNELS, SPACES, cell_data, dense_reference, random_terms, sparse

from prdarts_jax.config.search import OPS
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.ops.layer_set import LayerSet
from prdarts_jax.ops.primitives import PRIMITIVES, Params, Primitive
from prdarts_jax.ops.separable import Unit
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.spec import CELL_TYPES, Space


def _triple_apply(params: Params, x: jax.Array, stride: int, leaves: LayerSet) -> jax.Array:
    return leaves.separable(("a", "b", "c"), x, _triple(params, stride))


def _triple(params: Params, stride: int) -> tuple[Unit, ...]:
    """Three units; the second takes twice the weights of the first."""
    depthwise, matrix = params["depthwise1"], params["pointwise1"]
    last = Unit(params["depthwise2"], params["pointwise2"])
    return Unit(depthwise, matrix, stride), Unit(2.0 * depthwise, matrix, dilation=2), last


TRIPLE = Primitive("conv", PRIMITIVES["sep_conv_3x3"].weights, _triple_apply, _triple)
# Every operation on the edge between the nodes and, two or three each, on those from the inputs: in a reduction cell of
# either stride.
_LISTS = (OPS[:3], OPS[3:5], OPS[5:], (OPS[1], *OPS[3:5]))
CASES = {
    "all": Space(nodes=2, edge_ops=((*_LISTS, OPS), (*_LISTS[::-1], OPS))),
    "three-nodes": SPACES["three-nodes"],
    "no-pool-norm": SPACES["no-pool-norm"],
    "own": Space(nodes=2, ops=("triple", "skip_connect"), primitives=(("triple", TRIPLE), *PRIMITIVES.items())),
    "no units": Space(nodes=2, ops=("avg_pool_3x3", "conv_7x1_1x7")),
}


def _both(space: Space, kind: str, executed: np.ndarray, programs: dict[int, Any]) -> tuple[Any, Any]:
    """`programs`: those compiled so far, by the number of terms of an edge."""
    size, terms = (6, 7), executed.shape[1]
    full = np.full((space.num_edges, space.num_ops), space.num_ops, np.int32)
    full[:, : executed.shape[1]] = executed  # one width for the reference, so that it is compiled once
    *args, ct = cell_data(space, kind, size, np.float32)
    if terms not in programs:
        lowered = sparse(space, kind).lower(*args, ct, jnp.asarray(executed))
        assert "prdarts_term_forward" in lowered.as_text()
        programs[terms] = lowered.compile()
    ours = programs[terms](*args, ct, jnp.asarray(executed))
    with jax.enable_x64(True):
        theirs = dense_reference(space, kind)(*cell_data(space, kind, size), jnp.asarray(full))
    return ours, theirs


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("name", CASES)
def test_nodes_and_gradients(name: str, kind: str) -> None:
    """Values and gradients in weights, gates and inputs; terms that execute nothing; odd and even sides."""
    oracles.require_kernels()
    space, programs = CASES[name], {}
    for k, void in ((1, 0), (space.num_ops, 2), (space.num_ops, 0)):
        ours, theirs = _both(space, kind, random_terms(space, kind, k, k, void=void), programs)
        for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
            scale = max(float(np.abs(b).max(initial=0)), 1e-3)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6 * scale, err_msg=jax.tree_util.keystr(path))


def test_the_first_of_equal_pixels_is_the_maximum() -> None:
    oracles.require_kernels()
    space, kind = SPACES["no-pool-norm"], "reduce"
    executed = jnp.full((space.num_edges, 1), space.ops.index("max_pool_3x3"), jnp.int32)
    weights, s0, s1, ops, ct = cell_data(space, kind, (6, 7), np.float32)
    args = (weights, jnp.round(s0), jnp.round(s1), ops, ct, executed)
    full = jnp.concatenate([executed, jnp.full_like(executed, space.num_ops)], axis=1)
    ours, theirs = sparse(space, kind)(*args), dense_reference(space, kind)(*args[:-1], full)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_gradients_asked_for_separately_have_the_same_bits(kind: str) -> None:
    oracles.require_kernels()
    executed = jnp.asarray(random_terms(ALL_OPS, kind, 2, 0))
    weights, s0, s1, ops, ct = cell_data(ALL_OPS, kind, (6, 7), np.float32)

    def loss(weights: Any, ops: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
        values, terms = Gates({kind: ops}, {kind: executed}).terms(kind)
        return jnp.vdot(mixed_nodes(weights, values, terms, s0, s1, space=ALL_OPS, kind=kind), ct)

    groups = ((0, 1, 2, 3), (0,), (1,), (3,))
    joint, *single = [oracles.quick_jit(jax.grad(loss, argnums=n))(weights, ops, s0, s1) for n in groups]
    for (n,), (found,) in zip(groups[1:], single, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(joint[n]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_two_cells_in_one_program_keep_apart() -> None:
    """The memory of one's units is that of the other's."""
    oracles.require_kernels()
    space, kind = SPACES["three-nodes"], "normal"
    executed = jnp.asarray(random_terms(space, kind, 2, 0))
    weights, s0, s1, ops, _ = cell_data(space, kind, (6, 6), np.float32)

    def cells(s0: jax.Array, s1: jax.Array, count: int) -> jax.Array:
        values, terms = Gates({kind: ops}, {kind: executed}).terms(kind)
        for _ in range(count):
            nodes = mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind)
            s0, s1 = s1, nodes[-1]
        return s1

    two = jax.jit(jax.grad(lambda s0, s1: jnp.sum(jnp.sin(cells(s0, s1, 2)))))
    first = jax.jit(lambda s0, s1: cells(s0, s1, 1))
    middle, pull = jax.vjp(first, s0, s1)
    last, pull_last = jax.vjp(first, s1, middle)
    from_s1, from_middle = pull_last(jnp.cos(last))
    del from_s1
    np.testing.assert_allclose(two(s0, s1), pull(from_middle)[0], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_no_node_is_copied(kind: str) -> None:
    """In the compiled program neither an array of all nodes nor the memory of the units is copied in or for a loop."""
    oracles.require_kernels()
    space = Space(nodes=3)
    weights, s0, s1, ops, ct = cell_data(space, kind, (6, 6), np.float32)
    executed = jnp.asarray(random_terms(space, kind, 2, 0))

    def run(weights: Any, ops: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
        values, terms = Gates({kind: ops}, {kind: executed}).terms(kind)
        nodes = mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind)
        if kind == "normal":
            nodes = mixed_nodes(weights, values, terms, nodes[0], nodes[1], space=space, kind=kind)
        return jnp.vdot(nodes, ct)

    text = jax.jit(jax.grad(run, argnums=(0, 1))).lower(weights, ops, s0, s1).compile().as_text()
    side = 6 if kind == "normal" else 3
    inputs = 2 if kind == "normal" else 0
    shapes = [f"f32[{n},2,{side},{side},{CHANNELS}]" for n in (2, space.nodes + inputs)]  # two units; all nodes
    assert all(shape in text for shape in shapes)
    copies = [line for line in text.splitlines() if " copy(" in line and any(f"= {s}" in line for s in shapes)]
    # What comes from outside the loops, or are zeros to begin with, is copied once.
    assert not [line for line in copies if "copy(%constant" not in line and "copy(%arg" not in line], copies


@pytest.mark.parametrize("op", ["max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_5x5"])
def test_nan_reaches_the_nodes(op: str) -> None:
    oracles.require_kernels()
    space, kind = Space(nodes=1, ops=(op, "skip_connect")), "normal"
    weights, s0, s1, ops, ct = cell_data(space, kind, (6, 6), np.float32)
    executed = jnp.zeros((space.num_edges, 1), jnp.int32)
    nodes, _ = sparse(space, kind)(weights, s0.at[0, 3, 3, 0].set(jnp.nan), s1, ops, ct, executed)
    assert bool(jnp.isnan(nodes).any())


def _narrow_apply(params: Params, x: jax.Array, stride: int, leaves: LayerSet) -> jax.Array:
    return leaves.separable(("a", "b"), x, _narrow(params, stride))


def _narrow(params: Params, stride: int) -> tuple[Unit, ...]:
    """A window, then a 1x1 unit whose factors are weights."""
    factors = params["depthwise2"][..., 1:2, 1:2, :]
    return Unit(params["depthwise1"], params["pointwise1"], stride), Unit(factors, params["pointwise2"])


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_more_channels_than_a_vector_and_more_images_than_parts(kind: str) -> None:
    """Channels that leave a vector part filled, strips that do not fill the image, 33 images."""
    oracles.require_kernels()
    narrow = Primitive("conv", PRIMITIVES["sep_conv_3x3"].weights, _narrow_apply, _narrow)
    ops_ = ("max_pool_3x3", "avg_pool_3x3", "narrow", "sep_conv_5x5")
    space = Space(nodes=1, ops=ops_, primitives=(("narrow", narrow), *PRIMITIVES.items()))
    shape, out = (33, 17, 18, 20), (33, 9, 9, 20) if kind == "reduce" else (33, 17, 18, 20)
    rng = np.random.default_rng(0)
    weights = oracles.drawn(declare_edges(space, kind, 20))
    arrays = [rng.normal(size=s) for s in (shape, shape, (space.num_edges, space.num_ops), (1, *out))]
    executed = jnp.tile(jnp.arange(space.num_ops, dtype=jnp.int32), (space.num_edges, 1))
    ours = sparse(space, kind)(weights, *(jnp.asarray(a, jnp.float32) for a in arrays), executed)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(np.float64), weights)
        theirs = dense_reference(space, kind)(wide, *map(jnp.asarray, arrays), executed)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (lambda p, stride: _triple(p, 1), "strides \\[1, 1, 1\\] on edges of stride 2"),
        (lambda p, stride: (), "strides \\[\\] on edges of stride 2"),
        (lambda p, stride: (Unit(jnp.ones((1, 1, 4)), p["pointwise1"], stride),), "since those of 2 edges are stacked"),
        (lambda p, stride: (Unit(p["depthwise1"][:1], p["pointwise1"], stride),), "since those of 2 edges are stacked"),
    ],
)
def test_units_that_cannot_be_those_of_the_operation_are_refused(units: Any, said: str) -> None:
    oracles.require_kernels()
    wrong = Primitive("conv", PRIMITIVES["sep_conv_3x3"].weights, _triple_apply, units)
    space = Space(nodes=1, ops=("wrong", "skip_connect"), primitives=(("wrong", wrong), *PRIMITIVES.items()))
    args = cell_data(space, "reduce", (6, 6), np.float32)
    with pytest.raises(UserError, match=said):
        sparse(space, "reduce").lower(*args, jnp.zeros((space.num_edges, 1), jnp.int32))
