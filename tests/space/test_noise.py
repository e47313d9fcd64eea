"""Drop-path and dropout in the cells: the same masks in every lowering and on any number of devices."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cells import cell_data, random_terms
from jax.sharding import PartitionSpec

from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.ops.layers import draw
from prdarts_jax.space import supernet
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.noise import CellNoise, Noise, cell_noise
from prdarts_jax.space.spec import CELL_TYPES, Space

_OPS = ("skip_connect", "max_pool_3x3", "dil_conv_3x3")
_LISTS = (_OPS[:1], _OPS[1:], _OPS[::2], _OPS[1:2], _OPS)
SPACE = Space(nodes=2, ops=_OPS, edge_ops=(_LISTS, _LISTS[::-1]))
SKIPS = Space(nodes=2, ops=("skip_connect",))
RATES = {"drop_path": 0.4, "dropout/skip_connect": 0.3, "dropout/dil_conv_3x3": 0.2}
POSITIONS = np.arange(5, 7, dtype=np.int32)


def _noise(space: Space, rates: dict[str, Any], positions: Any = POSITIONS, *, cell: int = 2, seed: int = 0) -> Any:
    key, rates = jax.random.key(seed), {name: jnp.float32(rate) for name, rate in rates.items()}
    return cell_noise(Noise(key, jnp.asarray(positions), rates), space, cell)


@cache
def _cell(kind: str, lowering: str) -> Any:
    """Compiled once for all rates: nodes, and gradients in weights, gates and inputs."""

    def nodes(noise: CellNoise | None, executed: Any, weights: Any, ops: Any, s0: Any, s1: Any) -> jax.Array:
        gates = Gates({kind: ops}, {kind: executed})
        if lowering == "reference":
            return mixed_nodes_reference(weights, gates.dense(kind), s0, s1, space=SPACE, kind=kind, noise=noise)
        return mixed_nodes(weights, *gates.terms(kind), s0, s1, space=SPACE, kind=kind, noise=noise)

    @oracles.quick_jit
    def run(noise: CellNoise | None, executed: Any, weights: Any, s0: Any, s1: Any, ops: Any, ct: Any) -> Any:
        y, pull = jax.vjp(lambda *args: nodes(noise, executed, *args), weights, ops, s0, s1)
        return y, pull(ct)

    return run


def _run(kind: str, lowering: str, rates: dict[str, Any] | None, dtype: Any) -> Any:
    args = cell_data(SPACE, kind, (5, 6), dtype)
    noise = None if rates is None else _noise(SPACE, rates)
    executed = jnp.asarray(random_terms(SPACE, kind, 3, 1, void=1))
    return jax.tree.map(np.asarray, _cell(kind, lowering)(noise, executed, *args))


def _assert_close(ours: Any, theirs: Any, relative: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_lowerings_draw_the_same_masks(kind: str) -> None:
    """Values and gradients in weights, gates and inputs, of one compiled program at all rates; at 0 without noise."""
    oracles.require_kernels()
    off = dict.fromkeys(RATES, 0.0)
    with jax.enable_x64(True):
        reference, wide = (_run(kind, lowering, RATES, np.float64) for lowering in ("reference", "sparse"))
        plain = _run(kind, "sparse", None, np.float64)
        _assert_close(wide, reference, 1e-12)
        for a, b in zip(*map(jax.tree.leaves, (_run(kind, "sparse", off, np.float64), plain)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)  # sums are in another order
    assert np.abs(plain[0] - reference[0]).max() > 0.5  # the masks were put to the test
    _assert_close(_run(kind, "sparse", RATES, np.float32), reference, 1e-5)
    _assert_close(_run(kind, "sparse", off, np.float32), plain, 1e-5)
    assert _cell(kind, "sparse")._cache_size() == 3  # with noise in two dtypes, without in one


@pytest.mark.slow
def test_second_order_through_the_masks() -> None:
    """The gradient of a gradient's square norm; the masks are constants in both."""
    executed = jnp.asarray(random_terms(SPACE, "normal", 3, 1))
    with jax.enable_x64(True):
        weights, s0, s1, ops, ct = cell_data(SPACE, "normal", (4, 3))

        def squared(ops: jax.Array, noise: CellNoise, cell: Any, terms: Any) -> jax.Array:
            def loss(ops: jax.Array) -> jax.Array:
                gates = terms(Gates({"normal": ops}, {"normal": executed}))
                return jnp.vdot(jnp.sin(cell(weights, *gates, s0, s1, space=SPACE, kind="normal", noise=noise)), ct)

            return jnp.sum(jax.grad(loss)(ops) ** 2)

        of_rule = (mixed_nodes, lambda gates: gates.terms("normal"))
        of_reference = (mixed_nodes_reference, lambda gates: (gates.dense("normal"),))
        found, expected = (
            oracles.quick_jit(lambda ops, noise, how=how: jax.grad(squared)(ops, noise, *how))(
                ops, _noise(SPACE, RATES)
            )
            for how in (of_rule, of_reference)
        )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# --- the distribution -------------------------------------------------------------------------------------------------


def _skips(noise: CellNoise | None, s0: Any, s1: Any, kind: str = "normal") -> np.ndarray:
    """The nodes of a cell of skip connections alone, all gates 1."""
    executed = jnp.zeros((SKIPS.num_edges, 1), jnp.int32)
    values = jnp.ones((SKIPS.num_edges, 1), jnp.float32)
    weights = draw(jax.random.key(0), declare_edges(SKIPS, kind, np.shape(s0)[3]))
    args = (jnp.asarray(s, jnp.float32) for s in (s0, s1))
    return np.asarray(mixed_nodes(weights, values, executed, *args, space=SKIPS, kind=kind, noise=noise))


def test_drop_path_takes_each_edge_of_each_image_by_itself() -> None:
    """Node 2 is m0 s0 + m1 s1, node 3 is m2 s0 + m3 s1 + m4 node 2: all the multipliers can be read off."""
    images, p = 2000, 0.3
    s0, s1 = np.full((images, 1, 1, 1), 1.0), np.full((images, 1, 1, 1), 100.0)
    first, second = _skips(_noise(SKIPS, {"drop_path": p}, np.arange(images)), s0, s1)[:, :, 0, 0, 0]
    keep = 1 / (1 - p)
    units = np.rint(first / keep)
    m0, m1 = units % 2 == 1, units >= 100
    np.testing.assert_allclose(first, keep * (m0 + 100 * m1), rtol=1e-6)
    matches = []
    for m2, m3, m4 in np.ndindex(2, 2, 2):
        matches.append(np.isclose(second, keep * (m2 + 100 * m3 + m4 * first), rtol=1e-5))
    # Where node 2 is 0 its edge cannot be seen.
    visible = first > 0
    masks = np.argmax(np.stack(matches), axis=0)
    assert np.stack(matches).any(axis=0).all()
    columns = np.stack([m0, m1, *((masks // power % 2 == 1) for power in (4, 2, 1))])[:, visible]
    deviation = 4 * np.sqrt(p * (1 - p) / visible.sum())
    assert np.abs(columns[2:].mean(axis=1) - (1 - p)).max() < deviation
    assert np.abs(np.stack([m0, m1]).mean(axis=1) - (1 - p)).max() < 4 * np.sqrt(p * (1 - p) / images)
    assert np.abs(np.corrcoef(columns[2:]) - np.eye(3)).max() < 4 / np.sqrt(visible.sum())


def test_dropout_takes_each_element_by_itself() -> None:
    """Of the identity: what is kept is divided by 1 - p; edges, images and elements differ."""
    p, shape = 0.25, (6, 10, 10, 8)
    noise = _noise(SKIPS, {"dropout/skip_connect": p}, np.arange(6))
    nodes = _skips(noise, np.full(shape, 1.0), np.full(shape, 100.0))
    keep = 1 / (1 - p)
    units = np.rint(nodes[0] / keep)
    m0, m1 = units % 2 == 1, units >= 100
    np.testing.assert_allclose(nodes[0], keep * (m0 + 100.0 * m1), rtol=1e-6)
    deviation = 4 * np.sqrt(p * (1 - p) / m0.size)
    assert np.abs(m0.mean() - (1 - p)) < deviation and np.abs(m1.mean() - (1 - p)) < deviation
    pairs = np.stack([m0.ravel(), m1.ravel(), np.roll(m0, 1, 0).ravel(), np.roll(m0, 1, 2).ravel()])
    assert np.abs(np.corrcoef(pairs) - np.eye(4)).max() < 4 / np.sqrt(m0.size)


def test_a_strided_skip_connection_has_no_dropout() -> None:
    """Source: P-DARTS drops what `Identity` makes, and a skip connection of stride 2 is none."""
    rng = np.random.default_rng(0)
    s0, s1 = rng.normal(size=(2, 2, 4, 4, 2))
    plain = _skips(None, s0, s1, "reduce")
    dropped = _skips(_noise(SKIPS, {"dropout/skip_connect": 0.5}), s0, s1, "reduce")
    np.testing.assert_array_equal(dropped[0], plain[0])  # two edges of stride 2
    assert (dropped[1] != plain[1]).any()  # and one of stride 1


def test_masks_belong_to_key_cell_and_place_in_the_global_batch() -> None:
    rng = np.random.default_rng(0)
    s0, s1 = rng.normal(size=(2, 6, 3, 3, 2))
    rates = {"drop_path": 0.5, "dropout/skip_connect": 0.5}
    whole = _skips(_noise(SKIPS, rates, np.arange(6)), s0, s1)
    part = _skips(_noise(SKIPS, rates, np.arange(6)[2:4]), s0[2:4], s1[2:4])
    np.testing.assert_array_equal(part, whole[:, 2:4])
    for changed in ({"cell": 3}, {"seed": 1}):
        assert (_skips(_noise(SKIPS, rates, np.arange(6), **changed), s0, s1) != whole).any()


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="noise: unknown value 'dropout/skip_conect'; did you mean 'dropout/skip_con"):
        _noise(SKIPS, {"dropout/skip_conect": 0.1})


# --- the network ------------------------------------------------------------------------------------------------------


def test_the_network_on_one_device_and_on_two() -> None:
    """Cells of both types, two of them equal and run by a scan; the logits, against the reference too."""
    if jax.device_count() < 2:
        pytest.skip("one device")
    space = Space(nodes=3, cells=6, channels=2, classes=3, in_channels=1, ops=("skip_connect",))
    assert any(len(run) > 1 for run in space.runs)
    weights, rng = supernet.init(jax.random.key(0), space), np.random.default_rng(0)
    executed = {kind: oracles.all_executed(space, kind) for kind in CELL_TYPES}
    gates = {kind: jnp.asarray(rng.uniform(size=(space.num_edges, 1)), jnp.float32) for kind in CELL_TYPES}
    images = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
    rates = {"drop_path": jnp.float32(0.3), "dropout/skip_connect": jnp.float32(0.3)}

    def program(images: Any, positions: Any, *, axis: str | None = None, apply: Any = supernet.apply) -> Any:
        noise = Noise(jax.random.key(7), positions, rates)
        return apply(weights, Gates(gates, executed), images, space=space, axis_name=axis, noise=noise)[0]

    args = images, jnp.arange(4, dtype=jnp.int32)
    one = oracles.quick_jit(program)(*args)
    reference = oracles.quick_jit(lambda *args: program(*args, apply=supernet.apply_reference))(*args)
    split = PartitionSpec(sharding.AXIS)
    mesh = sharding.make_mesh(jax.devices()[:2])
    mapped = sharding.map_over(mesh, lambda *args: program(*args, axis=sharding.AXIS), (split, split), split)
    two = oracles.quick_jit(mapped)(*args)
    np.testing.assert_allclose(one, reference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(two, reference, rtol=1e-4, atol=1e-5)
