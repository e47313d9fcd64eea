"""Partial channels: the cell against a mixture of torch layers, and its lowerings against each other."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cells import random_terms

from prdarts_jax import presets
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.ops.layers import draw
from prdarts_jax.ops.pools import max_pool_2x2
from prdarts_jax.space import supernet
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.noise import CellNoise, Noise, cell_noise
from prdarts_jax.space.spec import CELL_TYPES, Space

CHANNELS, SIZE = 8, (7, 6)
_OPS = ("none", "skip_connect", "max_pool_3x3", "dil_conv_3x3")
_LISTS = (_OPS[1:2], _OPS[1:], _OPS[::3], _OPS[:3], _OPS)
SPACE = Space(nodes=2, ops=_OPS, edge_ops=(_LISTS, _LISTS[::-1]), partial=4)
RATES = {"drop_path": 0.4, "dropout/skip_connect": 0.3}


def _data(kind: str, dtype: Any, space: Space = SPACE) -> tuple[Any, ...]:
    """Weights, gates [E,O] and multipliers of the edges [E] of both signs, the inputs, a cotangent of the nodes."""
    rng = np.random.default_rng(0)
    drawn = draw(jax.random.key(0), declare_edges(space, kind, CHANNELS))
    out = tuple(-(-n // 2) for n in SIZE) if kind == "reduce" else SIZE
    inputs = [(3, *SIZE, CHANNELS)] * 2
    shapes = [(space.num_edges, space.num_ops), (space.num_edges,), *inputs, (space.nodes, 3, *out, CHANNELS)]
    weights = jax.tree.map(lambda a: jnp.asarray(a, dtype), drawn)
    return weights, *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def _nodes(kind: str, lowering: str, executed: Any, noise: CellNoise | None, args: tuple[Any, ...]) -> jax.Array:
    weights, ops, edges, s0, s1 = args
    gates = Gates({kind: ops}, {kind: executed}, {kind: edges})
    how = {"space": SPACE, "kind": kind, "noise": noise, "multipliers": edges}
    if lowering == "reference":
        return mixed_nodes_reference(weights, gates.dense(kind), s0, s1, **how)
    return mixed_nodes(weights, *gates.terms(kind), s0, s1, **how)


@cache
def _cell(kind: str, lowering: str) -> Any:
    """Nodes, and gradients in weights, gates, multipliers and inputs."""

    @oracles.quick_jit
    def run(noise: CellNoise | None, executed: Any, args: Any, ct: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *args: _nodes(kind, lowering, executed, noise, args), *args)
        return y, pull(ct)

    return run


def _run(kind: str, lowering: str, dtype: Any, executed: Any, noisy: bool = False) -> Any:
    *args, ct = _data(kind, dtype)
    noise = None
    if noisy:
        rates = {name: jnp.float32(rate) for name, rate in RATES.items()}
        noise = cell_noise(Noise(jax.random.key(1), jnp.arange(3, dtype=jnp.int32), rates), SPACE, 1)
    return jax.tree.map(np.asarray, _cell(kind, lowering)(noise, jnp.asarray(executed), tuple(args), ct))


def _assert_close(ours: Any, theirs: Any, relative: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.reference
@pytest.mark.parametrize("kind", CELL_TYPES)
def test_cell_of_torch_layers(kind: str) -> None:
    """Values and gradients; torch has a shuffle of channels of its own."""
    torch = oracles.require_torch()
    executed = oracles.all_executed(SPACE, kind)
    with jax.enable_x64(True):
        weights, ops, edges, s0, s1, ct = _data(kind, np.float64)
        found = _run(kind, "sparse", np.float64, executed)
    leaves = [oracles.torch_leaves(value) for value in (weights, ops, edges, s0, s1)]
    inputs = [oracles.nchw(leaf) for leaf in leaves[3:]]
    nodes = oracles.torch_partial_cell(SPACE, kind, *leaves[:3], *inputs)
    expected = torch.stack([oracles.nhwc(node) for node in nodes])
    expected.backward(torch.tensor(np.asarray(ct)))
    _assert_close(found, (expected.detach().numpy(), tuple(oracles.torch_grads(leaf) for leaf in leaves)), 1e-9)


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_lowerings_agree(kind: str) -> None:
    """The scan in float64 and the kernels in float32 against plain autodiff, under noise; some terms are empty."""
    oracles.require_kernels()
    executed = random_terms(SPACE, kind, 4, 1, void=2)
    with jax.enable_x64(True):
        reference, wide = (_run(kind, lowering, np.float64, executed, True) for lowering in ("reference", "sparse"))
    _assert_close(wide, reference, 1e-12)
    _assert_close(_run(kind, "sparse", np.float32, executed, True), reference, 1e-5)


@pytest.mark.parametrize(
    "dtype", [pytest.param(np.float64, marks=pytest.mark.slow), np.float32], ids=["scan", "kernels"]
)
def test_gradients_asked_for_separately_are_the_same(dtype: Any) -> None:
    kind, executed = "reduce", random_terms(SPACE, "reduce", 2, 0)
    with jax.enable_x64(dtype is np.float64):
        *args, ct = _data(kind, dtype)

        def loss(*args: Any) -> jax.Array:
            return jnp.vdot(_nodes(kind, "sparse", jnp.asarray(executed), None, args), ct)

        groups = ((0, 1, 2, 3, 4), (0,), (1,), (2,), (4,))
        joint, *single = oracles.quick_jit(lambda *args: [jax.grad(loss, argnums=n)(*args) for n in groups])(*args)
    for (n,), (found,) in zip(groups[1:], single, strict=True):
        _assert_close(found, joint[n], 1e-12 if dtype is np.float64 else 1e-5)


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["scan", "kernels"])
def test_what_passes_counts_once_an_edge(kind: str, dtype: Any) -> None:
    """Nothing is executed: node 2 is the shuffle of [0, sum of the edges' multiples], whatever the number of terms."""
    with jax.enable_x64(dtype is np.float64):
        found = _run(kind, "sparse", dtype, np.full((SPACE.num_edges, 4), SPACE.num_ops, np.int32))[0]
        edges, *inputs = (np.asarray(value) for value in _data(kind, dtype)[2:5])
    width = CHANNELS // 4
    expected = np.zeros(found.shape[1:])
    for e, x in zip(edges[:2], inputs, strict=True):
        rest = x[..., width:]
        if kind == "reduce":
            rest = _pooled(rest)
        for c in range(CHANNELS - width):  # channel i of group g goes to i K + g
            group, i = divmod(c + width, width)
            expected[..., 4 * i + group] += e * rest[..., c]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def _pooled(x: np.ndarray) -> np.ndarray:
    b, h, w, c = x.shape
    out = np.empty((b, -(-h // 2), -(-w // 2), c))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            out[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
    return out


def test_the_pool_of_what_passes() -> None:
    """Values by loops; of equal elements the first has the whole cotangent; NaN is not lost."""
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(max_pool_2x2(jnp.asarray(x)), _pooled(x))
    ones = jax.grad(lambda x: jnp.sum(max_pool_2x2(x)))(jnp.ones((1, 3, 4, 1)))
    expected = np.zeros((3, 4))
    expected[::2, ::2] = 1
    np.testing.assert_array_equal(ones[0, :, :, 0], expected)
    for place in ((0, 0), (1, 1), (2, 3)):
        assert bool(jnp.isnan(max_pool_2x2(jnp.asarray(x).at[(0, *place, 0)].set(jnp.nan))).any())


def test_the_network_and_its_weights() -> None:
    """The operations have C/K channels, all else is as wide as before; the logits against the reference."""
    space = Space(nodes=1, cells=3, channels=4, classes=3, in_channels=1, ops=_OPS[1:], partial=2)
    weights, rng = supernet.init(jax.random.key(0), space), np.random.default_rng(0)
    whole = jax.eval_shape(lambda key: supernet.init(key, dataclasses.replace(space, partial=1)), jax.random.key(0))
    assert weights["cells"][0]["edges"]["stride1"]["dil_conv_3x3"]["pointwise"].shape == (2, 2, 2)
    for name in ("preprocess0", "preprocess1"):
        assert jax.tree.map(jnp.shape, weights["cells"][1][name]) == jax.tree.map(jnp.shape, whole["cells"][1][name])
    gates = {kind: jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32) for kind in CELL_TYPES}
    edges = {kind: jnp.asarray(rng.uniform(size=2), jnp.float32) for kind in CELL_TYPES}
    executed = {kind: oracles.all_executed(space, kind) for kind in CELL_TYPES}
    images = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
    for multipliers in (edges, None):
        sample = Gates(gates, executed, multipliers)

        def logits(images: jax.Array, apply: Any, sample: Gates = sample) -> jax.Array:
            return apply(weights, sample, images, space=space)[0]

        found = oracles.quick_jit(partial(logits, apply=supernet.apply))(images)
        expected = oracles.quick_jit(partial(logits, apply=supernet.apply_reference))(images)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_share_must_divide_the_channels(tmp_path: Any) -> None:
    with pytest.raises(UserError) as error:
        schema.replace(SearchConfig(), {"space.partial": 3})
    assert str(error.value) == "space.partial: 3 is not possible; allowed: a divisor of space.channels (16)"
    with pytest.raises(UserError, match=r"space.partial: 0 is not possible; allowed: >= 1"):
        schema.replace(SearchConfig(), {"space.partial": 0})
    (tmp_path / "mine.py").write_text(
        "def make(*, space):\n    return None\n\nmake.settings = {'space.partial': 4}\n", encoding="utf-8"
    )
    made = presets.resolve("digits", f"{tmp_path / 'mine.py'}:make", {"space.channels": "8"})
    assert (made.config.space.partial, made.sources["space.partial"][:8]) == (4, "strategy")
