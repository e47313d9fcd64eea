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

from prdarts_jax import bilevel, strategies
from prdarts_jax.bilevel import Batch, Batches
from prdarts_jax.config import ArchConfig, WeightsConfig
from prdarts_jax.gates import Gates
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space

OPS = ("skip_connect", "dil_conv_3x3", "max_pool_3x3", "none")
DEEP = Space(nodes=2, cells=12, channels=2, classes=3, in_channels=1, ops=OPS)  # runs of two cells in all three stages
STEM = Space(nodes=3, cells=6, channels=2, classes=3, in_channels=1, ops=OPS[:2])  # the first two are equal


def _images(batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, 7, 6, 1))


def _gates(space: Space, *leading: int) -> Gates:
    rng = np.random.default_rng(1)
    ops = {kind: jnp.asarray(rng.uniform(0.2, 1.0, (*leading, space.num_edges, space.num_ops))) for kind in CELL_TYPES}
    executed = {k: jnp.asarray(np.argsort(rng.random(v.shape))[..., :2], jnp.int32) for k, v in ops.items()}
    return Gates(ops, executed)


def _gradients(apply: Any, weights: Any, gates: Gates, images: jax.Array, space: Space = DEEP) -> tuple[Any, Any]:
    """(value, gradients of the weights and of the gates)."""

    def loss(weights: Any, ops: Any) -> jax.Array:
        logits, aux = apply(weights, gates.replace(ops=ops), images, space=space)
        return jnp.sum(jnp.sin(logits)) + jnp.sum(jnp.sin(aux["features"]))

    return oracles.quick_jit(jax.value_and_grad(loss, (0, 1)))(weights, gates.ops)


@pytest.mark.parametrize("cells", range(3, 24))
def test_runs_are_the_longest_of_equal_cells(cells: int) -> None:
    layout, runs = Space(cells=cells).layout, Space(cells=cells).runs
    assert [i for run in runs for i in run] == list(range(cells))
    assert all(layout[i] == layout[run[0]] for run in runs for i in run)
    assert all(layout[a[-1]] != layout[b[0]] for a, b in itertools.pairwise(runs))
    assert len(runs) <= 9


def test_weights_of_every_cell_are_its_own_draw() -> None:
    weights = supernet.init(jax.random.key(0), DEEP)
    cells = supernet.by_cell(weights, DEEP)
    assert [len(run) for run in DEEP.runs] == [1, 1, 2, 1, 1, 2, 1, 1, 2] and len(weights["cells"]) == 9
    for cell, params in zip(DEEP.layout, cells, strict=True):
        assert params["preprocess1"]["pointwise"].shape == (cell.channels_in[1], cell.channels)
        assert ("pointwise" in params["preprocess0"]) != cell.previous_reduced
    for first, second in ((2, 3), (6, 7), (10, 11)):
        for a, b in zip(jax.tree.leaves(cells[first]), jax.tree.leaves(cells[second]), strict=True):
            assert a.shape == b.shape and not np.any(np.asarray(a) == np.asarray(b))


@pytest.mark.parametrize("leading", [(), (DEEP.cells,)], ids=["gates-shared", "gates-per-cell"])
def test_scanned_cells_against_plain_autodiff_one_by_one(leading: tuple[int, ...]) -> None:
    with jax.enable_x64(True):
        weights = oracles.float64(supernet.init(jax.random.key(0), DEEP))
        gates, images = _gates(DEEP, *leading), jnp.asarray(_images())
        ours, theirs = (
            _gradients(apply, weights, gates, images) for apply in (supernet.apply, supernet.apply_reference)
        )
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=jax.tree_util.keystr(path))
    if leading:  # a cell has its own row of the gates, and only the rows of its own type
        for kind, gradient in ours[1][1].items():
            moved = np.any(np.asarray(gradient) != 0, axis=(1, 2))
            assert moved.tolist() == [cell.kind == kind for cell in DEEP.layout]


def test_a_run_may_begin_at_the_stem() -> None:
    """There the carry of the scan depends on no architecture, and gradients of weights leave it for the stem."""
    assert [len(run) for run in STEM.runs] == [2, 1, 1, 1, 1]
    with jax.enable_x64(True):
        weights = oracles.float64(supernet.init(jax.random.key(0), STEM))
        gates, images = _gates(STEM), jnp.asarray(_images())
        applies = supernet.apply, supernet.apply_reference
        ours, theirs = (_gradients(apply, weights, gates, images, STEM) for apply in applies)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=jax.tree_util.keystr(path))


def test_in_place_kernels_in_a_scan_over_cells() -> None:
    """Float32, where kernels write rows of buffers that the scan over cells keeps, against float64 without them."""
    oracles.require_kernels()
    weights, images = supernet.init(jax.random.key(0), DEEP), _images(8)
    gates = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype != jnp.int32 else a, _gates(DEEP))
    ours = _gradients(supernet.apply, weights, gates, jnp.asarray(images, jnp.float32))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (weights, gates.ops))
        exact = _gradients(supernet.apply_reference, wide[0], gates.replace(ops=wide[1]), jnp.asarray(images))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(exact), strict=True):
        scale = max(1e-3, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=2e-3 * scale, err_msg=jax.tree_util.keystr(path))


def test_gates_alone_ask_for_no_gradients_of_scanned_weights() -> None:
    oracles.require_kernels()
    weights = supernet.init(jax.random.key(0), DEEP)
    gates = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype != jnp.int32 else a, _gates(DEEP))

    def loss(weights: Any, ops: Any) -> jax.Array:
        images = jnp.asarray(_images(), jnp.float32)
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
        "weight_tx": bilevel.weight_transform(WeightsConfig()),
        "arch_tx": bilevel.arch_transform(ArchConfig()),
    }
    state = jax.eval_shape(lambda key: bilevel.init_state(key, **made), jax.random.key(0))
    batch = Batch(jnp.zeros((2, 7, 6, 1)), jnp.zeros((2,), jnp.int32))
    progress = {name: jnp.float32(value) for name, value in made["strategy"].schedule(0, 2).items()}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam does not trace under the strict one of these tests
        traced = jax.make_jaxpr(bilevel.make_search_step(**made))(
            state, Batches(batch, batch), jax.random.key(0), progress
        )
    return len(jax.tree.leaves(state)), _equations(traced.jaxpr)


def test_a_step_does_not_grow_with_the_number_of_equal_cells() -> None:
    """Runs are [1,1,2,1,1,2,1,1,2] of 12 cells and [1,1,5,1,1,5,1,1,5] of 21: the same program, other lengths."""
    assert _size(12) == _size(21)
    assert _size(9)[1] < _size(12)[1]  # equations are counted where they are
