"""Convolutions of several slots at once, their channels side by side, and the batch statistics of all of them.

    z_s = P_s sum_d (D_{d,s} * relu(x_s))        s: a slot, d: a dilation        (a unit without its normalisation)

A slot is a place for an operation. Its kernels are embedded in the largest one of a dilation, and those of dilations
that it does not have are zero. So a device starts a few large programs in place of many small ones, and the statistics
of all slots travel in one collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops.batch_norm import normalised, over_devices, per_channel
from prdarts_jax.ops.depthwise import depthwise_conv, wide_dtype
from prdarts_jax.ops.layers import pointwise


class Slots(NamedTuple):
    """The weights of a unit of S slots."""

    kernels: Mapping[int, jax.Array]  # dilation -> [S,k,k,C], k odd
    matrices: jax.Array  # [S,C,D]


def embedded(kernels: jax.Array, size: int) -> jax.Array:
    """Kernels [...,k,k,C] as kernels [...,size,size,C] of the same convolution.

    >>> embedded(jnp.ones((1, 1, 2)), 3)[:, :, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    margin = (size - kernels.shape[-2]) // 2
    return jnp.pad(kernels, [(0, 0)] * (kernels.ndim - 3) + [(margin, margin)] * 2 + [(0, 0)])


@partial(jax.checkpoint, static_argnums=(2, 3))
def from_sources(x: jax.Array, slots: Slots, sources: int, stride: int) -> jax.Array:
    """The unit of slots that share their inputs: the first S/G slots read the first source, and so on.

    Nothing lies between the two convolutions, so they are one, with the dense kernel D[p,q,c] P[c,d]: a source is read
    once for all its slots, and what the first convolution makes is never stored.

    Args:
      x: [B,H,W,G C], the sources side by side.
      slots: S slots, S a multiple of G.
      sources: G.
      stride: of both axes.

    Returns:
      z [B,ceil(H/stride),ceil(W/stride),S D] in the dtype of x.

    >>> slots = Slots({1: jnp.ones((4, 3, 3, 2))}, jnp.ones((4, 2, 5)))
    >>> from_sources(jnp.ones((1, 8, 8, 4)), slots, 2, 1).shape
    (1, 8, 8, 20)
    """
    v, total = jax.nn.relu(x), None
    for dilation, kernels in slots.kernels.items():
        dense = kernels[..., None] * slots.matrices[:, None, None]  # [S,k,k,C,D]
        kernel = jnp.moveaxis(dense, 0, 3).reshape(*dense.shape[1:4], -1)
        z = _convolution(v, kernel.astype(x.dtype), stride, dilation, sources)
        total = z if total is None else total + z
    assert total is not None
    return total


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, dilation: int, groups: int) -> jax.Array:
    pad = (dilation * (kernel.shape[0] - 1) // 2,) * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        (pad, pad),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def from_slots(x: jax.Array, mean: jax.Array, scale: jax.Array, slots: Slots, *, own_kernels: bool = True) -> jax.Array:
    """The unit of slots that each have an input of their own, (x - mean) scale; stride 1.

    The backward pass computes what lies between the arguments and z again: it is as large as they are.

    Args:
      x: [B,H,W,S C].
      mean, scale: [1,S C] or [B,S C], as `statistics` gives them.
      slots: S slots.
      own_kernels: whether the CPU kernels may be used.

    Returns:
      z [B,H,W,S D] in the dtype of x.

    >>> slots = Slots({1: jnp.ones((2, 3, 3, 4))}, jnp.ones((2, 4, 5)))
    >>> from_slots(jnp.ones((1, 8, 8, 8)), jnp.zeros((1, 8)), jnp.ones((1, 8)), slots).shape
    (1, 8, 8, 10)
    """
    return _from_slots(x, mean, scale, slots, own_kernels)


@partial(jax.checkpoint, static_argnums=(4,))
def _from_slots(x: jax.Array, mean: jax.Array, scale: jax.Array, slots: Slots, own_kernels: bool) -> jax.Array:
    wide = x.astype(mean.dtype)
    v = jax.nn.relu((wide - mean[:, None, None]) * scale[:, None, None]).astype(x.dtype)
    total = None
    for dilation, kernels in slots.kernels.items():
        kernel = jnp.moveaxis(kernels, 0, 2).reshape(*kernels.shape[1:3], -1)
        y = depthwise_conv(v, kernel, dilation=dilation, own_kernels=own_kernels)
        total = y if total is None else total + y
    assert total is not None
    return pointwise(total, block_diagonal(slots.matrices))


def block_diagonal(matrices: jax.Array) -> jax.Array:
    """[S,C,D] -> [S C, S D]: one product in place of S small ones.

    >>> block_diagonal(jnp.asarray([[[1.0]], [[2.0]]])).tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    s, c, d = matrices.shape
    eye = jnp.eye(s, dtype=matrices.dtype)
    return (matrices[:, :, None, :] * eye[:, None, :, None]).reshape(s * c, s * d)


def reduced(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """`factorized_reduce` of relu(x) for every target of every source, as one 2x2 convolution of stride 2.

    Its kernel has two taps that are not zero: (0,0) gives the first half of the channels, (1,1) the second.

    Args:
      x: [B,H,W,G C], the sources side by side.
      first, second: [G,T,C,D/2].

    Returns:
      [B,ceil(H/2),ceil(W/2),G T D].

    >>> halves = jnp.ones((2, 3, 4, 2))
    >>> reduced(jnp.ones((1, 7, 8, 8)), halves, halves).shape
    (1, 4, 4, 24)
    """
    g, _, c, half = first.shape
    halves = [jnp.pad(a, [(0, 0)] * 3 + [pad]) for a, pad in ((first, (0, second.shape[3])), (second, (half, 0)))]
    # [G,T,C,D] -> [C,G T D], in the corners of the window.
    taps = [jnp.moveaxis(a, 2, 0).reshape(c, -1) for a in halves]
    nothing = jnp.zeros_like(taps[0])
    kernel = jnp.stack([taps[0], nothing, nothing, taps[1]]).reshape(2, 2, c, -1)
    x = jnp.pad(jax.nn.relu(x), ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return _convolution(x, kernel.astype(x.dtype), 2, 1, g)


# --- batch statistics -------------------------------------------------------------------------------------------------

Statistics = tuple[jax.Array, jax.Array]  # mean, 1/sigma, [1,C] or [B,C] each


def _image_moments(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, biased variance) [B,C] of each image, in one pass over z [B,h,w,C].

    Sums of squares cancel where the mean is large beside sigma, so those of an image are of distances from the pixel in
    its middle. That pixel has itself 1/(h w) of the variance that its distance from the mean can cost: at most h w
    roundings are lost.
    """
    wide = z.astype(wide_dtype(z))
    middle = wide[:, z.shape[1] // 2, z.shape[2] // 2]
    shifted = wide - middle[:, None, None]
    mean = jnp.mean(shifted, axis=(1, 2))
    variance = jnp.mean(jnp.square(shifted), axis=(1, 2)) - jnp.square(mean)
    return middle + mean, jnp.maximum(variance, 0)


def _split(joined: jax.Array, zs: Sequence[jax.Array]) -> list[jax.Array]:
    return jnp.split(joined, np.cumsum([z.shape[3] for z in zs])[:-1], axis=-1)


def statistics(zs: tuple[jax.Array, ...], axis_name: str | None, *, by_image: bool = True) -> list[Statistics]:
    """(mean, 1 / sqrt(biased variance + 1e-5)) by channel of several arrays, over all devices in one collective.

    Args:
      zs: [B,h,w,C] each.
      axis_name: mapped axis over which the batch is split, or None.
      by_image: whether the statistics, the same of all images, are given for each: then their cotangents are sums by
        image, which are summed for all arrays together.

    Returns:
      [1,C] and [1,C] for each array, or [B,C] and [B,C], at least float32. Reverse mode: the rule keeps the arrays and
      the statistics, and takes one collective as well.

    >>> ((mean, scale),) = statistics((jnp.asarray([0.0, 2.0]).reshape(2, 1, 1, 1),), None)
    >>> mean.ravel().tolist(), scale.ravel().round(4).tolist()
    ([1.0, 1.0], [1.0, 1.0])
    """
    return _statistics(zs, axis_name, by_image)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _statistics(zs: tuple[jax.Array, ...], axis_name: str | None, by_image: bool) -> list[Statistics]:
    return _statistics_fwd(zs, axis_name, by_image)[0]


def _statistics_fwd(zs: tuple[jax.Array, ...], axis_name: str | None, by_image: bool) -> tuple[list[Statistics], tuple]:
    means, variances = (jnp.concatenate(parts, axis=1) for parts in zip(*map(_image_moments, zs), strict=True))
    share = 1 / means.shape[0]  # taken before a sum: behind it, a GPU starts an operation more
    mean = jnp.sum(share * means, axis=0)
    variance = jnp.sum(share * (variances + jnp.square(means - mean[None])), axis=0)
    mean, _, scale = over_devices([mean, variance], axis_name)
    images = [jnp.broadcast_to(a[None], (zs[0].shape[0] if by_image else 1, *a.shape)) for a in (mean, scale)]
    return list(zip(*(_split(a, zs) for a in images), strict=True)), (zs, mean, scale)


def _statistics_bwd(
    axis_name: str | None, by_image: bool, kept: tuple, cts: list[Statistics]
) -> tuple[tuple[jax.Array, ...]]:
    """dz = (dm - ds s^2 (z - m) s) / n, m and s the mean and 1/sigma of n values: ds/dv = -s^3/2, dv/dz = 2 (z-m)/n."""
    zs, mean, scale = kept
    joined = jnp.sum(jnp.concatenate([ct for pair in zip(*cts, strict=True) for ct in pair], axis=1), axis=0)
    if axis_name is not None:  # of the whole batch a device has one part, and of the gradient the mean is taken
        joined = lax.pmean(joined, axis_name)
    d_mean, d_scale = jnp.split(joined, 2)
    by_array = (_split(a, zs) for a in (mean, scale, d_mean, d_scale * jnp.square(scale)))
    gradients = []
    for z, mean, scale, constant, slope in zip(zs, *by_array, strict=True):
        n = z.shape[0] * z.shape[1] * z.shape[2]
        dz = per_channel(constant / n) - normalised(z, mean, scale) * per_channel(slope / n)
        gradients.append(dz.astype(z.dtype))
    return (tuple(gradients),)


_statistics.defvjp(_statistics_fwd, _statistics_bwd)
