"""The candidate operations of an edge, as a table of (weights, apply) that a user can extend.

Every primitive maps [B,H,W,C] to [B,ceil(H/s),ceil(W/s),C]. The same table serves the search (BN without affine) and
the derived network (BN with affine and running statistics): normalisation comes in through `layers.norm`. Weights are
declared, not drawn: a network draws all of them at once, since compiling hundreds of small draws takes half a minute.

A user's own primitive: a file with `PRIMITIVES = {"name": Primitive(...)}`, given as `--space.primitives FILE.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prdarts_jax.ops.layer_set import LayerSet
from prdarts_jax.ops.layers import Reduction, Weight, conv, factorized_reduce
from prdarts_jax.ops.pools import Pool
from prdarts_jax.ops.separable import Unit

Params = dict[str, Any]
GROUPS = ("none", "skip", "pool", "conv")


class Primitive(NamedTuple):
    """One candidate operation.

    Attributes:
      group: "none" | "skip" | "pool" | "conv"; penalties and reports speak of groups. Another name is a group of its
        own, which counts as not skip. "none" is never computed nor derived; "pool" is normalised in the search.
      weights: (channels, stride) -> {name: Weight}; empty: an operation without weights.
      apply: (params, x [B,H,W,C], stride, layers) -> y [B,ceil(H/s),ceil(W/s),C].
      units: (params, stride) -> the units of which `apply` is a row, none for the identity; or the pool or the strided
        identity that it is; or None where it is none of these. With it the search runs the operation in one kernel on a
        CPU, and many of its kind at once on other devices. Also called with weights that are stacked on a leading axis.
    """

    group: str
    weights: Callable[[int, int], dict[str, Weight]]
    apply: Callable[[Params, jax.Array, int, LayerSet], jax.Array]
    units: Callable[[Params, int], Sequence[Unit] | Pool | Reduction | None] | None = None


def _no_weights(channels: int, stride: int) -> dict[str, Weight]:
    return {}


def _none(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
    b, h, w, c = x.shape
    return jnp.zeros((b, -(-h // stride), -(-w // stride), c), x.dtype)


def _max_pool(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
    return layers.max_pool(x, stride)


def _avg_pool(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
    return layers.avg_pool(x, stride)


def _skip_weights(channels: int, stride: int) -> dict[str, Weight]:
    if stride == 1:
        return {}
    half = channels // 2
    return {"first": Weight((channels, half), channels), "second": Weight((channels, channels - half), channels)}


def _skip(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
    if stride == 1:
        return x
    return layers.norm("bn", factorized_reduce(jax.nn.relu(x), params["first"], params["second"]))


def _skip_units(params: Params, stride: int) -> Sequence[Unit] | Reduction:
    return () if stride == 1 else Reduction(params["first"], params["second"])


def _separable(kernel: int) -> Primitive:
    """(ReLU, depthwise k x k, pointwise, BN) twice; the stride on the first."""

    def weights(channels: int, stride: int) -> dict[str, Weight]:
        depthwise = Weight((kernel, kernel, channels), kernel * kernel)
        pointwise = Weight((channels, channels), channels)
        return {"depthwise1": depthwise, "pointwise1": pointwise, "depthwise2": depthwise, "pointwise2": pointwise}

    def units(params: Params, stride: int) -> Sequence[Unit]:
        first = Unit(params["depthwise1"], params["pointwise1"], stride)
        return first, Unit(params["depthwise2"], params["pointwise2"])

    def apply(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
        return layers.separable(("bn1", "bn2"), x, units(params, stride))

    return Primitive("conv", weights, apply, units)


def _dilated(kernel: int) -> Primitive:
    """ReLU, depthwise k x k of dilation 2 (stride s), pointwise, BN."""

    def weights(channels: int, stride: int) -> dict[str, Weight]:
        depthwise = Weight((kernel, kernel, channels), kernel * kernel)
        return {"depthwise": depthwise, "pointwise": Weight((channels, channels), channels)}

    def units(params: Params, stride: int) -> Sequence[Unit]:
        return (Unit(params["depthwise"], params["pointwise"], stride, 2),)

    def apply(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
        return layers.separable(("bn",), x, units(params, stride))

    return Primitive("conv", weights, apply, units)


def _factorised_7_weights(channels: int, stride: int) -> dict[str, Weight]:
    return {
        "conv_1x7": Weight((1, 7, channels, channels), 7 * channels),
        "conv_7x1": Weight((7, 1, channels, channels), 7 * channels),
    }


def _factorised_7(params: Params, x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
    """ReLU, 1x7 convolution of stride (1,s), 7x1 convolution of stride (s,1), BN."""
    x = conv(jax.nn.relu(x), params["conv_1x7"], stride=(1, stride))
    return layers.norm("bn", conv(x, params["conv_7x1"], stride=(stride, 1)))


PRIMITIVES: Mapping[str, Primitive] = MappingProxyType(
    {
        "none": Primitive("none", _no_weights, _none),
        "max_pool_3x3": Primitive("pool", _no_weights, _max_pool, lambda params, stride: Pool("maximum", stride)),
        "avg_pool_3x3": Primitive("pool", _no_weights, _avg_pool, lambda params, stride: Pool("average", stride)),
        "skip_connect": Primitive("skip", _skip_weights, _skip, _skip_units),
        "sep_conv_3x3": _separable(3),
        "sep_conv_5x5": _separable(5),
        "dil_conv_3x3": _dilated(3),
        "dil_conv_5x5": _dilated(5),
        "sep_conv_7x7": _separable(7),
        "conv_7x1_1x7": Primitive("conv", _factorised_7_weights, _factorised_7),
    }
)
