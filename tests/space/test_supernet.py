"""The search network: golden counts and layout, the fast path against plain autodiff, exact second order."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.flatten_util import ravel_pytree

from prdarts_jax.config.search import OPS
from prdarts_jax.gates import Gates
from prdarts_jax.ops.layers import Weight
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space

TINY = Space(
    nodes=1, cells=3, channels=4, classes=3, in_channels=1, ops=("skip_connect", "dil_conv_3x3", "max_pool_3x3", "none")
)
SMOOTH = Space(nodes=1, cells=3, channels=2, classes=3, in_channels=1, ops=("skip_connect", "dil_conv_3x3"))


# --- layout and counts ------------------------------------------------------------------------------------------------


def _count(space: Space) -> int:
    weights = jax.eval_shape(lambda key: supernet.init(key, space), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(weights))


def test_golden_counts() -> None:
    assert _count(Space(head_norm=False)) == 1_930_618
    assert _count(Space(cells=6)) == 1_323_002
    assert _count(Space()) - _count(Space(head_norm=False)) == 512


def _count_by_formula(space: Space) -> int:
    """Section 2 written out, for spaces without edge_ops."""
    c = 3 * space.channels
    total, before, last, width = 9 * space.in_channels * c + 2 * c, c, c, space.channels
    edges = [(j, n) for n in range(2, 2 + space.nodes) for j in range(n)]
    for i in range(space.cells):
        reduces = i in (space.cells // 3, 2 * space.cells // 3)
        width *= 2 if reduces else 1
        total += (before + last) * width  # preprocessing: 1x1 convolutions, whether factorized or not
        for j, _ in edges:
            for op in space.ops:
                kernel = int(op[-1]) if "conv" in op else 0
                if op.startswith("sep"):
                    total += 2 * (kernel**2 * width + width**2)
                elif op.startswith("dil"):
                    total += kernel**2 * width + width**2
                elif op == "skip_connect" and reduces and j < 2:
                    total += width**2
        before, last = last, space.nodes * width
    return total + (last + 1) * space.classes + (2 * last if space.head_norm else 0)


@pytest.mark.parametrize(
    "space",
    [
        Space(),
        Space(cells=3, nodes=1, channels=2, classes=7, in_channels=1),
        Space(cells=11, nodes=3, channels=6, ops=OPS[3:], head_norm=False),
        Space(cells=20, nodes=5, channels=36, classes=100),
    ],
)
def test_counts_by_formula(space: Space) -> None:
    assert _count(space) == _count_by_formula(space)


@pytest.mark.parametrize("cells", range(3, 21))
def test_layout(cells: int) -> None:
    space = Space(cells=cells, nodes=3, channels=10)
    layout = space.layout
    reductions = [i for i, cell in enumerate(layout) if cell.kind == "reduce"]
    assert reductions == [cells // 3, 2 * cells // 3] and len(layout) == cells
    outputs = [30, 30]  # the stem gives 3 C, twice
    for i, cell in enumerate(layout):
        assert cell.channels == 10 * 2 ** sum(r <= i for r in reductions)
        assert cell.channels_in == (outputs[-2], outputs[-1])
        assert cell.previous_reduced == (i - 1 in reductions)
        outputs.append(3 * cell.channels)


def test_edges_are_node_major() -> None:
    text = "(0,2)(1,2)(0,3)(1,3)(2,3)(0,4)(1,4)(2,4)(3,4)(0,5)(1,5)(2,5)(3,5)(4,5)"
    assert "".join(f"({j},{n})" for j, n in Space().edges) == text
    stride2, stride1 = Space().edge_groups("reduce")
    assert stride2.stride == 2 and [Space().edges[e][0] for e in stride2.edges] == [0, 1] * 4
    assert stride1.stride == 1 and all(Space().edges[e][0] >= 2 for e in stride1.edges)
    assert sorted(stride2.edges + stride1.edges) == list(range(14))


def test_initial_weights_fill_their_interval() -> None:
    """Uniform in +-1/sqrt(fan_in), fan_in = k k C_in / groups; BN scale 1, bias 0; linear bias as kernel."""
    space = Space(cells=3, nodes=2, channels=8)
    weights = jax.tree.map(np.asarray, oracles.quick_jit(lambda key: supernet.init(key, space))(jax.random.key(0)))
    checked = 0
    for (path, leaf), declared in zip(
        jax.tree.leaves_with_path(weights),
        jax.tree.leaves(supernet.declare(space), is_leaf=lambda node: isinstance(node, Weight)),
        strict=True,
    ):
        names = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path]
        assert leaf.shape == declared.shape and leaf.dtype == np.float32
        if (names[-1] in ("scale", "bias") and names[0] != "head") or "norm" in names:
            np.testing.assert_array_equal(leaf, 1.0 if names[-1] == "scale" else 0.0)
            continue
        if names == ["head", "bias"]:
            fan_in = weights["head"]["kernel"].shape[0]
        elif names[-1].startswith("depthwise"):
            fan_in = leaf.shape[1] * leaf.shape[2]
        elif names[0] == "stem":
            fan_in = int(np.prod(leaf.shape[:3]))
        else:  # 1x1 convolutions and the linear layer: [..., C_in, C_out]
            fan_in = leaf.shape[-2]
        bound = 1 / np.sqrt(fan_in)
        largest = float(np.abs(leaf).max())
        assert largest <= bound * (1 + 1e-6), names
        # P(max < (1 - 12/n) bound) = (1 - 12/n)^n < e^-12
        assert largest > bound * (1 - 12 / leaf.size), names
        assert abs(float(leaf.mean())) < 5 * bound / np.sqrt(3 * leaf.size), names
        checked += 1
    assert checked > 40
    stack = weights["cells"][0]["edges"]["stride1"]["sep_conv_3x3"]["pointwise1"]
    assert not (stack[0] == stack[1]).any()  # every edge has a draw of its own


def test_restricted_edges_have_no_weights_to_spare() -> None:
    lists = (("skip_connect",), ("dil_conv_3x3", "none"))
    space = Space(nodes=1, cells=3, channels=4, ops=TINY.ops, edge_ops=(lists, lists))
    edges = supernet.declare(space)["cells"][0]["edges"]["stride1"]
    assert edges == {"dil_conv_3x3": {"depthwise": Weight((1, 3, 3, 4), 9), "pointwise": Weight((1, 4, 4), 4)}}


# --- fast against reference -------------------------------------------------------------------------------------------


def _weights(space: Space) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, np.float64), oracles.drawn(supernet.declare(space)))


def _loss(apply: Any, space: Space, images: jax.Array) -> Any:
    def loss(weights: Any, ops: Any, executed: Any) -> jax.Array:
        logits, aux = apply(weights, Gates(ops, executed), images, space=space)
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0] ** 2) + 0.1 * jnp.sum(jnp.sin(aux["features"]))

    return loss


def _gates(space: Space, shape: tuple[int, ...], k: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    rng = np.random.default_rng(1)
    full = (*shape, space.num_edges, space.num_ops)
    ops = {kind: jnp.asarray(rng.uniform(0.2, 1.0, full)) for kind in CELL_TYPES}
    order = {kind: np.argsort(rng.random(full), axis=-1)[..., :k].astype(np.int32) for kind in CELL_TYPES}
    order["normal"].reshape(-1)[0] = space.num_ops  # a void slot
    return ops, {kind: jnp.asarray(o) for kind, o in order.items()}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 7, 6, 1))


@cache
def _gradients(apply: Any) -> Any:
    def loss(weights: Any, ops: Any, executed: Any, images: jax.Array) -> jax.Array:
        return _loss(apply, TINY, images)(weights, ops, executed)

    return oracles.quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("per_cell", [False, True], ids=["gates-shared", "gates-per-cell"])
def test_sparse_equals_masked_dense(images: np.ndarray, per_cell: bool) -> None:
    """Values, gradients of weights and of gates; odd image size; unexecuted gates have zero gradient in both."""
    with jax.enable_x64(True):
        weights, x = _weights(TINY), jnp.asarray(images)
        ops, executed = _gates(TINY, (TINY.cells,) if per_cell else (), 2)
        ours = _gradients(supernet.apply)(weights, ops, executed, x)
        # The reference is given the gates of every cell, so that one program serves both kinds.
        rows = (ops, executed) if per_cell else jax.tree.map(lambda a: jnp.stack([a] * TINY.cells), (ops, executed))
        value, (dweights, dops) = _gradients(supernet.apply_reference)(weights, *rows, x)
        theirs = value, (dweights, dops if per_cell else jax.tree.map(lambda a: a.sum(axis=0), dops))
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=jax.tree_util.keystr(path))
    for kind in CELL_TYPES:
        ran = np.zeros((*ops[kind].shape[:-1], TINY.num_ops + 1), bool)
        np.put_along_axis(ran, np.asarray(executed[kind]), True, axis=-1)
        assert np.all(np.asarray(ours[1][1][kind])[~ran[..., :-1]] == 0)
        assert np.any(np.asarray(ours[1][1][kind])[ran[..., :-1]] != 0)
    if per_cell:  # the gates of cell 0 (normal) must not touch the rows of the reduction cells
        assert np.all(np.asarray(ours[1][1]["reduce"])[0] == 0)


def test_gates_and_weights_apart_or_together(images: np.ndarray) -> None:
    with jax.enable_x64(True):
        weights, x = _weights(SMOOTH), jnp.asarray(images[:2, :4, :4])
        ops, executed = _gates(SMOOTH, (), 2)
        loss = _loss(supernet.apply, SMOOTH, x)

        @oracles.quick_jit
        def run(weights: Any, ops: Any) -> Any:
            return [jax.grad(loss, argnums=n)(weights, ops, executed) for n in ((0, 1), 0, 1)]

        joint, *alone = run(weights, ops)
    for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(tuple(alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_exact_second_order_in_the_gates(images: np.ndarray) -> None:
    """The Hessian of the reference (forward over reverse), reverse over reverse of the fast path, and differences."""
    with jax.enable_x64(True):
        weights, x = _weights(SMOOTH), jnp.asarray(images[:2, :4, :4])
        ops, executed = _gates(SMOOTH, (), 2)
        executed = {kind: jnp.tile(jnp.arange(2, dtype=jnp.int32), (2, 1)) for kind in CELL_TYPES}
        flat, unflatten = ravel_pytree(ops)
        v = jnp.asarray(np.random.default_rng(2).normal(size=flat.shape))

        def loss_of(apply: Any) -> Any:
            return lambda flat: _loss(apply, SMOOTH, x)(weights, unflatten(flat), executed)

        fast, plain = loss_of(supernet.apply), loss_of(supernet.apply_reference)

        @oracles.quick_jit
        def forward_over(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(plain, (z,), (v,))[1], jax.hessian(plain)(z)

        @oracles.quick_jit
        def reverse_over(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            slope, pull = jax.vjp(jax.grad(fast), z)
            return slope, pull(v)[0]

        tangent, hessian = map(np.asarray, forward_over(flat))
        (slope, double), step = reverse_over(flat), 1e-5
        ends = [np.asarray(reverse_over(flat + side * v)[0]) for side in (step, -step)]
        difference = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)
        np.testing.assert_allclose(tangent, jnp.vdot(slope, v), rtol=1e-9)
        np.testing.assert_allclose(double, hessian @ np.asarray(v), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(difference, hessian @ np.asarray(v), rtol=1e-4, atol=1e-6)
    assert np.abs(hessian).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_logits_are_float32_whatever_the_compute_dtype(images: np.ndarray, dtype: Any) -> None:
    weights = oracles.drawn(supernet.declare(TINY))
    executed = {kind: jnp.zeros((2, 1), jnp.int32) for kind in CELL_TYPES}
    gates = Gates({kind: jnp.ones((2, 4)) for kind in CELL_TYPES}, executed)
    x = jnp.asarray(images, dtype)
    logits, aux = jax.eval_shape(lambda: supernet.apply(weights, gates, x, space=TINY))
    assert logits.shape == (3, 3) and logits.dtype == jnp.float32
    assert aux["features"].shape == (3, 16) and aux["features"].dtype == jnp.float32
