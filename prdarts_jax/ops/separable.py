"""The unit of a separable convolution: ReLU, depthwise, pointwise, normalisation by the statistics of the batch.

    z = P (D * relu(x)),   m, v = mean and variance of z over the batch,   y = (z - m) / sqrt(v + eps)

On a CPU each direction is one kernel (`native`), beside two means of a batch normalisation's rule; elsewhere, and where
a kernel cannot serve, it is composed of the leaf layers. What a kernel computes is differentiated as its composition
is, so reverse mode of any order works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from prdarts_jax.ops import native
from prdarts_jax.ops.depthwise import Window, depthwise_conv
from prdarts_jax.ops.layers import pointwise
from prdarts_jax.ops.moments import backward_means, batch_moments, normalised, over_devices, per_channel

Moments = tuple[jax.Array, jax.Array]  # mean, biased variance, [D] each


class _Unit(NamedTuple):
    """Static arguments."""

    stride: int
    dilation: int
    axis_name: str | None
    own_kernels: bool


# --- forward ----------------------------------------------------------------------------------------------------------


def _convolve(x: jax.Array, depthwise: jax.Array, matrix: jax.Array, unit: _Unit) -> jax.Array:
    convolve = partial(depthwise_conv, stride=unit.stride, dilation=unit.dilation, own_kernels=unit.own_kernels)
    return pointwise(convolve(jax.nn.relu(x), depthwise), matrix)


def _composed_forward(x: jax.Array, depthwise: jax.Array, matrix: jax.Array, *, unit: _Unit) -> list[jax.Array]:
    z = _convolve(x, depthwise, matrix, unit)
    return [z, *batch_moments(z, own_kernels=unit.own_kernels)]


def _native_forward(x: jax.Array, depthwise: jax.Array, matrix: jax.Array, *, unit: _Unit) -> list[jax.Array]:
    window, d = Window(depthwise.shape[0], depthwise.shape[1], unit.stride, unit.dilation), matrix.shape[1]
    shapes = [(x.shape[0], *window.output(*x.shape[1:3]), d), (d,), (d,)]
    return native.call(
        "separable_forward", shapes, x, depthwise, matrix, stride=unit.stride, dilation=unit.dilation
    )


def _compiled(unit: _Unit, depthwise: jax.Array, *arrays: jax.Array) -> bool:
    window = native.compiled(depthwise.shape[0], depthwise.shape[1], unit.stride, unit.dilation)
    return unit.own_kernels and window and native.serve(depthwise, *arrays)


def _forward(x: jax.Array, depthwise: jax.Array, matrix: jax.Array, unit: _Unit) -> list[jax.Array]:
    """(z, mean, biased variance), of this device's part of the batch."""
    composed = partial(_composed_forward, unit=unit)
    if not _compiled(unit, depthwise, matrix, x):
        return composed(x, depthwise, matrix)
    return native.lowered(partial(_native_forward, unit=unit), composed)(x, depthwise, matrix)


# --- backward ---------------------------------------------------------------------------------------------------------


class _Residuals(NamedTuple):
    x: jax.Array
    depthwise: jax.Array
    matrix: jax.Array
    z: jax.Array
    mean: jax.Array
    scale: jax.Array  # 1 / sigma


def _composed_gradients(
    x: jax.Array,
    depthwise: jax.Array,
    matrix: jax.Array,
    dy: jax.Array,
    z: jax.Array,
    mean: jax.Array,
    scale: jax.Array,
    mean_dy: jax.Array,
    mean_cross: jax.Array,
    *,
    unit: _Unit,
    weights: bool,
) -> list[jax.Array]:
    y = normalised(z, mean, scale)
    dz = per_channel(scale) * (dy.astype(y.dtype) - per_channel(mean_dy) - y * per_channel(mean_cross))
    if weights:
        _, pull = jax.vjp(partial(_convolve, unit=unit), x, depthwise, matrix)
    else:
        _, pull = jax.vjp(lambda x: _convolve(x, depthwise, matrix, unit), x)
    return list(pull(dz.astype(z.dtype)))


def _native_gradients(*arrays: jax.Array, unit: _Unit, weights: bool) -> list[jax.Array]:
    name = "separable_backward" if weights else "separable_input_gradient"
    shapes = [a.shape for a in arrays[: 3 if weights else 1]]
    return native.call(name, shapes, *arrays, stride=unit.stride, dilation=unit.dilation)


def _backward(kept: _Residuals, dy: jax.Array, unit: _Unit, weights: bool) -> list[jax.Array]:
    """[dx], or [dx, d depthwise, d matrix] if `weights`."""
    gradients: Callable[..., list[jax.Array]] = partial(_composed_gradients, unit=unit, weights=weights)
    if _compiled(unit, kept.depthwise, *kept, dy):
        gradients = native.lowered(partial(_native_gradients, unit=unit, weights=weights), gradients)
    split = partial(backward_means, axis_name=unit.axis_name, own_kernels=unit.own_kernels)
    means = split(dy, kept.z, kept.mean, kept.scale)
    return gradients(*kept[:3], dy, *kept[3:], *means)


# --- the unit ---------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unit(x: jax.Array, depthwise: jax.Array, matrix: jax.Array, unit: _Unit) -> tuple[jax.Array, Moments]:
    return _unit_run(x, depthwise, matrix, unit)[0]


def _unit_run(
    x: jax.Array, depthwise: jax.Array, matrix: jax.Array, unit: _Unit
) -> tuple[tuple[jax.Array, Moments], _Residuals]:
    z, *moments = _forward(x, depthwise, matrix, unit)
    mean, variance, scale = over_devices(moments, unit.axis_name)
    y = normalised(z, mean, scale).astype(x.dtype)
    return (y, (mean, variance)), _Residuals(x, depthwise, matrix, z, mean, scale)


@jax.tree_util.register_static
class _Wanted(NamedTuple):
    """Whether gradients of the weights are asked for: they are more than half of the work."""

    weights: bool


def _unit_fwd(x: Any, depthwise: Any, matrix: Any, unit: _Unit) -> tuple[Any, tuple[_Wanted, _Residuals]]:
    out, kept = _unit_run(x.value, depthwise.value, matrix.value, unit)
    return out, (_Wanted(depthwise.perturbed or matrix.perturbed), kept)


def _unit_bwd(unit: _Unit, residuals: tuple[_Wanted, _Residuals], cts: Any) -> tuple[Any, ...]:
    """dx = (dy - mean(dy) - y mean(dy y)) / sigma, through the convolutions. The moments have no cotangent."""
    wanted, kept = residuals
    dy = cts[0]
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    gradients = _backward(kept, dy, unit, wanted.weights)
    if wanted.weights:
        dx, ddepthwise, dmatrix = gradients
        return dx, ddepthwise.astype(kept.depthwise.dtype), dmatrix.astype(kept.matrix.dtype)
    return gradients[0], jnp.zeros_like(kept.depthwise), jnp.zeros_like(kept.matrix)


_unit.defvjp(_unit_fwd, _unit_bwd, symbolic_zeros=True)


def separable_unit(
    x: jax.Array,
    depthwise: jax.Array,
    matrix: jax.Array,
    *,
    stride: int = 1,
    dilation: int = 1,
    axis_name: str | None = None,
    own_kernels: bool = True,
) -> tuple[jax.Array, Moments]:
    """ReLU, depthwise convolution, 1x1 convolution, batch normalisation without affine.

    y = (z - mean) / sqrt(variance + 1e-5), z[b,i,j,d] = sum_c matrix[c,d] (depthwise * relu(x))[b,i,j,c].

    Args:
      x: [B,H,W,C].
      depthwise: [k,k,C], k odd; zero padding dilation (k-1)/2.
      matrix: [C,D].
      stride, dilation: of the depthwise convolution.
      axis_name: mapped axis over which the batch is split, for the statistics; or None.
      own_kernels: whether kernels of ours may be used on CPU. A program that leaves this process cannot have them.

    Returns:
      (y [B,ceil(H/s),ceil(W/s),D] in the dtype of x, (mean, biased variance) [D] over all devices). The moments are for
      running statistics: no gradient flows through them. Reverse mode only.

    >>> x = jnp.arange(32.0).reshape(2, 4, 4, 1)
    >>> y, (mean, variance) = separable_unit(x, jnp.ones((3, 3, 1)), jnp.ones((1, 2)))
    >>> y.shape, bool(abs(y.mean()) < 1e-5), bool(abs(y.std() - 1) < 1e-4)
    ((2, 4, 4, 2), True, True)
    """
    y, moments = _unit(x, depthwise, matrix, _Unit(stride, dilation, axis_name, own_kernels))
    return y, jax.tree.map(lax.stop_gradient, moments)


def pointwise_unit(
    x: jax.Array, matrix: jax.Array, *, axis_name: str | None = None, own_kernels: bool = True
) -> tuple[jax.Array, Moments]:
    """`separable_unit` without a depthwise convolution: ReLU, 1x1 convolution, batch normalisation without affine.

    >>> pointwise_unit(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 5)))[0].shape
    (2, 4, 4, 5)
    """
    ones = jnp.ones((1, 1, x.shape[3]), matrix.dtype)  # XLA drops a multiplication by one
    return separable_unit(x, ones, matrix, axis_name=axis_name, own_kernels=own_kernels)
