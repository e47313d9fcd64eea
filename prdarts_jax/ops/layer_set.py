"""Leaf layers in two sets of the same functions: fast, with differentiation rules of their own, and reference, without.

The reference set is plain JAX (any order of derivative, forward mode too); it is the oracle of every custom rule. A
primitive of the search space receives one of the sets as an argument and never chooses for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax

from prdarts_jax.ops.batch_norm import batch_norm, batch_norm_reference
from prdarts_jax.ops.depthwise import depthwise_conv, depthwise_conv_reference
from prdarts_jax.ops.layers import pointwise
from prdarts_jax.ops.pools import avg_pool_by, max_pool, max_pool_reference
from prdarts_jax.ops.separable import Unit, pointwise_unit, separable_units

Norm = Callable[[str, jax.Array], jax.Array]


class LayerSet(NamedTuple):
    """The leaf layers a primitive may use. `norm(name, x)` is the normalisation after a layer called `name`."""

    depthwise: Callable[..., jax.Array]  # (x, kernel, *, stride, dilation) -> y
    max_pool: Callable[[jax.Array, int], jax.Array]  # (x, stride) -> y
    avg_pool: Callable[[jax.Array, int], jax.Array]
    norm: Norm
    # (names, x, units): for each name and unit in turn x = norm(name, pointwise (depthwise * relu(x)))
    separable: Callable[[Sequence[str], jax.Array, Sequence[Unit]], jax.Array]
    pointwise: Callable[[str, jax.Array, jax.Array], jax.Array]  # (name, x, matrix) -> norm(name, matrix relu(x))


def composed_separable(depthwise: Callable[..., jax.Array], norm: Norm) -> Callable[..., jax.Array]:
    """`LayerSet.separable` from a depthwise convolution and a normalisation."""

    def separable(names: Sequence[str], x: jax.Array, units: Sequence[Unit]) -> jax.Array:
        for name, unit in zip(names, units, strict=True):
            convolved = depthwise(jax.nn.relu(x), unit.depthwise, stride=unit.stride, dilation=unit.dilation)
            x = norm(name, pointwise(convolved, unit.matrix))
        return x

    return separable


def composed_pointwise(norm: Norm) -> Callable[..., jax.Array]:
    """`LayerSet.pointwise` from a normalisation."""
    return lambda name, x, matrix: norm(name, pointwise(jax.nn.relu(x), matrix))


def fast_layers(axis_name: str | None = None, *, own_kernels: bool = True) -> LayerSet:
    """LayerSet with rules of their own; BN with the statistics of the batch over `axis_name`.

    `own_kernels`: whether the CPU kernels may be used (a program that leaves this process cannot have them).
    """
    depthwise = partial(depthwise_conv, own_kernels=own_kernels)

    return LayerSet(
        depthwise,
        max_pool,
        lambda x, stride: avg_pool_by(x, stride, depthwise),
        lambda _, x: batch_norm(x, axis_name, own_kernels=own_kernels),
        lambda _, x, units: separable_units(x, units, axis_name=axis_name, own_kernels=own_kernels)[0],
        lambda _, x, matrix: pointwise_unit(x, matrix, axis_name=axis_name, own_kernels=own_kernels)[0],
    )


def reference_layers(axis_name: str | None = None) -> LayerSet:
    """LayerSet with plain autodiff: slower, and usable under jvp and jax.hessian."""

    def norm(name: str, x: jax.Array) -> jax.Array:
        return batch_norm_reference(x, axis_name)

    return LayerSet(
        depthwise_conv_reference,
        max_pool_reference,
        lambda x, stride: avg_pool_by(x, stride, depthwise_conv_reference),
        norm,
        composed_separable(depthwise_conv_reference, norm),
        composed_pointwise(norm),
    )
