"""Leaf layers against definitions in numpy; each rule of FAST against plain autodiff, over a mapped axis too."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from prdarts_jax.devices import sharding
from prdarts_jax.ops import batch_norm, layers, pools
from prdarts_jax.ops import layer_set as leaf_sets
from prdarts_jax.ops.layers import Weight, draw


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _windows(x: np.ndarray, stride: int) -> list[tuple[tuple[int, int], np.ndarray, tuple[int, int]]]:
    """((i, j), the real pixels of the 3x3 window [B,n,m,C], its upper left corner) of every output pixel."""
    h, w = x.shape[1:3]
    found = []
    for i in range(-(-h // stride)):
        for j in range(-(-w // stride)):
            top, left = max(i * stride - 1, 0), max(j * stride - 1, 0)
            found.append(((i, j), x[:, top : i * stride + 2, left : j * stride + 2], (top, left)))
    return found


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (1, 2)])
def test_pooling_by_loops(stride: int, size: tuple[int, int]) -> None:
    x = _normal(0, (2, *size, 3))
    out = (2, -(-size[0] // stride), -(-size[1] // stride), 3)
    largest, mean = np.zeros(out), np.zeros(out)
    for (i, j), window, _ in _windows(x, stride):
        largest[:, i, j], mean[:, i, j] = window.max(axis=(1, 2)), window.mean(axis=(1, 2))
    for leaves in (leaf_sets.fast_layers(), leaf_sets.reference_layers()):
        np.testing.assert_array_equal(leaves.max_pool(jnp.asarray(x), stride), largest.astype(np.float32))
        np.testing.assert_allclose(leaves.avg_pool(jnp.asarray(x), stride), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_sends_the_whole_cotangent_to_the_first_maximum(stride: int) -> None:
    x = np.random.default_rng(1).integers(0, 2, (2, 7, 6, 2)).astype(np.float32)
    y, pull = jax.vjp(lambda x: pools.max_pool(x, stride), jnp.asarray(x))
    ct = _normal(2, y.shape)
    expected = np.zeros(x.shape)
    for (i, j), window, (top, left) in _windows(x, stride):
        for b in range(2):
            for c in range(2):
                p, q = np.unravel_index(np.argmax(window[b, :, :, c]), window.shape[1:3])
                expected[b, top + p, left + q, c] += ct[b, i, j, c]
    np.testing.assert_allclose(pull(jnp.asarray(ct))[0], expected, rtol=1e-5, atol=1e-6)


def test_batch_norm_is_its_definition() -> None:
    x = 3.0 + 2.0 * _normal(3, (4, 5, 3, 2))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(batch_norm.batch_norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_of_large_means_does_not_cancel() -> None:
    """E[x^2] - E[x]^2 in float32 would be all noise here."""
    x = 4096.0 + _normal(4, (8, 6, 6, 1))
    wide = x.astype(np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    np.testing.assert_allclose(batch_norm.batch_norm(jnp.asarray(x)), expected, atol=1e-2)


def test_rules_to_second_order() -> None:
    """Reverse over reverse: each FAST rule against the plain autodiff of its reference."""
    with jax.enable_x64(True):
        x, v, ct = (jnp.asarray(np.random.default_rng(i).normal(size=(2, 5, 4, 3))) for i in range(3))
        small = ct[:, :3, :2]
        fast, plain = leaf_sets.fast_layers(), leaf_sets.reference_layers()
        pairs: list[tuple[Any, Any, jax.Array]] = [
            (batch_norm.batch_norm, batch_norm.batch_norm_reference, ct),
            (lambda x: fast.max_pool(x, 1), lambda x: plain.max_pool(x, 1), ct),
            (lambda x: fast.max_pool(x, 2), lambda x: plain.max_pool(x, 2), small),
            (lambda x: fast.avg_pool(x, 2), lambda x: plain.avg_pool(x, 2), small),
        ]

        def run(layer: Any, ct: jax.Array, x: jax.Array) -> Any:
            def inner(x: jax.Array) -> Any:
                y, pull = jax.vjp(layer, x)
                (dx,) = pull(ct * jnp.cos(y))
                return jnp.vdot(dx, v), (y, dx)

            return jax.value_and_grad(inner, has_aux=True)(x)

        both = oracles.quick_jit(lambda x: [(run(f, ct, x), run(g, ct, x)) for f, g, ct in pairs])
        for ours, theirs in both(x):
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        check_grads(jax.jit(lambda x: jnp.sum(batch_norm.batch_norm(x) ** 3)), (x,), order=1, modes=["rev"])


@pytest.mark.parametrize("leaves", [leaf_sets.fast_layers, leaf_sets.reference_layers])
def test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch(leaves: Any) -> None:
    with jax.enable_x64(True):
        x, ct = (jnp.asarray(np.random.default_rng(i).normal(size=(8, 3, 2, 2))) for i in range(2))

        def gradient(norm: Any, x: jax.Array, ct: jax.Array) -> Any:
            y, pull = jax.vjp(norm, x)
            return y, pull(ct)[0]

        @oracles.quick_jit
        def run(x: jax.Array, ct: jax.Array) -> Any:
            parts = (a.reshape(4, 2, 3, 2, 2) for a in (x, ct))
            device = partial(gradient, lambda x: leaves("data").norm("", x))
            split = jax.vmap(device, axis_name="data")(*parts)
            return [a.reshape(x.shape) for a in split], gradient(batch_norm.batch_norm_reference, x, ct)

        ours, whole = run(x, ct)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.multidevice
@pytest.mark.parametrize("devices", [2, 4])
def test_statistics_over_devices_do_not_cancel(devices: int) -> None:
    """Mean / sigma = 1000, another mean on each device: moments, output and gradient against float64 on one device."""
    if jax.device_count() < devices:
        pytest.skip(f"{jax.device_count()} devices of {devices}")
    rng = np.random.default_rng(0)
    offsets = np.repeat(rng.normal(scale=0.25, size=(4, 1, 1, 3)), 2, axis=0)  # of the parts, in units of sigma
    # What float32 holds exactly: the rounding of the input is no part of the error.
    x = np.float32(1000 + np.round((rng.normal(size=(8, 5, 5, 3)) + offsets) * 64) / 64)
    ct = rng.normal(size=x.shape)

    def both(norm: Any, x: jax.Array, ct: jax.Array) -> Any:
        y, pull, moments = jax.vjp(norm, x, has_aux=True)
        return y, pull(ct)[0], moments

    def fast(x: jax.Array, axis: str | None) -> Any:
        return batch_norm.batch_norm_moments(x, axis)

    def plain(x: jax.Array, axis: str | None) -> Any:
        return batch_norm.batch_norm_reference(x, axis), fast(x, axis)[1]

    mesh, split = sharding.make_mesh(jax.devices()[:devices]), PartitionSpec(sharding.AXIS)
    with jax.enable_x64(True):
        y, dx, (mean, variance) = both(lambda x: plain(x, None), jnp.asarray(x, jnp.float64), jnp.asarray(ct))
    np.testing.assert_allclose(variance, np.var(x.astype(np.float64), axis=(0, 1, 2)), rtol=1e-12)
    for norm in (fast, plain):
        program = partial(both, partial(norm, axis=sharding.AXIS))
        mapped = sharding.map_over(mesh, program, (split, split), (split, split, PartitionSpec()))
        found = oracles.quick_jit(mapped)(jnp.asarray(x), jnp.asarray(ct, jnp.float32))
        np.testing.assert_allclose(found[2][0], mean, rtol=1e-6)
        np.testing.assert_allclose(found[2][1], variance, rtol=2e-5)
        np.testing.assert_allclose(found[0], y, atol=2e-4)  # one unit of the mean's last place is 6e-5 sigma
        np.testing.assert_allclose(found[1], dx, atol=2e-4)


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (5, 7)])
def test_factorized_reduce_by_its_definition(size: tuple[int, int]) -> None:
    x, first, second = _normal(5, (2, *size, 4)), _normal(6, (4, 2)), _normal(7, (4, 3))
    y = np.asarray(layers.factorized_reduce(jnp.asarray(x), jnp.asarray(first), jnp.asarray(second)))
    h, w = -(-size[0] // 2), -(-size[1] // 2)
    assert y.shape == (2, h, w, 5)
    padded = np.zeros((2, 2 * h, 2 * w, 4), np.float32)
    padded[:, : size[0], : size[1]] = x
    for i in range(h):
        for j in range(w):
            np.testing.assert_allclose(y[:, i, j, :2], padded[:, 2 * i, 2 * j] @ first, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(y[:, i, j, 2:], padded[:, 2 * i + 1, 2 * j + 1] @ second, rtol=1e-4, atol=1e-5)


def test_pointwise_and_linear_are_matrix_products_and_keep_the_dtype() -> None:
    x, kernel, bias = _normal(8, (2, 3, 4, 5)), _normal(9, (5, 6)), _normal(10, (6,))
    np.testing.assert_allclose(layers.pointwise(jnp.asarray(x), jnp.asarray(kernel)), x @ kernel, rtol=1e-4, atol=1e-5)
    low = layers.pointwise(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), x @ kernel, atol=0.1)
    features = x[:, 0, 0]
    logits = layers.linear(jnp.asarray(features), jnp.asarray(kernel), jnp.asarray(bias))
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-4, atol=1e-5)
    assert layers.linear(jnp.asarray(features, jnp.bfloat16), jnp.asarray(kernel), jnp.asarray(bias)).dtype == "float32"


def test_dense_convolution_by_loops() -> None:
    x, kernel = _normal(11, (2, 5, 6, 2)), _normal(12, (1, 7, 2, 3))
    y = np.asarray(layers.conv(jnp.asarray(x), jnp.asarray(kernel), stride=(1, 2)))
    expected = np.zeros((2, 5, 3, 3))
    for j in range(3):
        for q in range(7):
            col = 2 * j + q - 3
            if 0 <= col < 6:
                expected[:, :, j] += x[:, :, col] @ kernel[0, q]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_drawn_weights_are_uniform_within_their_bound() -> None:
    declared = {"a": Weight((5, 5, 400), 25), "b": [Weight((300, 40), 300), Weight((7,), constant=1.0)], "c": {}}
    drawn = draw(jax.random.key(0), declared)
    for leaf, fan_in in ((drawn["a"], 25), (drawn["b"][0], 300)):
        scaled = np.sort(np.asarray(leaf).reshape(-1) * np.sqrt(fan_in))
        assert np.abs(scaled).max() <= 1.0 + 1e-6
        # Kolmogorov-Smirnov against the uniform distribution on (-1, 1), at a level of 1e-5.
        distance = np.abs((scaled + 1) / 2 - (np.arange(scaled.size) + 0.5) / scaled.size).max()
        assert distance < 2.4 / np.sqrt(scaled.size)
    assert np.abs(np.corrcoef(drawn["a"].reshape(-1)[:9000], drawn["b"][0].reshape(-1)[:9000])[0, 1]) < 0.06
    np.testing.assert_array_equal(drawn["b"][1], np.ones(7, np.float32))
    assert not bool((draw(jax.random.key(1), declared)["a"] == drawn["a"]).any())
