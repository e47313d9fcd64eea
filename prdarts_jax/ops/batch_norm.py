"""Sums over a batch: the moments of a batch normalisation, the two means of its backward pass, an inner product.

On a CPU each is one kernel (`native`): XLA:CPU takes one program for every shape and sum.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from prdarts_jax.ops import kernels
from prdarts_jax.ops.depthwise import wide_dtype

BN_EPS = 1e-5


def per_channel(v: jax.Array) -> jax.Array:
    """[C] -> [1,1,1,C]."""
    return v.reshape(1, 1, 1, -1)


def normalised(z: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    """(z - mean) * scale by channel, in the dtype of the statistics."""
    return (z.astype(mean.dtype) - per_channel(mean)) * per_channel(scale)


def _composed_moments(z: jax.Array) -> list[jax.Array]:
    wide = z.astype(wide_dtype(z))
    mean = jnp.mean(wide, axis=(0, 1, 2))
    centred = wide - per_channel(mean)
    return [mean, jnp.mean(centred * centred, axis=(0, 1, 2))]


def _native_moments(z: jax.Array) -> list[jax.Array]:
    return kernels.call("batch_moments", [z.shape[3:], z.shape[3:]], z)


def batch_moments(z: jax.Array, *, own_kernels: bool = True) -> list[jax.Array]:
    """[mean, biased variance] of each channel of z [B,H,W,C], at least float32, of this device's part of the batch.

    >>> [round(float(a[0]), 3) for a in batch_moments(jnp.arange(4.0).reshape(4, 1, 1, 1))]
    [1.5, 1.25]
    """
    if own_kernels and kernels.serve(z):
        return kernels.lowered(_native_moments, _composed_moments)(z)
    return _composed_moments(z)


def over_devices(moments: list[jax.Array], axis_name: str | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mean, biased variance, 1/sigma) of the whole batch: both moments travel in one collective.

    m = mean_d(m_d), v = mean_d(v_d + (m_d - m)^2) over the devices d: a difference of mean squares would cancel where
    the mean is large beside sigma.
    """
    mean, variance = moments
    if axis_name is not None:
        means, variances = lax.all_gather(jnp.stack(moments), axis_name, axis=1)
        mean = jnp.mean(means, axis=0)
        variance = jnp.mean(variances + jnp.square(means - mean[None]), axis=0)
    return mean, variance, lax.rsqrt(variance + BN_EPS)


def _composed_means(dy: jax.Array, z: jax.Array, mean: jax.Array, scale: jax.Array) -> list[jax.Array]:
    ct = dy.astype(mean.dtype)
    return [jnp.mean(ct, axis=(0, 1, 2)), jnp.mean(ct * normalised(z, mean, scale), axis=(0, 1, 2))]


def _native_means(dy: jax.Array, z: jax.Array, mean: jax.Array, scale: jax.Array) -> list[jax.Array]:
    return kernels.call("norm_sums", [mean.shape, mean.shape], dy, z, mean, scale)


def backward_means(
    dy: jax.Array,
    z: jax.Array,
    mean: jax.Array,
    scale: jax.Array,
    *,
    axis_name: str | None = None,
    own_kernels: bool = True,
) -> list[jax.Array]:
    """[mean(dy), mean(dy y)] by channel over all devices, y = (z - mean) scale: what the backward pass subtracts.

    Args:
      dy, z: [B,H,W,C].
      mean, scale: [C], at least float32.
      axis_name: mapped axis over which the batch is split, or None.
      own_kernels: whether the CPU kernels may be used.
    """
    if own_kernels and kernels.serve(dy, z, mean, scale):
        means = kernels.lowered(_native_means, _composed_means)(dy, z, mean, scale)
    else:
        means = _composed_means(dy, z, mean, scale)
    return means if axis_name is None else lax.pmean(means, axis_name)


def _composed_inner(a: jax.Array, b: jax.Array) -> jax.Array:
    wide = wide_dtype(a, b)
    # By channel first: XLA:CPU splits a sum to a single number less well.
    return jnp.sum(jnp.sum(a.astype(wide) * b.astype(wide), axis=tuple(range(a.ndim - 1))))


def _native_inner(a: jax.Array, b: jax.Array) -> jax.Array:
    return kernels.call("inner", [()], a, b)[0]


def inner(a: jax.Array, b: jax.Array, *, own_kernels: bool = True) -> jax.Array:
    """sum(a b) of two arrays of one shape, at least float32.

    >>> float(inner(jnp.arange(3.0), jnp.ones(3)))
    3.0
    """
    if own_kernels and kernels.serve(a, b):
        return kernels.lowered(_native_inner, _composed_inner)(a, b)
    return _composed_inner(a, b)


Moments = tuple[jax.Array, jax.Array]  # mean, biased variance, [C] each


def batch_norm_reference(x: jax.Array, axis_name: str | None = None) -> jax.Array:
    """`batch_norm` by plain autodiff."""
    mean, _, scale = over_devices(batch_moments(x, own_kernels=False), axis_name)
    return normalised(x, mean, scale).astype(x.dtype)


class _Norm(NamedTuple):
    """Static arguments."""

    axis_name: str | None
    own_kernels: bool


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _batch_norm(x: jax.Array, norm: _Norm) -> tuple[jax.Array, Moments]:
    return _batch_norm_fwd(x, norm)[0]


def _batch_norm_fwd(x: jax.Array, norm: _Norm) -> tuple[tuple[jax.Array, Moments], tuple[jax.Array, jax.Array]]:
    mean, variance, scale = over_devices(batch_moments(x, own_kernels=norm.own_kernels), norm.axis_name)
    y = normalised(x, mean, scale).astype(x.dtype)
    return (y, (mean, variance)), (y, scale)


def _batch_norm_bwd(norm: _Norm, res: tuple[jax.Array, jax.Array], cts: tuple[jax.Array, Moments]) -> tuple[jax.Array]:
    """The moments only feed running statistics: no cotangent."""
    y, scale = res
    dy = cts[0]
    unit = jnp.zeros_like(scale), jnp.ones_like(scale)
    mean, cross = backward_means(dy, y, *unit, **norm._asdict())
    wide = y.astype(scale.dtype)
    dx = per_channel(scale) * (dy.astype(scale.dtype) - per_channel(mean) - wide * per_channel(cross))
    return (dx.astype(y.dtype),)


def batch_norm_moments(
    x: jax.Array, axis_name: str | None = None, *, own_kernels: bool = True
) -> tuple[jax.Array, Moments]:
    """`batch_norm`, and (mean, biased variance) [C] of the batch over all devices, through which no gradient flows.

    >>> [float(a[0]) for a in batch_norm_moments(jnp.asarray([0.0, 2.0]).reshape(2, 1, 1, 1))[1]]
    [1.0, 1.0]
    """
    y, moments = _batch_norm(x, _Norm(axis_name, own_kernels))
    return y, jax.tree.map(lax.stop_gradient, moments)


def batch_norm(x: jax.Array, axis_name: str | None = None, *, own_kernels: bool = True) -> jax.Array:
    """Batch normalisation without affine: y = (x - mean) / sqrt(var + 1e-5), statistics of the batch, biased variance.

    The rule keeps (y, 1/sigma): dx = (dy - mean(dy) - y mean(dy y)) / sigma. Over `axis_name` the means are means over
    all devices, and they are the only collectives of a cell.

    Args:
      x: [B,H,W,C]; statistics in float32 at least.
      axis_name: mapped axis over which the batch is split, or None.
      own_kernels: whether the CPU kernels may be used (`ops/kernels.py`).

    >>> y = batch_norm(jnp.arange(8.0).reshape(2, 2, 2, 1))
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-4)
    (True, True)
    """
    return batch_norm_moments(x, axis_name, own_kernels=own_kernels)[0]
