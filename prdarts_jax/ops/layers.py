"""Leaf layers with differentiation rules of their own; `*_reference`: the same in plain JAX, the rules' oracles."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops.batch_norm import (
    _batch_norm,
    _batch_norm_bwd,
    _batch_norm_fwd,
)
from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.pools import _max_pool, _max_pool_bwd, _max_pool_fwd


class Weight(NamedTuple):
    """A weight to be drawn: uniform in +-1/sqrt(fan_in), the rule for every convolution and linear layer.

    With `fan_in` 0 it is not drawn but constant (BN scales and biases).
    """

    shape: tuple[int, ...]
    fan_in: int = 0  # k * k * C_in / groups
    constant: float = 0.0


def draw(key: jax.Array, tree: Any) -> Any:
    """Draws a tree of `Weight` declarations, float32: one random vector, cut into the leaves in tree order.

    >>> drawn = draw(jax.random.key(0), {"kernel": Weight((3, 3, 16), 9), "scale": Weight((16,), constant=1.0)})
    >>> bool(jnp.abs(drawn["kernel"]).max() <= 1 / 3), float(drawn["scale"].min())
    (True, 1.0)
    """
    declared, structure = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, Weight))
    sizes = [math.prod(w.shape) if w.fan_in else 0 for w in declared]
    noise = jax.random.uniform(key, (sum(sizes),), jnp.float32, -1.0, 1.0)
    ends = np.cumsum(sizes)
    leaves = [
        (noise[end - size : end] / math.sqrt(w.fan_in)).reshape(w.shape)
        if w.fan_in
        else jnp.full(w.shape, w.constant, jnp.float32)
        for w, size, end in zip(declared, sizes, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1x1 convolution: [B,H,W,C] x [C,D] -> [B,H,W,D] in the dtype of x, accumulated in float32 at least."""
    # As a product of two matrices: the gradient of the kernel is then one too, where that of a product over three axes
    # makes XLA:CPU compute a transposed copy of the cotangent first.
    flat = x.reshape(-1, x.shape[3])
    out = lax.dot(flat, kernel.astype(x.dtype), preferred_element_type=wide_dtype(x))
    return out.astype(x.dtype).reshape(*x.shape[:3], kernel.shape[1])


def conv(x: jax.Array, kernel: jax.Array, *, stride: int | tuple[int, int] = 1) -> jax.Array:
    """Dense k x k convolution, zero padding (k-1)/2: [B,H,W,C] x [k,k,C,D] -> [B,ceil(H/s),ceil(W/s),D]."""
    strides = (stride, stride) if isinstance(stride, int) else stride
    pads = [((k - 1) // 2, (k - 1) // 2) for k in kernel.shape[:2]]
    if x.shape[3] <= _THIN:
        return _thin_conv(x, kernel, strides, pads)
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


_THIN = 4  # channels of an image


def _thin_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: list[tuple[int, int]]) -> jax.Array:
    """A convolution of few channels as one product with the gathered patches.

    In a loop XLA:CPU takes 44 ms for the kernel gradient of a 3x3 convolution of 3 to 48 channels (32x32, batch 32).
    """
    height, width, _, out = kernel.shape
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    ends = [  # of the strided slice that one tap of the kernel meets
        (n + sum(pad) - k) // s * s + 1
        for n, pad, k, s in zip(x.shape[1:3], pads, kernel.shape[:2], strides, strict=True)
    ]
    patches = [
        padded[:, p : p + ends[0] : strides[0], q : q + ends[1] : strides[1]]
        for p in range(height)
        for q in range(width)
    ]
    return pointwise(jnp.concatenate(patches, axis=3), kernel.reshape(-1, out))


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Affine map in float32 at least: [B,C] x [C,D] + [D] -> [B,D]."""
    return x.astype(wide_dtype(x)) @ kernel + bias[None, :]


# --- batch normalisation with the statistics of the batch -------------------------------------------------------------


_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


# --- pooling ----------------------------------------------------------------------------------------------------------

_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


# --- strided identity -------------------------------------------------------------------------------------------------


class Reduction(NamedTuple):
    """The weights of a strided identity: ReLU, `factorized_reduce`, normalisation."""

    first: jax.Array  # [C,D/2]
    second: jax.Array


def factorized_reduce(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Two 1x1 stride-2 convolutions, the second on the input shifted by (1,1), concatenated (no ReLU, no BN).

    Args:
      x: [B,H,W,C]; an odd size is padded by one zero at the right and the bottom.
      first, second: [C,D/2].

    Returns:
      [B,ceil(H/2),ceil(W/2),D].
    """
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    return jnp.concatenate([pointwise(x[:, ::2, ::2], first), pointwise(x[:, 1::2, 1::2], second)], axis=3)
