"""The unit of a separable convolution: ReLU, depthwise, pointwise, normalisation by the statistics of the batch.

    z = P (D * relu(x)),   m, v = mean and variance of z over the batch,   y = (z - m) / sqrt(v + eps)

and gamma y + beta where a unit is given an affine.

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

from prdarts_jax.ops import kernels
from prdarts_jax.ops.batch_norm import backward_means, batch_moments, normalised, over_devices, per_channel
from prdarts_jax.ops.depthwise import Window, depthwise_conv, wide_dtype
from prdarts_jax.ops.layers import pointwise

# What a rematerialised program should keep: a 1x1 unit of few outputs takes the longest for every byte of z.
WORTH_KEEPING = "pointwise_unit"

Moments = tuple[jax.Array, jax.Array]  # mean, biased variance, [D] each


class Affine(NamedTuple):
    """gamma y + beta, [D] each."""

    scale: jax.Array
    bias: jax.Array


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


_Weights = tuple[tuple[jax.Array, jax.Array, Affine | None], ...]  # (depthwise, matrix, affine) of each unit


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
    return kernels.call("separable_forward", shapes, *arrays, stride=unit.stride, dilation=unit.dilation)


def _compiled(unit: _Static, depthwise: jax.Array, *arrays: jax.Array) -> bool:
    window = kernels.compiled(depthwise.shape[0], depthwise.shape[1], unit.stride, unit.dilation)
    return unit.own_kernels and window and kernels.serve(depthwise, *arrays)


def _forward(given: _Input, depthwise: jax.Array, matrix: jax.Array, unit: _Static) -> list[jax.Array]:
    """(z, mean, biased variance), of this device's part of the batch."""
    run: Callable[..., list[jax.Array]] = partial(_composed_forward, unit=unit)
    if _compiled(unit, depthwise, matrix, *given):
        run = kernels.lowered(partial(_native_forward, unit=unit), run)
    return run(*given, depthwise, matrix)


# --- backward ---------------------------------------------------------------------------------------------------------


class _Residuals(NamedTuple):
    given: _Input
    depthwise: jax.Array
    matrix: jax.Array
    affine: Affine | None
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
    return kernels.call(name, shapes, *arrays, stride=unit.stride, dilation=unit.dilation)


def _backward(
    kept: _Residuals, dy: jax.Array, unit: _Static, weights: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Affine | None]]:
    """(cotangent of what the input stands for, those of the weights; zeros of them unless `weights`).

    dz = gamma (dy - mean(dy) - y mean(dy y)) / sigma, through the convolutions. Gamma is put into the matrix, so that
    the two means of a normalisation are the gradients of beta and gamma as well: one pass over dy, not three.
    """
    own, affine, matrix = unit.own_kernels, kept.affine, kept.matrix
    means = backward_means(dy, *kept.out, own_kernels=own)
    d_affine = None
    if affine is not None:
        count = dy.shape[0] * dy.shape[1] * dy.shape[2]
        d_affine = Affine((count * means[1]).astype(affine.scale.dtype), (count * means[0]).astype(affine.bias.dtype))
        matrix = matrix * affine.scale.astype(matrix.dtype)[None]
    means = means if unit.axis_name is None else lax.pmean(means, unit.axis_name)
    run: Callable[..., list[jax.Array]] = partial(_composed_gradients, unit=unit, weights=weights)
    if _compiled(unit, kept.depthwise, matrix, *kept.given, *kept.out, dy):
        run = kernels.lowered(partial(_native_gradients, unit=unit, weights=weights), run)
    dx, *found = run(*kept.given, kept.depthwise, matrix, dy, *kept.out, *means)
    if not weights:
        return dx, jax.tree.map(jnp.zeros_like, (kept.depthwise, kept.matrix, affine))
    d_depthwise, d_matrix = found
    if affine is not None:
        d_matrix = d_matrix * affine.scale.astype(d_matrix.dtype)[None]
    return dx, (d_depthwise.astype(kept.depthwise.dtype), d_matrix.astype(kept.matrix.dtype), d_affine)


# --- units in a row ---------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _units(x: jax.Array, weights: _Weights, statics: tuple[_Static, ...]) -> tuple[jax.Array, list[Moments]]:
    return _run(x, weights, statics)[0]


def _run(
    x: jax.Array, weights: _Weights, statics: tuple[_Static, ...]
) -> tuple[tuple[jax.Array, list[Moments]], list[_Residuals]]:
    given = _itself(x)
    moments, kept = [], []
    for (depthwise, matrix, affine), unit in zip(weights, statics, strict=True):
        z, *found = _forward(given, depthwise, matrix, unit)
        if depthwise.shape[:2] == (1, 1):
            z, *found = (checkpoint_name(a, WORTH_KEEPING) for a in (z, *found))
        mean, variance, scale = over_devices(found, unit.axis_name)
        moments.append((mean, variance))
        kept.append(_Residuals(given, depthwise, matrix, affine, _Input(z, mean, scale)))
        given = kept[-1].out if affine is None else _itself(_affine(kept[-1].out, affine, x.dtype))
    return (normalised(*given).astype(x.dtype), moments), kept


def _itself(x: jax.Array) -> _Input:
    wide = wide_dtype(x)
    return _Input(x, jnp.zeros(x.shape[3:], wide), jnp.ones(x.shape[3:], wide))


def _affine(out: _Input, affine: Affine, dtype: Any) -> jax.Array:
    y = normalised(*out)
    scale, bias = (per_channel(a.astype(y.dtype)) for a in affine)
    return (y * scale + bias).astype(dtype)


@jax.tree_util.register_static
class _Wanted(NamedTuple):
    """Whether gradients of the weights are asked for: they are more than half of the work."""

    weights: bool


def _units_fwd(x: Any, weights: Any, statics: tuple[_Static, ...]) -> tuple[Any, tuple[_Wanted, list[_Residuals]]]:
    wanted = _Wanted(any(a.perturbed for a in jax.tree.leaves(weights, is_leaf=_is_primal)))
    out, kept = _run(x.value, jax.tree.map(lambda a: a.value, weights, is_leaf=_is_primal), statics)
    return out, (wanted, kept)


def _is_primal(a: Any) -> bool:
    return hasattr(a, "perturbed")


def _units_bwd(
    statics: tuple[_Static, ...], residuals: tuple[_Wanted, list[_Residuals]], cts: Any
) -> tuple[jax.Array, _Weights]:
    """The moments have no cotangent."""
    wanted, kept = residuals
    ct = cts[0]
    if isinstance(ct, jax.custom_derivatives.SymbolicZero):
        ct = jnp.zeros(ct.shape, ct.dtype)
    gradients = []
    for one, unit in zip(reversed(kept), reversed(statics), strict=True):
        ct, mine = _backward(one, ct, unit, wanted.weights)
        gradients.append(mine)
    return ct, tuple(reversed(gradients))


_units.defvjp(_units_fwd, _units_bwd, symbolic_zeros=True)


def separable_units(
    x: jax.Array,
    units: Sequence[Unit],
    affines: Sequence[Affine] | None = None,
    *,
    axis_name: str | None = None,
    own_kernels: bool = True,
) -> tuple[jax.Array, list[Moments]]:
    """Units in a row, each: ReLU, depthwise convolution, 1x1 convolution, batch normalisation, gamma and beta if any.

    y = gamma (z - mean) / sqrt(variance + 1e-5) + beta, z[b,i,j,d] = sum_c matrix[c,d] (depthwise * relu(x))[b,i,j,c].

    Args:
      x: [B,H,W,C].
      units: at least one; the output of each is the input of the next.
      affines: gamma and beta after the normalisation of each unit; none: gamma = 1, beta = 0.
      axis_name: mapped axis over which the batch is split, for the statistics; or None.
      own_kernels: whether the CPU kernels may be used. A program that leaves this process cannot have them.

    Returns:
      (y of the last unit [B,ceil(H/s),ceil(W/s),D] in the dtype of x, (mean, biased variance) [D] of each over all
      devices). The moments are for running statistics: no gradient flows through them. Reverse mode only.

    >>> x = jnp.arange(32.0).reshape(2, 4, 4, 1)
    >>> y, ((mean, variance),) = separable_units(x, [Unit(jnp.ones((3, 3, 1)), jnp.ones((1, 2)))])
    >>> y.shape, bool(abs(y.mean()) < 1e-5), bool(abs(y.std() - 1) < 1e-4)
    ((2, 4, 4, 2), True, True)
    """
    statics = tuple(_Static(unit.stride, unit.dilation, axis_name, own_kernels) for unit in units)
    given = [None] * len(units) if affines is None else affines
    weights = tuple((unit.depthwise, unit.matrix, affine) for unit, affine in zip(units, given, strict=True))
    y, moments = _units(x, weights, statics)
    return y, jax.tree.map(lax.stop_gradient, moments)


def pointwise_unit(
    x: jax.Array,
    matrix: jax.Array,
    affine: Affine | None = None,
    *,
    axis_name: str | None = None,
    own_kernels: bool = True,
) -> tuple[jax.Array, Moments]:
    """A unit without a depthwise convolution: ReLU, 1x1 convolution, batch normalisation, gamma and beta if any.

    >>> pointwise_unit(jnp.ones((2, 4, 4, 3)), jnp.ones((3, 5)))[0].shape
    (2, 4, 4, 5)
    """
    ones = jnp.ones((1, 1, x.shape[3]), matrix.dtype)  # XLA drops a multiplication by one
    affines = None if affine is None else [affine]
    y, (moments,) = separable_units(x, [Unit(ones, matrix)], affines, axis_name=axis_name, own_kernels=own_kernels)
    return y, moments
