"""The unit of a separable convolution: ReLU, depthwise, pointwise, normalisation by the statistics of the batch.

    z = P (D * relu(x)),   m, v = mean and variance of z over the batch,   y = (z - m) / sqrt(v + eps)

On a CPU each direction is one kernel (`native`), beside two means of a batch normalisation's rule; elsewhere, and where
a kernel cannot serve, it is composed of the leaf layers. Units in a row hand on z, m and 1/sigma: what lies between two
of them is normalised when the next one reads it. What a kernel computes is differentiated as its composition is, so
reverse mode of any order works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from prdarts_jax.ops import native
from prdarts_jax.ops.depthwise import Window, depthwise_conv, wide_dtype
from prdarts_jax.ops.layers import pointwise
from prdarts_jax.ops.moments import backward_means, batch_moments, normalised, over_devices, per_channel

# What a rematerialised program should keep: a 1x1 unit of few outputs takes the longest for every byte of z.
WORTH_KEEPING = "pointwise_unit"

Moments = tuple[jax.Array, jax.Array]  # mean, biased variance, [D] each


class Unit(NamedTuple):
    """The weights of a unit, and its static window."""

    depthwise: jax.Array  # [k,k,C], k odd; zero padding dilation (k-1)/2
    matrix: jax.Array  # [C,D]
    stride: int = 1
    dilation: int = 1


class _Static(NamedTuple):
    """Static arguments of a unit."""

    stride: int
    dilation: int
    axis_name: str | None
    own_kernels: bool


class _Input(NamedTuple):
    """An array that stands for (x - mean) * scale."""

    x: jax.Array
    mean: jax.Array
    scale: jax.Array


_Weights = tuple[tuple[jax.Array, jax.Array], ...]  # (depthwise, matrix) of each unit


# --- forward ----------------------------------------------------------------------------------------------------------


def _convolve(v: jax.Array, depthwise: jax.Array, matrix: jax.Array, unit: _Static) -> jax.Array:
    convolve = partial(depthwise_conv, stride=unit.stride, dilation=unit.dilation, own_kernels=unit.own_kernels)
    return pointwise(convolve(jax.nn.relu(v), depthwise), matrix)


def _composed_forward(
    x: jax.Array, mean: jax.Array, scale: jax.Array, depthwise: jax.Array, matrix: jax.Array, *, unit: _Static
) -> list[jax.Array]:
    z = _convolve(normalised(x, mean, scale).astype(x.dtype), depthwise, matrix, unit)
    return [z, *batch_moments(z, own_kernels=unit.own_kernels)]


def _native_forward(*arrays: jax.Array, unit: _Static) -> list[jax.Array]:
    x, _, _, depthwise, matrix = arrays
    window, d = Window(depthwise.shape[0], depthwise.shape[1], unit.stride, unit.dilation), matrix.shape[1]
    shapes = [(x.shape[0], *window.output(*x.shape[1:3]), d), (d,), (d,)]
    return native.call("separable_forward", shapes, *arrays, stride=unit.stride, dilation=unit.dilation)


def _compiled(unit: _Static, depthwise: jax.Array, *arrays: jax.Array) -> bool:
    window = native.compiled(depthwise.shape[0], depthwise.shape[1], unit.stride, unit.dilation)
    return unit.own_kernels and window and native.serve(depthwise, *arrays)


def _forward(given: _Input, depthwise: jax.Array, matrix: jax.Array, unit: _Static) -> list[jax.Array]:
    """(z, mean, biased variance), of this device's part of the batch."""
    run: Callable[..., list[jax.Array]] = partial(_composed_forward, unit=unit)
    if _compiled(unit, depthwise, matrix, *given):
        run = native.lowered(partial(_native_forward, unit=unit), run)
    return run(*given, depthwise, matrix)


# --- backward ---------------------------------------------------------------------------------------------------------


class _Residuals(NamedTuple):
    given: _Input
    depthwise: jax.Array
    matrix: jax.Array
    out: _Input  # stands for y


def _composed_gradients(*arrays: jax.Array, unit: _Static, weights: bool) -> list[jax.Array]:
    x, in_mean, in_scale, depthwise, matrix, dy, z, mean, scale, mean_dy, mean_cross = arrays
    y = normalised(z, mean, scale)
    dz = per_channel(scale) * (dy.astype(y.dtype) - per_channel(mean_dy) - y * per_channel(mean_cross))
    v = normalised(x, in_mean, in_scale).astype(x.dtype)
    if weights:
        _, pull = jax.vjp(partial(_convolve, unit=unit), v, depthwise, matrix)
    else:
        _, pull = jax.vjp(lambda v: _convolve(v, depthwise, matrix, unit), v)
    return list(pull(dz.astype(z.dtype)))


def _native_gradients(*arrays: jax.Array, unit: _Static, weights: bool) -> list[jax.Array]:
    x, _, _, depthwise, matrix, *_ = arrays
    name = "separable_backward" if weights else "separable_input_gradient"
    shapes = [x.shape, depthwise.shape, matrix.shape] if weights else [x.shape]
    return native.call(name, shapes, *arrays, stride=unit.stride, dilation=unit.dilation)


def _backward(kept: _Residuals, dy: jax.Array, unit: _Static, weights: bool) -> list[jax.Array]:
    """[cotangent of what the input stands for], and [d depthwise, d matrix] if `weights`."""
    run: Callable[..., list[jax.Array]] = partial(_composed_gradients, unit=unit, weights=weights)
    if _compiled(unit, kept.depthwise, kept.matrix, *kept.given, *kept.out, dy):
        run = native.lowered(partial(_native_gradients, unit=unit, weights=weights), run)
    means = backward_means(dy, *kept.out, axis_name=unit.axis_name, own_kernels=unit.own_kernels)
    return run(*kept.given, kept.depthwise, kept.matrix, dy, *kept.out, *means)


# --- units in a row ---------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _units(x: jax.Array, weights: _Weights, statics: tuple[_Static, ...]) -> tuple[jax.Array, list[Moments]]:
    return _run(x, weights, statics)[0]


def _run(
    x: jax.Array, weights: _Weights, statics: tuple[_Static, ...]
) -> tuple[tuple[jax.Array, list[Moments]], list[_Residuals]]:
    wide = wide_dtype(x)
    given = _Input(x, jnp.zeros(x.shape[3:], wide), jnp.ones(x.shape[3:], wide))
    moments, kept = [], []
    for (depthwise, matrix), unit in zip(weights, statics, strict=True):
        z, *found = _forward(given, depthwise, matrix, unit)
        if depthwise.shape[:2] == (1, 1):
            z, *found = (checkpoint_name(a, WORTH_KEEPING) for a in (z, *found))
        mean, variance, scale = over_devices(found, unit.axis_name)
        moments.append((mean, variance))
        kept.append(_Residuals(given, depthwise, matrix, _Input(z, mean, scale)))
        given = kept[-1].out
    return (normalised(*given).astype(x.dtype), moments), kept


@jax.tree_util.register_static
class _Wanted(NamedTuple):
    """Whether gradients of the weights are asked for: they are more than half of the work."""

    weights: bool


def _units_fwd(x: Any, weights: Any, statics: tuple[_Static, ...]) -> tuple[Any, tuple[_Wanted, list[_Residuals]]]:
    wanted = _Wanted(any(a.perturbed for pair in weights for a in pair))
    out, kept = _run(x.value, tuple((d.value, m.value) for d, m in weights), statics)
    return out, (wanted, kept)


def _units_bwd(
    statics: tuple[_Static, ...], residuals: tuple[_Wanted, list[_Residuals]], cts: Any
) -> tuple[jax.Array, _Weights]:
    """dz = (dy - mean(dy) - y mean(dy y)) / sigma, through the convolutions. The moments have no cotangent."""
    wanted, kept = residuals
    ct = cts[0]
    if isinstance(ct, jax.custom_derivatives.SymbolicZero):
        ct = jnp.zeros(ct.shape, ct.dtype)
    gradients: list[tuple[jax.Array, jax.Array]] = []
    for one, unit in zip(reversed(kept), reversed(statics), strict=True):
        ct, *mine = _backward(one, ct, unit, wanted.weights)
        pair = mine if wanted.weights else [jnp.zeros_like(one.depthwise), jnp.zeros_like(one.matrix)]
        gradients.append((pair[0].astype(one.depthwise.dtype), pair[1].astype(one.matrix.dtype)))
    return ct, tuple(reversed(gradients))


_units.defvjp(_units_fwd, _units_bwd, symbolic_zeros=True)


def separable_units(
    x: jax.Array, units: Sequence[Unit], *, axis_name: str | None = None, own_kernels: bool = True
) -> tuple[jax.Array, list[Moments]]:
    """Units in a row, each: ReLU, depthwise convolution, 1x1 convolution, batch normalisation without affine.

    y = (z - mean) / sqrt(variance + 1e-5), z[b,i,j,d] = sum_c matrix[c,d] (depthwise * relu(x))[b,i,j,c].

    Args:
      x: [B,H,W,C].
      units: at least one; the output of each is the input of the next.
      axis_name: mapped axis over which the batch is split, for the statistics; or None.
      own_kernels: whether kernels of ours may be used on CPU. A program that leaves this process cannot have them.

    Returns:
      (y of the last unit [B,ceil(H/s),ceil(W/s),D] in the dtype of x, (mean, biased variance) [D] of each over all
      devices). The moments are for running statistics: no gradient flows through them. Reverse mode only.

    >>> x = jnp.arange(32.0).reshape(2, 4, 4, 1)
    >>> y, ((mean, variance),) = separable_units(x, [Unit(jnp.ones((3, 3, 1)), jnp.ones((1, 2)))])
    >>> y.shape, bool(abs(y.mean()) < 1e-5), bool(abs(y.std() - 1) < 1e-4)
    ((2, 4, 4, 2), True, True)
    """
    statics = tuple(_Static(unit.stride, unit.dilation, axis_name, own_kernels) for unit in units)
    y, moments = _units(x, tuple((unit.depthwise, unit.matrix) for unit in units), statics)
    return y, jax.tree.map(lax.stop_gradient, moments)


def pointwise_unit(
    x: jax.Array, matrix: jax.Array, *, axis_name: str | None = None, own_kernels: bool = True
) -> tuple[jax.Array, Moments]:
    """A unit without a depthwise convolution: ReLU, 1x1 convolution, batch normalisation without affine.

    >>> pointwise_unit(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 5)))[0].shape
    (2, 4, 4, 5)
    """
    ones = jnp.ones((1, 1, x.shape[3]), matrix.dtype)  # XLA drops a multiplication by one
    y, (moments,) = separable_units(x, [Unit(ones, matrix)], axis_name=axis_name, own_kernels=own_kernels)
    return y, moments
