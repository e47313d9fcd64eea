"""The cell in waves against all operations with plain autodiff, in float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cells import CHANNELS, cell_data, dense_reference, random_terms, sparse
from jax.sharding import PartitionSpec

from prdarts_jax.config.search import OPS
from prdarts_jax.devices import sharding
from prdarts_jax.gates import Gates
from prdarts_jax.ops import side_by_side
from prdarts_jax.ops.batch_norm import BN_EPS
from prdarts_jax.ops.layer_set import LayerSet
from prdarts_jax.ops.layers import conv
from prdarts_jax.ops.lowering import Lowering
from prdarts_jax.ops.primitives import PRIMITIVES, Params, Primitive
from prdarts_jax.ops.separable import Unit
from prdarts_jax.space.cell import mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.noise import Noise, cell_noise
from prdarts_jax.space.spec import CELL_TYPES, Space

WAVES, TPU = Lowering("cpu", "waves"), Lowering("tpu", "waves")


def _triple_apply(params: Params, x: jax.Array, stride: int, leaves: LayerSet) -> jax.Array:
    return leaves.separable(("a", "b", "c"), x, _triple(params, stride))


def _triple(params: Params, stride: int) -> tuple[Unit, ...]:
    """Three units; the second has twice the weights of the first, and another dilation."""
    depthwise, matrix = params["depthwise1"], params["pointwise1"]
    last = Unit(params["depthwise2"], params["pointwise2"])
    return Unit(depthwise, matrix, stride), Unit(2.0 * depthwise, matrix, dilation=2), last


def _own(params: Params, x: jax.Array, stride: int, leaves: LayerSet) -> jax.Array:
    return jnp.sin(conv(x, params["kernel"], stride=stride))


TRIPLE = Primitive("conv", PRIMITIVES["sep_conv_3x3"].weights, _triple_apply, _triple)
OWN = Primitive("conv", lambda c, stride: {"kernel": PRIMITIVES["conv_7x1_1x7"].weights(c, 1)["conv_1x7"]}, _own)
_TABLE = (("triple", TRIPLE), ("own", OWN), *PRIMITIVES.items())
# All operations on the edge between the nodes and, a few each, on those from the inputs: the unrolled reference takes
# as long to compile as they are many.
_LISTS = (OPS[:3], OPS[3:5], OPS[5:], (OPS[1], *OPS[3:5]))
SPACES = {
    "all": Space(nodes=2, edge_ops=((*_LISTS, OPS), (*_LISTS[::-1], OPS))),
    # One convolution, so that its lane is its own from one term on; pools as they are.
    "one": Space(nodes=2, ops=("none", "sep_conv_3x3", "avg_pool_3x3"), pool_norm=False),
    # Two in lanes of their own: the shorter one drops out; one that is only computed alone; another dilation inside.
    "user": Space(nodes=2, ops=("dil_conv_3x3", "triple", "own", "skip_connect"), primitives=_TABLE),
}


def _assert_close(ours: Any, theirs: Any, relative: float) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * scale, err_msg=jax.tree_util.keystr(path))


def _both(
    space: Space, kind: str, executed: np.ndarray, size: tuple[int, int] = (6, 7), lowering: Lowering = WAVES
) -> tuple[Any, Any]:
    full = np.full((space.num_edges, space.num_ops), space.num_ops, np.int32)
    full[:, : executed.shape[1]] = executed  # one width for the reference, so that it is compiled once
    with jax.enable_x64(True):
        args = cell_data(space, kind, size)
        ours = sparse(space, kind, lowering)(*args, jnp.asarray(executed))
        return ours, dense_reference(space, kind)(*args, jnp.asarray(full))


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("name", SPACES)
def test_nodes_and_gradients(name: str, kind: str) -> None:
    """Values and gradients in weights, gates and inputs; gathered and not; void terms; an odd side; as on a TPU."""
    space, lowering = SPACES[name], TPU if name == "one" else WAVES
    for k, void in ((2, 1),) if name == "one" else ((1, 0), (space.num_ops, 3)):  # a program each
        executed = random_terms(space, kind, k, k, void=void)
        _assert_close(*_both(space, kind, executed, lowering=lowering), 1e-12)


@pytest.mark.parametrize("kind", CELL_TYPES)
def test_float32_is_equal_to_rounding(kind: str) -> None:
    space = SPACES["all"]
    executed = random_terms(space, kind, 2, 0)
    _, exact = _both(space, kind, executed)
    args = cell_data(space, kind, (6, 7), np.float32)
    _assert_close(sparse(space, kind, WAVES)(*args, jnp.asarray(executed)), exact, 3e-5)


def test_what_is_not_executed_has_no_part_and_no_gradient() -> None:
    """Exactly: all terms void, and then one operation of one edge."""
    space, kind = SPACES["all"], "normal"
    executed = np.full((space.num_edges, 2), space.num_ops, np.int32)
    args = cell_data(space, kind, (6, 7), np.float32)
    y, gradients = sparse(space, kind, WAVES)(*args, jnp.asarray(executed))
    assert not np.any(y) and not any(np.any(a) for a in jax.tree.leaves(gradients))
    executed[4, 1] = OPS.index("sep_conv_5x5")
    _, (weights, *_) = sparse(space, kind, WAVES)(*args, jnp.asarray(executed))
    moved = {op for op, stacks in weights["stride1"].items() if any(np.any(a) for a in stacks.values())}
    assert moved == set()  # its source is a node that nothing reached
    executed[2, 0] = OPS.index("dil_conv_3x3")
    _, (weights, *_) = sparse(space, kind, WAVES)(*args, jnp.asarray(executed))
    moved = {op for op, stacks in weights["stride1"].items() if any(np.any(a) for a in stacks.values())}
    assert moved == {"dil_conv_3x3"}


# --- noise and partial channels ---------------------------------------------------------------------------------------

_OPS = ("none", "skip_connect", "max_pool_3x3", "dil_conv_3x3", "sep_conv_3x3")
_FEW = (_OPS[1:2], _OPS[1:], _OPS[::3], _OPS[:3], _OPS)
RATES = {"drop_path": 0.4, "dropout/skip_connect": 0.3, "dropout/dil_conv_3x3": 0.2}


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("partial", [1, 4])
def test_noise_and_partial_channels(partial: int, kind: str) -> None:
    """Gradients in the multipliers of the edges too."""
    space = Space(nodes=2, ops=_OPS, edge_ops=(_FEW, _FEW[::-1]), partial=partial)
    executed = jnp.asarray(random_terms(space, kind, 2, 1, void=1))
    rates = {name: jnp.float32(rate) for name, rate in RATES.items()}
    noise = cell_noise(Noise(jax.random.key(1), jnp.arange(5, 7, dtype=jnp.int32), rates), space, 1)
    with jax.enable_x64(True):
        weights, s0, s1, ops, ct = cell_data(space, kind, (5, 6), channels=2 * CHANNELS)
        edges = jnp.asarray(np.random.default_rng(1).normal(size=space.num_edges))

        def run(nodes: Any, how: dict[str, Any]) -> Any:
            def apply(weights: Any, ops: Any, edges: Any, s0: Any, s1: Any) -> jax.Array:
                gates = Gates({kind: ops}, {kind: executed}, {kind: edges})
                terms = gates.terms(kind) if how else (gates.dense(kind),)
                more = {"noise": noise, "multipliers": edges, **how}
                return nodes(weights, *terms, s0, s1, space=space, kind=kind, **more)

            def both(*args: Any) -> Any:
                y, pull = jax.vjp(apply, *args)
                return y, pull(ct)

            return oracles.quick_jit(both)(weights, ops, edges, s0, s1)

        _assert_close(run(mixed_nodes, {"lowering": WAVES}), run(mixed_nodes_reference, {}), 1e-12)


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.multidevice
def test_on_several_devices() -> None:
    """Statistics of the whole batch, and gradients of the sum over the devices, as on one."""
    space, kind = SPACES["all"], "reduce"
    executed = jnp.asarray(random_terms(space, kind, 2, 0, void=1))
    mesh = sharding.make_mesh(jax.devices()[:2])
    with jax.enable_x64(True):
        weights, s0, s1, ops, ct = cell_data(space, kind, (6, 7), batch=6)
        whole, split = PartitionSpec(), PartitionSpec(sharding.AXIS)
        nodes_split = PartitionSpec(None, sharding.AXIS)

        def part(weights: Any, s0: Any, s1: Any, ops: Any, ct: Any) -> Any:
            def apply(weights: Any, ops: Any, s0: Any, s1: Any) -> jax.Array:
                terms = Gates({kind: ops}, {kind: executed}).terms(kind)
                how = {"space": space, "kind": kind, "axis_name": sharding.AXIS, "lowering": WAVES}
                return mixed_nodes(weights, *terms, s0, s1, **how)

            y, pull = jax.vjp(apply, weights, ops, s0, s1)
            of_weights, of_ops, *of_inputs = pull(ct)
            return y, (*jax.lax.psum((of_weights, of_ops), sharding.AXIS), *of_inputs)

        in_specs, out_specs = (whole, split, split, whole, nodes_split), (nodes_split, (whole, whole, split, split))
        mapped = oracles.quick_jit(sharding.map_over(mesh, part, in_specs, out_specs))
        args = weights, s0, s1, ops, ct
        full = jnp.full((space.num_edges, space.num_ops), space.num_ops, jnp.int32).at[:, :2].set(executed)
        _assert_close(mapped(*args), dense_reference(space, kind)(*args, full), 1e-12)
        text = mapped.lower(*args).as_text()
    # Two units a wave, two waves, two directions; and the sum of each gradient.
    leaves = len(jax.tree.leaves(weights)) + 1
    assert len(re.findall(r'"stablehlo.all_gather"', text)) == 4
    assert len(re.findall(r'"stablehlo.all_reduce"', text)) == 4 + leaves


# --- the program ------------------------------------------------------------------------------------------------------


def _lowered(space: Space, kind: str, dtype: Any = np.float32) -> str:
    """For a GPU, of which nothing is needed."""
    weights, *_ = cell_data(space, kind, (6, 6), np.float32)
    _, s0, s1, _, ct = cell_data(space, kind, (6, 6), dtype)
    values, executed = jnp.ones((space.num_edges, 2)), jnp.asarray(random_terms(space, kind, 2, 0))

    def loss(weights: Any, values: Any, s0: Any, s1: Any) -> jax.Array:
        how = {"space": space, "kind": kind, "lowering": Lowering("gpu")}
        return jnp.vdot(mixed_nodes(weights, values, executed, s0, s1, **how), ct)

    traced = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(weights, values, s0, s1)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def _conditionals(text: str) -> int:
    """But for those of which the platform decides: with a constant they choose a branch, and choose by it once more."""
    return len(re.findall(r'"stablehlo\.(case|if)"', text)) - 2 * len(re.findall(r'"stablehlo\.case"\(%c', text))


@pytest.mark.parametrize(("kind", "dtype"), [("normal", jnp.bfloat16), ("reduce", np.float32)])
def test_no_conditional_and_no_loop_on_a_gpu(kind: str, dtype: Any) -> None:
    text = _lowered(Space(nodes=3), kind, dtype)
    assert _conditionals(text) == 0 and not re.search(r"stablehlo\.(while|scatter|custom_call)", text)
    # Three waves, each with both dilations of unit 1 in one convolution for all sources, and unit 2; forward, and again
    # for the gradients of input and kernel; unit 2 once more where it is computed again. And both taps of a reduction.
    assert len(re.findall(r"stablehlo\.convolution", text)) == 3 * (3 * 3 + 1) + (3 if kind == "reduce" else 0)


def test_an_operation_of_a_user_is_computed_where_it_is_executed() -> None:
    text = _lowered(SPACES["user"], "normal")
    assert _conditionals(text) == 2 * SPACES["user"].num_edges  # in both directions


# --- the layers -------------------------------------------------------------------------------------------------------


def test_statistics_of_a_large_mean_and_an_image_far_from_the_others() -> None:
    """Where the mean is 1e4 sigma a difference of mean squares keeps no digit."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 6, 6, 3)) + np.array([0.0, 1e4, -300.0])
    z[0, ..., 2] += 250.0
    z[1, 3, 3, 0] += 100.0  # the pixel that an image is shifted by
    z = z.astype(np.float32)
    ((mean, scale),) = side_by_side.statistics((jnp.asarray(z),), None, by_image=True)
    exact = z.astype(np.float64)
    assert mean.shape == scale.shape == (8, 3) and not np.ptp(mean, axis=0).any() and not np.ptp(scale, axis=0).any()
    np.testing.assert_allclose(mean[0], exact.mean(axis=(0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scale[0], 1 / np.sqrt(exact.var(axis=(0, 1, 2)) + BN_EPS), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_spaces_of_random_operations(seed: int, kind: str) -> None:
    """Of three nodes, each edge with operations of its own, as in the spaces of Zela et al.; all sizes and K."""
    rng = np.random.default_rng(seed)
    ops = tuple(rng.permutation([*OPS, "sep_conv_7x7", "conv_7x1_1x7"])[: rng.integers(2, 7)].tolist())
    ops = ops if set(ops) != {"none"} else (*ops, "skip_connect")
    lists = [tuple(tuple(op for op in ops if rng.random() < 0.6) or (ops[0],) for _ in range(9)) for _ in CELL_TYPES]
    space = Space(nodes=3, ops=ops, edge_ops=tuple(lists), pool_norm=bool(seed % 2))
    size = ((5, 7), (8, 8), (4, 9), (3, 3))[seed]
    for k in {1, 2, len(ops)}:
        _assert_close(*_both(space, kind, random_terms(space, kind, k, k, void=seed), size), 1e-11)


@pytest.mark.slow
def test_second_order() -> None:
    """The gradient of a gradient's square norm."""
    space, kind = SPACES["one"], "reduce"
    executed = jnp.asarray(random_terms(space, kind, 2, 1))
    with jax.enable_x64(True):
        weights, s0, s1, ops, ct = cell_data(space, kind, (4, 3))

        def squared(ops: jax.Array, nodes: Any, terms: Any, how: Any) -> jax.Array:
            def loss(ops: jax.Array) -> jax.Array:
                gates = terms(Gates({kind: ops}, {kind: executed}))
                return jnp.vdot(jnp.sin(nodes(weights, *gates, s0, s1, space=space, kind=kind, **how)), ct)

            return jnp.sum(jax.grad(loss)(ops) ** 2)

        cases = (
            (mixed_nodes, lambda gates: gates.terms(kind), {"lowering": WAVES}),
            (mixed_nodes_reference, lambda gates: (gates.dense(kind),), {}),
        )
        found, expected = (jax.jit(lambda ops, case=case: jax.grad(squared)(ops, *case))(ops) for case in cases)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
