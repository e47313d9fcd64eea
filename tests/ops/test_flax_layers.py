"""Leaf layers against flax.linen: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax.ops import batch_norm, layers, pools
from prdarts_jax.ops.depthwise import depthwise_conv

STRIDES = pytest.mark.parametrize("stride", [1, 2])


def _normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def _assert_same(ours: Callable[..., jax.Array], theirs: Callable[..., jax.Array], *args: jax.Array) -> None:
    """Values, and gradients in every argument for a random cotangent."""

    @oracles.quick_jit
    def run(ct: jax.Array, *args: jax.Array):  # type: ignore[no-untyped-def]
        results = []
        for f in (ours, theirs):
            y, pull = jax.vjp(f, *args)
            results.append((y, pull(ct)))
        return results

    ct = _normal(99, jax.eval_shape(theirs, *args).shape)
    a, b = run(ct, *args)
    for mine, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=2e-5)


@STRIDES
@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_depthwise(size: int, dilation: int, stride: int) -> None:
    p = dilation * (size - 1) // 2
    layer = nn.Conv(
        4,
        (size, size),
        (stride, stride),
        padding=((p, p), (p, p)),
        kernel_dilation=dilation,
        feature_group_count=4,
        use_bias=False,
    )
    _assert_same(
        lambda x, w: depthwise_conv(x, w, stride=stride, dilation=dilation),
        lambda x, w: layer.apply({"params": {"kernel": w[:, :, None, :]}}, x),
        _normal(0, (2, 9, 8, 4)),
        _normal(1, (size, size, 4)),
    )


def test_pointwise() -> None:
    _assert_same(
        layers.pointwise,
        lambda x, w: nn.Conv(5, (1, 1), use_bias=False).apply({"params": {"kernel": w[None, None]}}, x),
        _normal(0, (2, 5, 4, 3)),
        _normal(1, (3, 5)),
    )


@STRIDES
def test_dense_convolution(stride: int) -> None:
    layer = nn.Conv(5, (3, 3), (stride, stride), padding=((1, 1), (1, 1)), use_bias=False)
    _assert_same(
        lambda x, w: layers.conv(x, w, stride=stride),
        lambda x, w: layer.apply({"params": {"kernel": w}}, x),
        _normal(0, (2, 7, 6, 3)),
        _normal(1, (3, 3, 3, 5)),
    )


def test_batch_norm() -> None:
    layer = nn.BatchNorm(use_running_average=False, epsilon=1e-5, use_bias=False, use_scale=False)
    stats = {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    _assert_same(
        batch_norm.batch_norm,
        lambda x: layer.apply(stats, x, mutable=["batch_stats"])[0],
        2.0 + 3.0 * _normal(0, (4, 5, 4, 3)),
    )


@STRIDES
def test_pooling(stride: int) -> None:
    geometry = {"window_shape": (3, 3), "strides": (stride, stride), "padding": ((1, 1), (1, 1))}
    x = _normal(0, (2, 7, 6, 3))
    _assert_same(lambda x: pools.max_pool(x, stride), lambda x: nn.max_pool(x, **geometry), x)
    theirs = lambda x: nn.avg_pool(x, **geometry, count_include_pad=False)  # noqa: E731
    _assert_same(lambda x: pools.avg_pool(x, stride), theirs, x)


def test_linear() -> None:
    _assert_same(
        layers.linear,
        lambda x, w, b: nn.Dense(4).apply({"params": {"kernel": w, "bias": b}}, x),
        _normal(0, (3, 6)),
        _normal(1, (6, 4)),
        _normal(2, (4,)),
    )
