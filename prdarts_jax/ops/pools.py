"""Pooling layers with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops import depthwise
from prdarts_jax.ops.lowering import materialised

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

    XLA:CPU gathers faster than it places nine shares, if the taps are stored first (docs/performance_notes.md).
    """
    b, h, w, c = x.shape
    zero = jnp.zeros((), dy.dtype)
    around = ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0))
    first = lax.pad(materialised(partial(_first_maximum, stride=1), x), jnp.int8(9), around)
    padded = lax.pad(dy, zero, around)
    starts = [(0, 2 - p, 2 - q, 0) for p, q in _TAPS]
    taps, cts = ([lax.slice(a, start, (b, start[1] + h, start[2] + w, c)) for start in starts] for a in (first, padded))
    shares = [jnp.where(t == tap, ct, zero) for tap, (t, ct) in enumerate(zip(taps, cts, strict=True))]
    return sum(shares[1:], shares[0])


def _interleaved(even: jax.Array, odd: jax.Array, axis: int) -> jax.Array:
    shape = (*even.shape[:axis], 2 * even.shape[axis], *even.shape[axis + 1 :])
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def _max_pool_gradient_2(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Gathered by parity: an even row is the middle of a window, an odd one the end of one and the start of the next.

    XLA:CPU gathers faster than it places nine dilated shares (docs/performance_notes.md).
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


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """2x2 max pooling of stride 2: [B,H,W,C] -> [B,ceil(H/2),ceil(W/2),C]; an odd side ends in half a window.

    The whole cotangent of a window goes to its first maximal element, as torch does. Any order and mode of derivative.

    >>> max_pool_2x2(jnp.arange(9.0).reshape(1, 3, 3, 1)).ravel().tolist()
    [4.0, 5.0, 7.0, 8.0]
    """
    _, h, w, _ = x.shape
    low = jnp.asarray(-jnp.inf, x.dtype)
    x = lax.pad(x, low, ((0, 0, 0), (0, h % 2, 0), (0, w % 2, 0), (0, 0, 0)))
    best, *others = (x[:, p::2, q::2] for p in (0, 1) for q in (0, 1))
    for part in others:
        best = jnp.where((part > best) | jnp.isnan(part), part, best)
    return best


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
