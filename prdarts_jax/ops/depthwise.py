"""Depthwise convolution with a lowering chosen per platform and differentiation rules of its own.

XLA lowers a grouped convolution on CPU to a naive loop (jax-ml/jax issue 23713), several times slower than a sum of
shifted slices, and plain autodiff of the shifted sum yields k*k separate reductions for the weight gradient. Hence
the CPU kernels (`kernels`), and where they cannot serve:

    y[b,i,j,c]  = sum_{p,q} x[b, s*i + d*p - P, s*j + d*q - P, c] * w[p,q,c]
    dx          = the same sum over the cotangent, dilated by s, with the flipped kernel
    dw[p,q,c]   = sum_{b,i,j} x[b, s*i + d*p - P, s*j + d*q - P, c] * dy[b,i,j,c]     (one variadic reduction)

The three maps are bilinear and closed under differentiation: the rule of each one is written with the other two, so
any order of reverse-mode derivative works. Forward mode goes through `depthwise_conv_reference`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from prdarts_jax.ops import kernels
from prdarts_jax.ops.lowering import materialised


class Window(NamedTuple):
    """Static geometry: kernel height and width, stride, dilation; padding keeps the size at stride 1."""

    height: int
    width: int
    stride: int = 1
    dilation: int = 1
    own_kernels: bool = True  # whether the CPU kernels may compute it

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels added on each side of H and of W."""
        return self.dilation * (self.height - 1) // 2, self.dilation * (self.width - 1) // 2

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Output height and width of an input of this size."""
        return -(-height // self.stride), -(-width // self.stride)


def wide_dtype(*arrays: jax.Array) -> jnp.dtype:
    """The dtype to accumulate in: float32, or float64 where an array has it (parity tests).

    >>> wide_dtype(jnp.zeros(2, jnp.bfloat16)).name
    'float32'
    """
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)


def _taps(window: Window) -> list[tuple[int, int]]:
    return [(p, q) for p in range(window.height) for q in range(window.width)]


def _shift(padded: jax.Array, window: Window, tap: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """The strided slice of the padded input that meets kernel tap (p, q)."""
    b, _, _, c = padded.shape
    (p, q), (h, w), s, d = tap, size, window.stride, window.dilation
    limits = (b, p * d + (h - 1) * s + 1, q * d + (w - 1) * s + 1, c)
    return lax.slice(padded, (0, p * d, q * d, 0), limits, (1, s, s, 1))


def _pad(x: jax.Array, window: Window) -> jax.Array:
    ph, pw = window.padding
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (ph, ph, 0), (pw, pw, 0), (0, 0, 0)))


def _forward_shifts(x: jax.Array, kernel: jax.Array, *, window: Window) -> jax.Array:
    padded, size, wide = _pad(x, window), window.output(*x.shape[1:3]), wide_dtype(x)
    total = None
    for p, q in _taps(window):
        weight = lax.broadcast_in_dim(kernel[p, q], (x.shape[0], *size, x.shape[3]), (3,))
        term = _shift(padded, window, (p, q), size).astype(wide) * weight.astype(wide)
        total = term if total is None else total + term
    assert total is not None
    return total.astype(x.dtype)


def _forward_grouped(x: jax.Array, kernel: jax.Array, *, window: Window) -> jax.Array:
    ph, pw = window.padding
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype)[:, :, None, :],
        (window.stride, window.stride),
        ((ph, ph), (pw, pw)),
        rhs_dilation=(window.dilation, window.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


def _input_gradient(dy: jax.Array, kernel: jax.Array, *, window: Window, size: tuple[int, int]) -> jax.Array:
    """dx for an input of `size`: the cotangent, dilated by the stride, meets the flipped kernel."""
    s, (ph, pw), (h, w) = window.stride, window.padding, size
    ho, wo = dy.shape[1:3]
    eh, ew = window.dilation * (window.height - 1), window.dilation * (window.width - 1)
    low_h, low_w = eh - ph, ew - pw
    high_h = h + ph - (ho - 1) * s - 1
    high_w = w + pw - (wo - 1) * s - 1
    config = ((0, 0, 0), (low_h, high_h, s - 1), (low_w, high_w, s - 1), (0, 0, 0))
    padded = lax.pad(dy, jnp.zeros((), dy.dtype), config)
    flat, wide = Window(window.height, window.width, 1, window.dilation), wide_dtype(dy)
    total = None
    for p, q in _taps(window):
        flipped = kernel[window.height - 1 - p, window.width - 1 - q]
        weight = lax.broadcast_in_dim(flipped, (dy.shape[0], h, w, dy.shape[3]), (3,))
        term = _shift(padded, flat, (p, q), size).astype(wide) * weight.astype(wide)
        total = term if total is None else total + term
    assert total is not None
    return total.astype(dy.dtype)


def _kernel_gradient(x: jax.Array, dy: jax.Array, *, window: Window) -> jax.Array:
    """dw[p,q,c] in the wide dtype. One variadic reduction that keeps the batch axis; the batch is summed afterwards."""
    size, wide = window.output(*x.shape[1:3]), wide_dtype(x)
    # Each tap reads the padded input: what made it (the padding, a ReLU, a BN) would be computed again for each.
    padded, dy = materialised(partial(_pad, window=window), x), dy.astype(wide)
    products = tuple(_shift(padded, window, tap, size).astype(wide) * dy for tap in _taps(window))
    zero = jnp.zeros((), wide)
    sums = lax.reduce(
        products,
        (zero,) * len(products),
        lambda a, b: tuple(map(jnp.add, a, b)),
        (1, 2),
    )
    # Stacked before the batch is summed: a sum a tap would be k*k kernels to compile and to start.
    stacked = jnp.sum(jnp.stack(sums), axis=1)
    return stacked.reshape(window.height, window.width, x.shape[3])


def _grouped_input_gradient(dy: jax.Array, kernel: jax.Array, *, window: Window, size: tuple[int, int]) -> jax.Array:
    x = jnp.zeros((dy.shape[0], *size, dy.shape[3]), dy.dtype)
    _, pull = jax.vjp(lambda x: _forward_grouped(x, kernel, window=window), x)
    return pull(dy)[0]


def _grouped_kernel_gradient(x: jax.Array, dy: jax.Array, *, window: Window) -> jax.Array:
    kernel = jnp.zeros((window.height, window.width, x.shape[3]), wide_dtype(x))
    _, pull = jax.vjp(lambda k: _forward_grouped(x, k, window=window), kernel)
    return pull(dy)[0]


def _native_forward(x: jax.Array, kernel: jax.Array, *, window: Window) -> jax.Array:
    shape = (x.shape[0], *window.output(*x.shape[1:3]), x.shape[3])
    return kernels.call("depthwise_forward", [shape], x, kernel, stride=window.stride, dilation=window.dilation)[0]


def _native_input_gradient(dy: jax.Array, kernel: jax.Array, *, window: Window, size: tuple[int, int]) -> jax.Array:
    shape = (dy.shape[0], *size, dy.shape[3])
    name = "depthwise_input_gradient"
    return kernels.call(name, [shape], dy, kernel, stride=window.stride, dilation=window.dilation)[0]


def _native_kernel_gradient(x: jax.Array, dy: jax.Array, *, window: Window) -> jax.Array:
    shape = (window.height, window.width, x.shape[3])
    return kernels.call("depthwise_kernel_gradient", [shape], x, dy, stride=window.stride, dilation=window.dilation)[0]


def _serves(window: Window, *arrays: jax.Array) -> bool:
    return window.own_kernels and kernels.compiled(*window[:4]) and kernels.serve(*arrays)


# Each leaf is jitted so that its trace is cached by shape: a search program holds hundreds of calls of few shapes.
@partial(jax.jit, static_argnums=(2,))
def _forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    cpu = _native_forward if _serves(window, x, kernel) else _forward_shifts
    return lax.platform_dependent(
        x, kernel, cpu=partial(cpu, window=window), default=partial(_forward_grouped, window=window)
    )


@partial(jax.jit, static_argnums=(2, 3))
def _backward_input(dy: jax.Array, kernel: jax.Array, window: Window, size: tuple[int, int]) -> jax.Array:
    cpu = _native_input_gradient if _serves(window, dy, kernel) else _input_gradient
    return lax.platform_dependent(
        dy,
        kernel,
        cpu=partial(cpu, window=window, size=size),
        default=partial(_grouped_input_gradient, window=window, size=size),
    )


@partial(jax.jit, static_argnums=(2,))
def _backward_kernel(x: jax.Array, dy: jax.Array, window: Window) -> jax.Array:
    cpu = _native_kernel_gradient if _serves(window, x, dy) else _kernel_gradient
    return lax.platform_dependent(
        x, dy, cpu=partial(cpu, window=window), default=partial(_grouped_kernel_gradient, window=window)
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    return _forward(x, kernel, window)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_transpose(dy: jax.Array, kernel: jax.Array, window: Window, size: tuple[int, int]) -> jax.Array:
    return _backward_input(dy, kernel, window, size)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(x: jax.Array, dy: jax.Array, window: Window) -> jax.Array:
    return _backward_kernel(x, dy, window)


def _size(x: jax.Array) -> tuple[int, int]:
    return x.shape[1], x.shape[2]


_conv.defvjp(
    lambda x, kernel, window: (_conv(x, kernel, window), (x, kernel)),
    lambda window, res, dy: (
        _conv_transpose(dy, res[1], window, _size(res[0])),
        _correlate(res[0], dy, window).astype(res[1].dtype),
    ),
)
_conv_transpose.defvjp(
    lambda dy, kernel, window, size: (_conv_transpose(dy, kernel, window, size), (dy, kernel)),
    lambda window, size, res, dx: (
        _conv(dx, res[1], window),
        _correlate(dx, res[0], window).astype(res[1].dtype),
    ),
)
_correlate.defvjp(
    lambda x, dy, window: (_correlate(x, dy, window), (x, dy)),
    lambda window, res, dw: (
        _conv_transpose(res[1], dw, window, _size(res[0])).astype(res[0].dtype),
        _conv(res[0], dw, window).astype(res[1].dtype),
    ),
)


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, own_kernels: bool = True
) -> jax.Array:
    """Depthwise convolution y[b,i,j,c] = sum_{p,q} x[b, s i + d p - P, s j + d q - P, c] w[p,q,c].

    Zero padding P = dilation (k - 1) / 2 keeps the size at stride 1; ceil(H / s) at stride s.

    Args:
      x: [B,H,W,C], any float dtype; accumulation in float32 at least.
      kernel: [k_h,k_w,C], odd sizes.
      stride: of both spatial axes.
      dilation: spacing of the kernel taps.
      own_kernels: whether the CPU kernels may be used (`ops/kernels.py`); the values are the same to rounding.

    Returns:
      [B, ceil(H/stride), ceil(W/stride), C] in the dtype of x. Reverse-mode derivatives of any order.

    >>> import jax.numpy as jnp
    >>> y = depthwise_conv(jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2)))
    >>> float(y[0, 1, 1, 0]), float(y[0, 0, 0, 0])
    (9.0, 4.0)
    """
    if kernel.ndim != 3 or x.ndim != 4 or kernel.shape[2] != x.shape[3]:
        raise ValueError(f"kernel {kernel.shape} does not fit the images {x.shape}: want [k,k,C] and [B,H,W,C]")
    return _conv(x, kernel, Window(kernel.shape[0], kernel.shape[1], stride, dilation, own_kernels))


def depthwise_conv_reference(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """The same map by XLA's grouped convolution with plain autodiff: the oracle of `depthwise_conv`."""
    return _forward_grouped(x, kernel, window=Window(kernel.shape[0], kernel.shape[1], stride, dilation))
