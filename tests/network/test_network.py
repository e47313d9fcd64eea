"""The derived network as a Flax module: wiring, drop-path, running statistics, scanned cells, error lines."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit

from prdarts_jax.errors import UserError
from prdarts_jax.network.layers import batch_norm
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.ops.drop_path import drop_path, drop_path_draws
from prdarts_jax.ops.primitives import PRIMITIVES, Primitive
from prdarts_jax.space.genotype import Genotype

SKIPS = Genotype([[("skip_connect", 0), ("skip_connect", 1)]], [2], [[("max_pool_3x3", 0), ("skip_connect", 1)]], [2])
MIXED = Genotype(
    [[("skip_connect", 0), ("dil_conv_3x3", 1)], [], [("avg_pool_3x3", 2), ("skip_connect", 3)]],
    [2, 3, 4],
    [[("max_pool_3x3", 0), ("max_pool_3x3", 0)]],
    [2],
)


def made(net: DerivedNetwork, images: jax.Array, seed: int = 0) -> Any:
    return quick_jit(net.init)(jax.random.key(seed), images)


def drawn(net: DerivedNetwork, images: jax.Array) -> Any:
    """Variables of the shapes of `net.init`, which is traced only: for programs whose values are compared."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)

    def weights(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = max(np.prod(leaf.shape[:-1]), 1)
        return jnp.asarray(rng.uniform(-1, 1, leaf.shape) / np.sqrt(fan_in) + (leaf.ndim == 1), leaf.dtype)

    return {
        "params": jax.tree.map(weights, shapes["params"]),
        "batch_stats": jax.tree.map(
            lambda s: jnp.asarray(rng.uniform(0.5, 1.5, s.shape), s.dtype), shapes["batch_stats"]
        ),
    }


def shapes_of(net: DerivedNetwork, images: jax.Array) -> Any:
    """((logits, auxiliary logits), variables) of `net`, traced and not compiled."""
    return jax.eval_shape(net.init_with_output, jax.random.key(0), images)


def pictures(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), jnp.float32)


def test_flax_users_find_what_they_expect() -> None:
    net = DerivedNetwork(SKIPS, channels=4, cells=3, classes=3, auxiliary=True)
    images = pictures(2, 32, 32, 3)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    assert set(variables) == {"params", "batch_stats"}
    cells = {f"cell_{i}" for i in range(3)}
    assert set(variables["params"]) == cells | {"stem", "classifier", "auxiliary"}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    logits, auxiliary = jax.eval_shape(net.apply, variables, images)
    assert logits.shape == auxiliary.shape == (2, 3)
    table = net.tabulate(jax.random.key(0), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert f"{count:,}" in table and "cell_2" in table
    assert jax.eval_shape(net.clone(auxiliary=False).apply, variables, images)[1] is None
    with pytest.raises(Exception, match="batch_stats"):
        jax.eval_shape(partial(net.apply, train=True), variables, images)  # nobody asked for the statistics


def test_weights_are_drawn_by_fan_in_and_differ_between_cells() -> None:
    genotype = Genotype([[("sep_conv_5x5", 1)]], [2], [[("sep_conv_5x5", 1)]], [2])
    params = made(DerivedNetwork(genotype, channels=8, cells=5), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = params["cell_0"]["node2_0_sep_conv_5x5"]["depthwise1"]
    assert 0.9 / 5 < jnp.abs(kernel).max() <= 1 / 5
    assert 0.9 / 27**0.5 < jnp.abs(params["stem"]["conv"]).max() <= 1 / 27**0.5
    assert float(params["stem"]["bn"]["scale"].min()) == 1 and float(params["stem"]["bn"]["bias"].max()) == 0
    entries = [params[f"cell_{i}"]["preprocess1"]["pointwise"] for i in (0, 1)]
    assert not np.array_equal(entries[0][:8], entries[1][:8])


def test_nodes_without_operations_do_not_exist() -> None:
    """Node 3 is empty: the edge from it is void, and the concat has two nodes of it, not three."""
    net = DerivedNetwork(MIXED, channels=4, cells=3)
    cell = net.plan().cells[0]
    assert cell.concat == (2, 4) and cell.channels_out == 8
    assert [edge.name for edge in cell.edges] == [
        *("preprocess0", "preprocess1"),
        *("node2_0_skip_connect", "node2_1_dil_conv_3x3", "node4_0_avg_pool_3x3"),
    ]
    (logits, _), variables = shapes_of(net, pictures(2, 8, 8, 3))
    assert variables["params"]["cell_1"]["preprocess1"]["pointwise"].shape == (8, 8)
    assert logits.shape == (2, 10)


def test_a_cell_computes_its_sum_of_operations() -> None:
    """The classifier sees 2 * max_pool(preprocess0), worked out here from the parameters."""
    genotype = Genotype([[("skip_connect", 1)]], [2], [[("max_pool_3x3", 1), ("max_pool_3x3", 1)]], [2])
    net = DerivedNetwork(genotype, channels=2, cells=3)
    images = pictures(2, 8, 8, 3)
    variables = made(net, images)
    params = variables["params"]

    def relu_conv(x: jax.Array, cell: str) -> jax.Array:
        # Fresh statistics: mean 0, variance 1.
        return nn.relu(x) @ params[cell]["preprocess1"]["pointwise"] / np.sqrt(1 + 1e-5)

    x = nn.Conv(6, (3, 3), use_bias=False).apply({"params": {"kernel": params["stem"]["conv"]}}, images)
    x = relu_conv(x / np.sqrt(1 + 1e-5), "cell_0")
    for cell in ("cell_1", "cell_2"):
        x = 2 * nn.max_pool(relu_conv(x, cell), (3, 3), (2, 2), [(1, 1), (1, 1)])
    expected = x.mean((1, 2)) @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]
    np.testing.assert_allclose(net.apply(variables, images)[0], expected, rtol=1e-4, atol=1e-5)


class Step(NamedTuple):
    """A training step of eight cells, and the statistics it started from."""

    compiled: Any
    result: Any  # logits, statistics afterwards, gradients if there are any
    before: Any


@cache
def step_of(stem: str, *, scan_cells: bool = True, recompute: bool = False) -> Step:
    """Compiled once for all the tests that look at it; of the larger stem, which adds no kind of cell, no gradients."""
    net = DerivedNetwork(MIXED, channels=4, cells=8, stem=stem)
    assert [end - first for first, end in net.plan().runs] == [2, 1, 2, 1, 2]
    images = pictures(8, 18, 18, 3) if stem == "cifar" else pictures(3, 72, 72, 3)
    variables = drawn(net, images)
    net = net.clone(scan_cells=scan_cells, recompute=recompute)

    def loss(params: Any, statistics: Any, images: jax.Array) -> Any:
        out, new = net.apply(
            {"params": params, "batch_stats": statistics},
            images,
            train=True,
            drop_path=jnp.float32(0.4),
            rngs={"drop_path": jax.random.key(5)},
            mutable=["batch_stats"],
        )
        return jnp.sum(out[0] ** 2), (out[0], new["batch_stats"])

    def forward(params: Any, statistics: Any, images: jax.Array) -> Any:
        return loss(params, statistics, images), None

    step = quick_jit(jax.value_and_grad(loss, has_aux=True) if stem == "cifar" else forward)
    compiled = step.lower(variables["params"], variables["batch_stats"], images).compile()
    (_, aux), gradients = compiled(variables["params"], variables["batch_stats"], images)
    return Step(compiled, (*aux, gradients), variables["batch_stats"])


@pytest.mark.parametrize(
    ("stem", "recompute"), [pytest.param("cifar", False, marks=pytest.mark.slow), ("cifar", True), ("imagenet", True)]
)
def test_scanned_cells_give_the_numbers_of_single_cells(stem: str, recompute: bool) -> None:
    """Also where the concats of the two cells differ, after a stem and after a reduction of an odd size."""
    scanned, single = step_of(stem, recompute=recompute), step_of(stem, scan_cells=False)
    assert jax.tree.structure(scanned.result) == jax.tree.structure(single.result)
    for a, b in zip(jax.tree.leaves(scanned.result), jax.tree.leaves(single.result), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * (1e-2 + float(jnp.abs(b).max())))
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), scanned.result[1], scanned.before)
    assert min(jax.tree.leaves(moved)) > 0  # every cell's statistics, scanned or not


def test_recomputed_cells_keep_less() -> None:
    kept = {
        recompute: step_of("cifar", recompute=recompute).compiled.memory_analysis().temp_size_in_bytes
        for recompute in (False, True)
    }
    assert kept[True] < 0.9 * kept[False]


# Drop-path


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    rate = jnp.float32(0.3)
    draws = drop_path_draws(jax.random.key(0), jnp.arange(4000), (2,))
    x = jnp.ones((4000, 2, 1, 3))
    y = np.asarray(drop_path(x, draws[:, 0], rate))
    kept = y[:, 0, 0, 0] > 0
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_allclose(y, np.where(kept, 1 / 0.7, 0)[:, None, None, None] * np.ones_like(y), rtol=1e-6)
    other = np.asarray(drop_path(x, draws[:, 1], rate))[:, 0, 0, 0] > 0
    assert abs((kept & other).mean() - 0.49) < 4 * np.sqrt(0.49 * 0.51 / 4000)  # independent between operations
    np.testing.assert_array_equal(drop_path(x, draws[:, 0], jnp.float32(0)), x)


def test_drop_path_depends_on_the_position_in_the_global_batch_only() -> None:
    key, whole = jax.random.key(3), jnp.arange(8)
    draws = drop_path_draws(key, whole, (5,))
    np.testing.assert_array_equal(drop_path_draws(key, whole[4:], (5,)), draws[4:])


def test_drop_path_spares_identities_and_needs_no_second_compilation() -> None:
    identities = Genotype([[("skip_connect", 0), ("skip_connect", 1)]], [2], SKIPS.reduce, SKIPS.reduce_concat)
    plan = DerivedNetwork(identities, channels=4, cells=3).plan()
    assert [cell.drops for cell in plan.cells] == [0, 2, 2]  # at stride 2 a skip is a FactorizedReduce
    net = DerivedNetwork(SKIPS, channels=4, cells=3)
    images = pictures(4, 8, 8, 3)
    variables = drawn(net, images)
    traces = 0

    @quick_jit
    def training(variables: Any, rate: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        options = {"rngs": {"drop_path": key}, "mutable": ["batch_stats"]}
        return net.apply(variables, images, train=True, drop_path=rate, positions=positions, **options)[0][0]

    @quick_jit
    def without(variables: Any, rate: jax.Array) -> Any:
        """Of a training without drop-path; of an evaluation with a rate and without one."""
        plain = net.apply(variables, images, train=True, mutable=["batch_stats"])[0][0]
        return plain, net.apply(variables, images, drop_path=rate)[0], net.apply(variables, images)[0]

    run = partial(training, variables)
    plain, rated, evaluated = without(variables, jnp.float32(0.6))
    key, positions = jax.random.key(1), jnp.arange(4)
    np.testing.assert_allclose(run(jnp.float32(0), key, positions), plain, rtol=1e-4, atol=1e-5)
    dropped = run(jnp.float32(0.6), key, positions)
    assert float(jnp.abs(dropped - plain).max()) > 1e-3
    assert float(jnp.abs(run(jnp.float32(0.6), key, positions + 4) - dropped).max()) > 1e-3
    assert traces == 1
    np.testing.assert_array_equal(rated, evaluated)


# Batch normalisation


def affine(channels: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    scale = jnp.linspace(0.5, 2.0, channels)
    return {"scale": scale, "bias": scale - 1}, {"mean": scale * 3, "var": scale + 1}


def test_batch_norm_is_that_of_flax_but_for_the_unbiased_running_variance() -> None:
    x = 2 * pictures(3, 4, 5, 6) + 1
    params, running = affine(6)
    flax_norm = nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    state = {"params": params, "batch_stats": running}

    def ours(x: jax.Array, params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(batch_norm(x, params, running, train=True)[0]))

    def theirs(x: jax.Array, params: Any) -> jax.Array:
        out, _ = flax_norm.apply({**state, "params": params}, x, use_running_average=False, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(out))

    @quick_jit
    def run(x: jax.Array, params: Any) -> Any:
        gradients = [jax.grad(f, (0, 1))(x, params) for f in (ours, theirs)]
        training = batch_norm(x, params, running, train=True)
        flax_training = flax_norm.apply(state, x, use_running_average=False, mutable=["batch_stats"])
        evaluation = batch_norm(x, params, running, train=False)[0], flax_norm.apply(state, x, use_running_average=True)
        return gradients, training, flax_training, evaluation

    gradients, (y, after), (expected, new), evaluation = run(x, params)
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after["mean"], new["batch_stats"]["mean"], rtol=1e-5)
    unbiased = np.var(np.asarray(x), axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(after["var"], 0.9 * np.asarray(running["var"]) + 0.1 * unbiased, rtol=1e-5)
    np.testing.assert_allclose(*evaluation, rtol=1e-4, atol=1e-5)


def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch() -> None:
    x = pictures(8, 3, 3, 4) * jnp.linspace(0.5, 3, 8).reshape(-1, 1, 1, 1)
    params, running = affine(4)

    def loss(x: jax.Array, axis_name: str | None) -> Any:
        y, after = batch_norm(x, params, running, train=True, axis_name=axis_name)
        return jnp.sum(jnp.cos(y)), (y, after)

    @quick_jit
    def run(x: jax.Array) -> Any:
        """(gradient, output, statistics) of the batch in four parts, and of the whole."""
        step = jax.grad(loss, has_aux=True)
        dx, (y, after) = jax.vmap(lambda p: step(p, "data"), axis_name="data")(x.reshape(4, 2, 3, 3, 4))
        of_parts = dx.reshape(x.shape), y.reshape(x.shape), jax.tree.map(lambda leaf: leaf[0], after)
        dx, (y, after) = step(x, None)
        return of_parts, (dx, y, after)

    (dx, *split), (whole_dx, *whole) = run(x)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, whole_dx, rtol=1e-3, atol=1e-5)


# Options and errors


def test_bfloat16_keeps_float32_parameters_statistics_and_logits() -> None:
    net = DerivedNetwork(MIXED, channels=4, cells=3)
    images = pictures(2, 8, 8, 3)

    @quick_jit
    def run(variables: Any) -> Any:
        half, full = (
            each.apply(variables, images, train=True, mutable=["batch_stats"])
            for each in (net.clone(dtype=jnp.bfloat16), net)
        )
        return half, full[0][0]

    ((logits, _), new), full = run(drawn(net, images))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, new))} == {jnp.dtype(jnp.float32)}
    error = float(jnp.abs(logits - full).max())
    assert 0 < error < 0.2 * float(jnp.abs(full).max())


def test_a_users_primitive_works_in_the_derived_network() -> None:
    def twice(params: Any, x: jax.Array, stride: int, leaves: Any) -> jax.Array:
        return 2 * x[:, ::stride, ::stride]

    double = Primitive("pool", lambda channels, stride: {}, twice)
    genotype = Genotype([[("double", 0)]], [2], [[("double", 0)]], [2])
    table = (*PRIMITIVES.items(), ("double", double))
    net = DerivedNetwork(genotype, channels=4, cells=3, primitives=table)
    (logits, _), _ = quick_jit(net.init_with_output)(jax.random.key(0), pictures(1, 8, 8, 3))
    assert logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"cells": 2}, (1, 32, 32, 3), r"^cells: 2 is too few; allowed: an integer >= 3$"),
        ({"channels": 1}, (1, 32, 32, 3), r"^channels: 1 is too few"),
        ({"stem": "cifer"}, (1, 32, 32, 3), r"^stem: unknown value 'cifer'; did you mean 'cifar'\? allowed: cifar"),
        ({"auxiliary": True}, (1, 28, 28, 1), r"^auxiliary: images of 28x28 .* 29\.\.40 pixels \(stem cifar\)"),
        (
            {"auxiliary": True, "stem": "imagenet"},
            (1, 64, 64, 3),
            r"^auxiliary: images of 64x64 .* allowed: 193\.\.256 pixels \(stem imagenet\)",
        ),
        ({}, (32, 32, 3), r"^images: an array of shape \(32, 32, 3\); allowed: \[batch, height, width, channels\]"),
        (
            {"genotype": Genotype([[]], [2], [[("skip_connect", 0)]], [2])},
            (1, 32, 32, 3),
            r"^genotype\.normal_concat: no node of it has an operation",
        ),
        (
            {"genotype": Genotype([[("conv_9x9", 0)]], [2], [[("skip_connect", 0)]], [2])},
            (1, 32, 32, 3),
            r"^genotype\.normal\[0\]: unknown value 'conv_9x9'",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_line(changes: Any, shape: tuple[int, ...], message: str) -> None:
    net = DerivedNetwork(**{"genotype": SKIPS, "channels": 4, "cells": 3, **changes})
    with pytest.raises(UserError) as caught:
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("stem", "pixels"), [("cifar", 29), ("cifar", 40), ("imagenet", 193), ("imagenet", 256)])
def test_the_auxiliary_head_fits_what_the_error_line_allows(stem: str, pixels: int) -> None:
    net = DerivedNetwork(SKIPS, channels=4, cells=3, stem=stem, auxiliary=True)
    (_, auxiliary), _ = shapes_of(net, jnp.zeros((1, pixels, pixels, 3)))
    assert auxiliary.shape == (1, 10)
