"""The mixed cell: executed operations only, with a rule of its own, against all operations with plain autodiff.

The two are the same sum, so values and gradients must agree to rounding (float64); what is not executed gets none.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cells import ALL_OPS, SPACES, cell_data, dense_reference, random_terms, sparse

from prdarts_jax.gates import Gates
from prdarts_jax.space.cell import mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.spec import CELL_TYPES, Space


def _compare(space: Space, kind: str, size: tuple[int, int], executed: np.ndarray) -> Any:
    with jax.enable_x64(True):
        weights, s0, s1, ops, ct = cell_data(space, kind, size)
        full = np.full((space.num_edges, space.num_ops), space.num_ops, np.int32)
        full[:, : executed.shape[1]] = executed  # one width for the reference, so that it is compiled once
        args = weights, s0, s1, ops, ct
        ours = sparse(space, kind)(*args, jnp.asarray(executed))
        theirs = dense_reference(space, kind)(*args, jnp.asarray(full))
    ours, theirs = jax.tree.map(np.asarray, (ours, theirs))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=jax.tree_util.keystr(path))
    dgates = ours[1][1]
    ran = np.zeros((space.num_edges, space.num_ops + 1), bool)
    np.put_along_axis(ran, executed, True, axis=1)
    assert np.all(dgates[~ran[:, :-1]] == 0) and np.all(theirs[1][1][~ran[:, :-1]] == 0)
    if space.nodes == 1:  # with more, an edge may read a node that nothing was added to
        assert np.all(dgates[ran[:, :-1] & ~space.group("none")[None, :]] != 0)
    return ours


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("k", [1, 8])
def test_all_eight_operations(kind: str, k: int) -> None:
    """For k < 8 several choices, together all eight operations on every edge; odd height, even width."""
    order = np.random.default_rng(1).permuted(np.tile(np.arange(8), (2, 1)), axis=1).astype(np.int32)
    for start in range(0, 8, k):
        executed = np.full_like(order, ALL_OPS.num_ops)  # void but for k: one width, so that it is compiled once
        executed[:, start : start + k] = order[:, start : start + k]
        _compare(ALL_OPS, kind, (5, 6), executed)


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize(("k", "void"), [(2, 0), (2, 3)])
def test_small_spaces(space: Space, kind: str, k: int, void: int) -> None:
    for seed in range(3):
        _compare(space, kind, (5, 6), random_terms(space, kind, k, seed, void=void))


def test_nothing_executed_gives_zeros() -> None:
    space = SPACES["two-nodes"]
    y, (dweights, dgates, ds0, ds1) = _compare(space, "reduce", (5, 6), np.full((5, 2), space.num_ops, np.int32))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((y, dweights, dgates, ds0, ds1)))


def test_weights_of_operations_that_did_not_run_get_zero() -> None:
    space = SPACES["two-nodes"]
    executed = random_terms(space, "normal", 1, 0)
    _, (dweights, *_) = _compare(space, "normal", (5, 6), executed)
    for e, o in enumerate(executed[:, 0]):
        for leaf in jax.tree.leaves(dweights["stride1"]["dil_conv_3x3"]):
            assert bool((leaf[e] != 0).any()) == (space.ops[o] == "dil_conv_3x3")


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_gradients_asked_for_separately_are_the_same(kind: str) -> None:
    """The rule computes only what is asked for: weights only, gates only, inputs only, or all at once."""
    space = SPACES["two-nodes"]
    executed = random_terms(space, kind, 2, 0)
    with jax.enable_x64(True):
        weights, s0, s1, ops, ct = cell_data(space, kind, (4, 3))

        def loss(weights: Any, ops: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
            values, terms = Gates({kind: ops}, {kind: jnp.asarray(executed)}).terms(kind)
            nodes = mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind)
            return jnp.vdot(nodes, jnp.sin(nodes) + ct)

        groups = ((0, 1, 2, 3), (0,), (1,), (3,))
        every = oracles.quick_jit(lambda *args: [jax.grad(loss, argnums=n)(*args) for n in groups])
        joint, *single = every(weights, ops, s0, s1)
    for (n,), (found,) in zip(groups[1:], single, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(joint[n]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_edge_weights_multiply_every_operation_of_an_edge() -> None:
    space, kind = SPACES["no-pool-norm"], "normal"
    with jax.enable_x64(True):
        weights, s0, s1, ops, _ = cell_data(space, kind, (4, 3))
        edges = jnp.array([0.5, -2.0])
        executed = jnp.array([[0, 1], [1, 0]], jnp.int32)

        @oracles.quick_jit
        def run(edges: jax.Array, ops: jax.Array) -> Any:
            def sparse(edges: jax.Array) -> jax.Array:
                values, terms = Gates({kind: ops}, {kind: executed}, {kind: edges}).terms(kind)
                return jnp.sum(mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind) ** 3)

            def dense(edges: jax.Array) -> jax.Array:
                gates = ops * edges[:, None]
                return jnp.sum(mixed_nodes_reference(weights, gates, s0, s1, space=space, kind=kind) ** 3)

            return jax.value_and_grad(sparse)(edges), jax.value_and_grad(dense)(edges)

        ours, theirs = run(edges, ops)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_bfloat16_keeps_its_dtype_and_float32_gradients_of_weights() -> None:
    space, kind = SPACES["two-nodes"], "reduce"
    weights, s0, s1, ops, ct = cell_data(space, kind, (5, 6), np.float32)
    executed = jnp.asarray(random_terms(space, kind, 2, 0))
    low = [a.astype(jnp.bfloat16) for a in (s0, s1)]
    y, grads = sparse(space, kind)(weights, *low, ops, ct.astype(jnp.bfloat16), executed)
    wide, wide_grads = sparse(space, kind)(weights, s0, s1, ops, ct, executed)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(grads[:2])} == {np.dtype(np.float32)}
    for a, b in zip(jax.tree.leaves((y, grads)), jax.tree.leaves((wide, wide_grads)), strict=True):
        error = np.linalg.norm(np.asarray(a, np.float32) - np.asarray(b)) / max(np.linalg.norm(b), 1e-6)
        assert error < 0.1  # bfloat16 keeps 8 bits, through a handful of layers
