"""Leaf layers with differentiation rules of their own; `*_reference`: the same in plain JAX, the rules' oracles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops import depthwise
from prdarts_jax.ops.depthwise import wide_dtype
from prdarts_jax.ops.materialised import materialised
from prdarts_jax.ops.moments import backward_means, batch_moments, normalised, over_devices, per_channel

Moments = tuple[jax.Array, jax.Array]  # mean, biased variance, [C] each


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
    # makes XLA:CPU compute a transposed copy of the cotangent first (an operation then took up to 1.6 times as long).
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


def _thin_conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: list[tuple[int, int]]
) -> jax.Array:
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


def _batch_norm_bwd(
    norm: _Norm, res: tuple[jax.Array, jax.Array], cts: tuple[jax.Array, Moments]
) -> tuple[jax.Array]:
    """The moments only feed running statistics: no cotangent."""
    y, scale = res
    dy = cts[0]
    unit = jnp.zeros_like(scale), jnp.ones_like(scale)
    mean, cross = backward_means(dy, y, *unit, **norm._asdict())
    wide = y.astype(scale.dtype)
    dx = per_channel(scale) * (dy.astype(scale.dtype) - per_channel(mean) - wide * per_channel(cross))
    return (dx.astype(y.dtype),)


_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


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
      own_kernels: whether kernels of ours may be used on CPU (`ops/native.py`).

    >>> y = batch_norm(jnp.arange(8.0).reshape(2, 2, 2, 1))
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-4)
    (True, True)
    """
    return batch_norm_moments(x, axis_name, own_kernels=own_kernels)[0]


# --- pooling ----------------------------------------------------------------------------------------------------------

_TAPS = [(p, q) for p in range(3) for q in range(3)]


def _window_size(x: jax.Array, stride: int) -> tuple[int, int]:
    return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _pool_slices(x: jax.Array, stride: int) -> list[jax.Array]:
    """The nine strided slices of the input padded with -inf."""
    b, c = x.shape[0], x.shape[3]
    h, w = _window_size(x, stride)
    low = jnp.asarray(-jnp.inf, x.dtype)
    padded = lax.pad(x, low, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    ends = ((h - 1) * stride + 1, (w - 1) * stride + 1)
    return [lax.slice(padded, (0, p, q, 0), (b, p + ends[0], q + ends[1], c), (1, stride, stride, 1)) for p, q in _TAPS]


def max_pool_reference(x: jax.Array, stride: int) -> jax.Array:
    """`max_pool` by `lax.reduce_window` with plain autodiff."""
    low = np.asarray(-np.inf, x.dtype)
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, low, lax.max, window, strides, ((0, 0), (1, 1), (1, 1), (0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, stride: int) -> jax.Array:
    out = None
    for part in _pool_slices(x, stride):
        out = part if out is None else jnp.maximum(out, part)
    assert out is not None
    return out


def _max_pool_fwd(x: jax.Array, stride: int) -> tuple[jax.Array, jax.Array]:
    return _max_pool(x, stride), x


def _first_maximum(x: jax.Array, stride: int) -> jax.Array:
    """int8 [B,H',W',C]: which of the nine taps of each window holds its first maximal element."""
    best, *others = _pool_slices(x, stride)
    first = jnp.zeros(best.shape, jnp.int8)
    for tap, part in enumerate(others, start=1):
        better = part > best
        best, first = jnp.where(better, part, best), jnp.where(better, jnp.int8(tap), first)
    return first


def _max_pool_bwd(stride: int, x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    """The whole cotangent of a window goes to its first maximal element, as torch does."""
    rules = {1: _max_pool_gradient_1, 2: _max_pool_gradient_2}
    return (rules.get(stride, partial(_max_pool_gradient, stride=stride))(x, dy),)


def _max_pool_gradient_1(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Gathered: input (i, j) is tap (p, q) of the window centred at (i - p + 1, j - q + 1).

    Four times faster than placing nine shares, once the taps are stored (40 ms if they are not: 32x32x16, batch 32,
    two cores).
    """
    b, h, w, c = x.shape
    zero = jnp.zeros((), dy.dtype)
    around = ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0))
    first = lax.pad(materialised(partial(_first_maximum, stride=1), x), jnp.int8(9), around)
    padded = lax.pad(dy, zero, around)
    starts = [(0, 2 - p, 2 - q, 0) for p, q in _TAPS]
    taps, cts = (
        [lax.slice(a, start, (b, start[1] + h, start[2] + w, c)) for start in starts] for a in (first, padded)
    )
    shares = [jnp.where(t == tap, ct, zero) for tap, (t, ct) in enumerate(zip(taps, cts, strict=True))]
    return sum(shares[1:], shares[0])


def _interleaved(even: jax.Array, odd: jax.Array, axis: int) -> jax.Array:
    shape = (*even.shape[:axis], 2 * even.shape[axis], *even.shape[axis + 1 :])
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def _max_pool_gradient_2(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Gathered by parity: an even row is the middle of a window, an odd one the end of one and the start of the next.

    Six times faster than placing nine dilated shares (15 ms -> 2.6 ms with ReLU and BN, 32x32x32, batch 32, two cores).
    """
    _, h, w, _ = x.shape
    ho, wo = dy.shape[1:3]
    zero = jnp.zeros((), dy.dtype)
    after = ((0, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 0))  # a window behind the last one, which gives nothing
    first = lax.pad(materialised(partial(_first_maximum, stride=2), x), jnp.int8(9), after)
    padded = lax.pad(dy, zero, after)

    def share(p: int, q: int) -> jax.Array:
        """What windows give through tap (p, q); the start of a window belongs to the one before."""
        rows, cols = (slice(int(tap == 0), size + int(tap == 0)) for tap, size in ((p, ho), (q, wo)))
        return jnp.where(first[:, rows, cols] == 3 * p + q, padded[:, rows, cols], zero)

    taps = {0: (1,), 1: (0, 2)}  # parity of an input row -> the taps that it can be

    def at(row: int, col: int) -> jax.Array:
        shares = [share(p, q) for p in taps[row] for q in taps[col]]
        return sum(shares[1:], shares[0])

    rows = [_interleaved(at(row, 0), at(row, 1), 2) for row in (0, 1)]
    return _interleaved(rows[0], rows[1], 1)[:, :h, :w]


def _max_pool_gradient(x: jax.Array, dy: jax.Array, stride: int) -> jax.Array:
    """Placed: any stride."""
    _, h, w, _ = x.shape
    ho, wo = dy.shape[1:3]
    zero, first = jnp.zeros((), dy.dtype), _first_maximum(x, stride)
    shares = []
    for tap, (p, q) in enumerate(_TAPS):
        # Output (i, j) reads input (i s + p - 1, j s + q - 1): place it there, cropping what lies in the padding.
        rows = (p - 1, h - (p - 1) - (ho - 1) * stride - 1, stride - 1)
        cols = (q - 1, w - (q - 1) - (wo - 1) * stride - 1, stride - 1)
        shares.append(lax.pad(jnp.where(first == tap, dy, zero), zero, ((0, 0, 0), rows, cols, (0, 0, 0))))
    return sum(shares[1:], shares[0])


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


class Pool(NamedTuple):
    """A 3x3 pool with padding 1, as `max_pool` or `avg_pool`."""

    kind: Literal["average", "maximum"]
    stride: int


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 max pooling, padding 1 with -inf: [B,H,W,C] -> [B,ceil(H/s),ceil(W/s),C].

    >>> float(max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2)[0, 0, 0, 0])
    4.0
    """
    return _max_pool(x, stride)


def _inverse_counts(height: int, width: int, stride: int) -> np.ndarray:
    """1 / (number of real pixels in each 3x3 window), [1,ceil(H/s),ceil(W/s),1]."""

    def count(n: int) -> np.ndarray:
        centre = np.arange(-(-n // stride)) * stride
        return np.minimum(centre + 1, n - 1) - np.maximum(centre - 1, 0) + 1

    counts = count(height)[:, None] * count(width)[None, :]
    return (1.0 / counts)[None, :, :, None]


def avg_pool_by(x: jax.Array, stride: int, depthwise_conv: Callable[..., jax.Array]) -> jax.Array:
    """`avg_pool` by a depthwise convolution with ones."""
    ones = jnp.ones((3, 3, x.shape[3]), x.dtype)
    total = depthwise_conv(x, ones, stride=stride)
    return total * jnp.asarray(_inverse_counts(x.shape[1], x.shape[2], stride), x.dtype)


def avg_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 average pooling, padding 1, the divisor counts real pixels only: [B,H,W,C] -> [B,ceil(H/s),ceil(W/s),C].

    >>> float(avg_pool(jnp.ones((1, 3, 3, 1)), 1)[0, 0, 0, 0])
    1.0
    """
    return avg_pool_by(x, stride, depthwise.depthwise_conv)


# --- strided identity -------------------------------------------------------------------------------------------------


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
