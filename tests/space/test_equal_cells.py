"""Equal neighbouring cells of the search network: one entry of the weights, one scan, one compilation."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.extend import core

from prdarts_jax import optimizers, strategies
from prdarts_jax.bilevel import Batches
from prdarts_jax.config.search import ArchConfig, WeightsConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.gates import Gates
from prdarts_jax.searching import step as search_step
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space

OPS = ("skip_connect", "dil_conv_3x3", "max_pool_3x3", "none")
# Edges 02 12 03 13 23 04 14 24 34 have one or two operations each, and those of a cell and stride few altogether: the
# first decides the size of the unrolled reference, the second that of the scans.
_DIL, _POOL, _NONE, _SKIP = ("dil_conv_3x3",), ("max_pool_3x3",), ("none",), ("skip_connect",)
_NORMAL = (_DIL + _POOL, _NONE, _NONE, _POOL, _DIL, _NONE, _NONE, _POOL + _NONE, _NONE)
_REDUCE = (_SKIP + _DIL, _SKIP, _NONE, _DIL, _POOL, _NONE, _SKIP, _POOL, _POOL + _NONE)
# Three cells at the stem are equal, whose output is that of a cell of three nodes, and the last two of the network.
DEEP = Space(nodes=3, cells=10, channels=2, classes=3, in_channels=1, ops=OPS, edge_ops=(_NORMAL, _REDUCE))


def _images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 7, 6, 1))


def _gates(*leading: int) -> Gates:
    """Of every edge two of its operations, or void."""
    rng = np.random.default_rng(1)
    shape = (*leading, DEEP.num_edges, DEEP.num_ops)
    ops = {kind: rng.uniform(0.2, 1.0, shape) * DEEP.allowed[kind] for kind in CELL_TYPES}
    order = {kind: np.argsort(rng.random(shape) - DEEP.allowed[kind])[..., :2] for kind in CELL_TYPES}
    executed = {
        kind: np.where(np.take_along_axis(np.broadcast_to(DEEP.allowed[kind], shape), o, -1), o, DEEP.num_ops)
        for kind, o in order.items()
    }
    return Gates(
        {kind: jnp.asarray(a) for kind, a in ops.items()},
        {kind: jnp.asarray(a, jnp.int32) for kind, a in executed.items()},
    )


def _gradients(apply: Any) -> Any:
    """Compiled: (value, gradients of the weights and of the gates)."""

    def loss(weights: Any, ops: Any, executed: Any, images: jax.Array) -> jax.Array:
        logits, aux = apply(weights, Gates(ops, executed), images, space=DEEP)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(jnp.sin(aux["features"]))

    return oracles.quick_jit(jax.value_and_grad(loss, (0, 1)))


_ours, _theirs = _gradients(supernet.apply), _gradients(supernet.apply_reference)


def _one_by_one(weights: Any, gates: Gates, images: np.ndarray) -> Any:
    """The cells unrolled, in float64; gates of all cells are given to each, so that one program serves both kinds."""
    shared = gates.ops["normal"].ndim == 2
    rows = jax.tree.map(lambda a: jnp.broadcast_to(a, (DEEP.cells, *a.shape)) if shared else a, gates)
    value, (dweights, dops) = _theirs(weights, rows.ops, rows.executed, jnp.asarray(images))
    return value, (dweights, jax.tree.map(lambda a: a.sum(axis=0), dops) if shared else dops)


@pytest.fixture(scope="module")
def weights() -> Any:
    return jax.jit(lambda key: supernet.init(key, DEEP))(jax.random.key(0))


@pytest.mark.parametrize("cells", range(3, 24))
def test_runs_are_the_longest_of_equal_cells(cells: int) -> None:
    layout, runs = Space(cells=cells).layout, Space(cells=cells).runs
    assert [i for run in runs for i in run] == list(range(cells))
    assert all(layout[i] == layout[run[0]] for run in runs for i in run)
    assert all(layout[a[-1]] != layout[b[0]] for a, b in itertools.pairwise(runs))
    assert len(runs) <= 9


def test_weights_of_every_cell_are_its_own_draw(weights: Any) -> None:
    cells = supernet.by_cell(weights, DEEP)
    assert [len(run) for run in DEEP.runs] == [3, 1, 1, 1, 1, 1, 2] and len(weights["cells"]) == 7
    for cell, params in zip(DEEP.layout, cells, strict=True):
        assert params["preprocess1"]["pointwise"].shape == (cell.channels_in[1], cell.channels)
        assert ("pointwise" in params["preprocess0"]) != cell.previous_reduced
    for first, second in ((0, 1), (1, 2), (0, 2), (8, 9)):
        for a, b in zip(jax.tree.leaves(cells[first]), jax.tree.leaves(cells[second]), strict=True):
            assert a.shape == b.shape and not np.any(np.asarray(a) == np.asarray(b))


@pytest.mark.parametrize(
    "leading", [pytest.param((), marks=pytest.mark.slow), (DEEP.cells,)], ids=["gates-shared", "gates-per-cell"]
)
def test_scanned_cells_against_plain_autodiff_one_by_one(weights: Any, leading: tuple[int, ...]) -> None:
    """At the stem the carry of a scan depends on no architecture, and gradients of weights leave it for the stem."""
    with jax.enable_x64(True):
        wide, gates = oracles.float64(weights), _gates(*leading)
        ours = _ours(wide, gates.ops, gates.executed, jnp.asarray(_images()))
        theirs = _one_by_one(wide, gates, _images())
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=jax.tree_util.keystr(path))
    if leading:  # a cell has its own row of the gates, and only the rows of its own type
        for kind, gradient in ours[1][1].items():
            moved = np.any(np.asarray(gradient) != 0, axis=(1, 2))
            assert moved.tolist() == [cell.kind == kind for cell in DEEP.layout]


def test_in_place_kernels_in_a_scan_over_cells(weights: Any) -> None:
    """Float32, where kernels write rows of buffers that the scan over cells keeps, against float64 without them."""
    oracles.require_kernels()
    gates = _gates()
    ours = _ours(weights, gates.ops, gates.executed, jnp.asarray(_images(), jnp.float32))
    with jax.enable_x64(True):
        wide, ops = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (weights, gates.ops))
        exact = _one_by_one(wide, gates.replace(ops=ops), _images())
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(exact), strict=True):
        scale = max(1e-3, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=2e-3 * scale, err_msg=jax.tree_util.keystr(path))


def test_gates_alone_ask_for_no_gradients_of_scanned_weights(weights: Any) -> None:
    oracles.require_kernels()
    gates, images = _gates(), jnp.asarray(_images(), jnp.float32)

    def loss(weights: Any, ops: Any) -> jax.Array:
        return jnp.sum(supernet.apply(weights, gates.replace(ops=ops), images, space=DEEP)[0])

    texts = [jax.jit(jax.grad(loss, argnums=n)).lower(weights, gates.ops).as_text() for n in (0, 1)]
    assert "prdarts_term_backward" in texts[0] and "prdarts_term_input_gradient" not in texts[0]
    assert "prdarts_term_backward" not in texts[1] and "prdarts_term_input_gradient" in texts[1]


_JAXPRS = (core.Jaxpr, core.ClosedJaxpr)


def _equations(jaxpr: core.Jaxpr) -> int:
    count = 0
    for equation in jaxpr.eqns:
        count += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: isinstance(v, _JAXPRS)):
            if isinstance(value, _JAXPRS):
                count += _equations(getattr(value, "jaxpr", value))
    return count


def _size(cells: int) -> tuple[int, int]:
    """(leaves of the state, equations of a bilevel step)."""
    space = Space(nodes=1, cells=cells, channels=2, classes=3, in_channels=1, ops=OPS)
    made = {
        "space": space,
        "strategy": strategies.get("prdarts", space=space),
        "weight_tx": optimizers.weight_transform(WeightsConfig()),
        "arch_tx": optimizers.arch_transform(ArchConfig()),
    }
    state = jax.eval_shape(lambda key: search_step.init_state(key, **made), jax.random.key(0))
    batch = Batch(jnp.zeros((2, 7, 6, 1)), jnp.zeros((2,), jnp.int32))
    progress = {name: jnp.float32(value) for name, value in made["strategy"].schedule(0, 2).items()}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam does not trace under the strict one of these tests
        traced = jax.make_jaxpr(search_step.make_search_step(**made))(
            state, Batches(batch, batch), jax.random.key(0), progress
        )
    return len(jax.tree.leaves(state)), _equations(traced.jaxpr)


def test_a_step_does_not_grow_with_the_number_of_equal_cells() -> None:
    """Runs are [1,1,2,1,1,2,1,1,2] of 12 cells and [1,1,5,1,1,5,1,1,5] of 21: the same program, other lengths."""
    twelve = _size(12)
    assert twelve == _size(21)
    assert _size(9)[1] < twelve[1]  # equations are counted where they are
