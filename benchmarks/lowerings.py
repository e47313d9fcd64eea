"""The lowerings of the depthwise convolution by name, and a way to run any program with a given one.

The library chooses one a platform (`ops/depthwise.py`). Here the choice is replaced, so that each can be measured on
each device. A new lowering of the library is a row of LOWERINGS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from prdarts_jax.ops import depthwise, kernels
from prdarts_jax.ops.depthwise import Window, wide_dtype

LIBRARY = "library"  # what the library chooses for the platform


class Lowering(NamedTuple):
    """The three maps of a depthwise convolution."""

    forward: Callable[..., jax.Array]  # (x, kernel, *, window) -> y
    input_gradient: Callable[..., jax.Array]  # (dy, kernel, *, window, size) -> dx
    kernel_gradient: Callable[..., jax.Array]  # (x, dy, *, window) -> dw


def _diagonal(x: jax.Array, kernel: jax.Array, *, window: Window) -> jax.Array:
    """A dense convolution with a diagonal kernel: C times the multiplications, but on tensor cores."""
    eye = jnp.eye(x.shape[3], dtype=x.dtype)
    ph, pw = window.padding
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype)[:, :, :, None] * eye[None, None],
        (window.stride, window.stride),
        ((ph, ph), (pw, pw)),
        rhs_dilation=(window.dilation, window.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _diagonal_input(dy: jax.Array, kernel: jax.Array, *, window: Window, size: tuple[int, int]) -> jax.Array:
    x = jnp.zeros((dy.shape[0], *size, dy.shape[3]), dy.dtype)
    return jax.vjp(lambda x: _diagonal(x, kernel, window=window), x)[1](dy)[0]


def _diagonal_kernel(x: jax.Array, dy: jax.Array, *, window: Window) -> jax.Array:
    kernel = jnp.zeros((window.height, window.width, x.shape[3]), wide_dtype(x))
    return jax.vjp(lambda k: _diagonal(x, k, window=window), kernel)[1](dy)[0]


LOWERINGS = {
    "shifts": Lowering(depthwise._forward_shifts, depthwise._input_gradient, depthwise._kernel_gradient),
    "grouped": Lowering(
        depthwise._forward_grouped, depthwise._grouped_input_gradient, depthwise._grouped_kernel_gradient
    ),
    "diagonal": Lowering(_diagonal, _diagonal_input, _diagonal_kernel),
}


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Programs traced inside take this lowering for every depthwise convolution; `LIBRARY` changes nothing."""
    if name == LIBRARY:
        yield
        return
    chosen = LOWERINGS[name]

    def forward(x: Any, kernel: Any, window: Window) -> jax.Array:
        return chosen.forward(x, kernel, window=window)

    def backward_input(dy: Any, kernel: Any, window: Window, size: tuple[int, int]) -> jax.Array:
        return chosen.input_gradient(dy, kernel, window=window, size=size)

    def backward_kernel(x: Any, dy: Any, window: Window) -> jax.Array:
        return chosen.kernel_gradient(x, dy, window=window)

    replaced = {
        "_forward": partial(jax.jit, static_argnums=(2,))(forward),
        "_backward_input": partial(jax.jit, static_argnums=(2, 3))(backward_input),
        "_backward_kernel": partial(jax.jit, static_argnums=(2,))(backward_kernel),
    }
    kept = {attribute: getattr(depthwise, attribute) for attribute in replaced}
    available = kernels.kernels
    jax.clear_caches()  # traces of the other choice
    kernels.kernels = lambda: kernels.Kernels(False, name)  # type: ignore[assignment]
    for attribute, function in replaced.items():
        setattr(depthwise, attribute, function)
    try:
        yield
    finally:
        kernels.kernels = available
        for attribute, function in kept.items():
            setattr(depthwise, attribute, function)
        jax.clear_caches()
