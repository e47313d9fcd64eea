"""The layers of the derived network as plain data: the weights they declare and the function they compute.

An operation is the primitive of the search, with another normalisation: affine, with running statistics. Primitives
and layers name their normalisations when they run (`layers.norm(name, x)`); an abstract run finds the names, so that
weights and statistics are declared before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jax.scipy.linalg import block_diag

from prdarts_jax.ops.batch_norm import BN_EPS, Moments, batch_norm_moments, per_channel
from prdarts_jax.ops.depthwise import depthwise_conv_reference, wide_dtype
from prdarts_jax.ops.layer_set import LayerSet, Norm, composed_pointwise, composed_separable
from prdarts_jax.ops.layers import Weight, conv, factorized_reduce, linear, pointwise
from prdarts_jax.ops.primitives import Params, Primitive

if TYPE_CHECKING:
    from jaxtyping import Float

BN_MOMENTUM = 0.1  # torch's: the weight of the new statistic
AUX_POOL = 5  # pixels of the auxiliary head's average
AUX_STRIDES: Mapping[str, int] = {"cifar": 3, "imagenet": 2}
_PROBE = 8  # pixels; every layer accepts them
_NORM = (("params", "scale", 1.0), ("params", "bias", 0.0), ("batch_stats", "mean", 0.0), ("batch_stats", "var", 1.0))
TreePath = tuple[str, ...]  # in the parameters: ("stem",), ("cell_3", "preprocess0")
Variables = dict[TreePath, Weight]  # ("params" | "batch_stats", *path in the tree of the collection) -> declaration


@dataclass(frozen=True, eq=False)
class Layer:
    """A part of the network with weights of its own. Equal parts are the same object: constructors are cached.

    Attributes:
      channels_in: of its input [B,H,W,channels_in].
      weights: what it declares besides normalisations.
      apply: (params, x, layers) -> y.
    """

    channels_in: int
    weights: Mapping[str, Weight]
    apply: Callable[[Params, jax.Array, LayerSet], jax.Array]

    @cached_property
    def variables(self) -> Variables:
        """All that it declares; an entry (collection, norm, leaf) is one of the four vectors of a normalisation."""
        declared: Variables = traverse_util.flatten_dict({"params": dict(self.weights)})

        def norm(name: str, x: jax.Array) -> jax.Array:
            for collection, leaf, value in _NORM:
                declared[collection, name, leaf] = Weight((x.shape[3],), constant=value)
            return x

        x = jax.ShapeDtypeStruct((1, _PROBE, _PROBE, self.channels_in), jnp.float32)
        jax.eval_shape(lambda x: self.outline(x, norm), x)
        return declared

    @partial(jax.jit, static_argnums=(0, 2))  # equal layers are traced once
    def outline(self, x: jax.Array, norm: Norm = lambda _, x: x) -> jax.Array:
        """A run for its trace alone: every convolution is one equation of it, pools and norms only have a shape."""

        def pool(x: jax.Array, stride: int) -> jax.Array:
            return x[:, ::stride, ::stride]

        units = composed_separable(depthwise_conv_reference, norm), composed_pointwise(norm)
        layers = LayerSet(depthwise_conv_reference, pool, pool, norm, *units)
        return self.apply(constants(self.weights), x, layers)


def variables_of(layers: Mapping[TreePath, Layer]) -> Variables:
    """What several layers declare, each under its path."""
    return {
        (collection, *path, *rest): weight
        for path, layer in layers.items()
        for (collection, *rest), weight in layer.variables.items()
    }


def constants(declared: Any) -> Any:
    """A tree of declarations as float32 arrays, each with its constant everywhere."""
    return jax.tree.map(
        lambda w: jnp.full(w.shape, w.constant, jnp.float32), declared, is_leaf=lambda node: isinstance(node, Weight)
    )


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(wide_dtype(x))


# --- the layers -------------------------------------------------------------------------------------------------------


@cache
def operation(primitive: Primitive, channels: int, stride: int) -> Layer:
    """An operation of a cell: a primitive of the search space at a width and stride."""
    weights = primitive.weights(channels, stride)
    return Layer(channels, weights, lambda params, x, layers: primitive.apply(params, x, stride, layers))


@cache
def preprocess(channels_in: int, channels: int, reduces: bool) -> Layer:
    """What a cell does to an input: ReLU, 1x1 convolution (FactorizedReduce after a reduction), BN."""
    widths = {"first": channels // 2, "second": channels - channels // 2} if reduces else {"pointwise": channels}

    def apply(params: Params, x: jax.Array, layers: LayerSet) -> jax.Array:
        if reduces:
            return layers.norm("bn", factorized_reduce(jax.nn.relu(x), params["first"], params["second"]))
        return layers.pointwise("bn", x, params["pointwise"])

    return Layer(channels_in, {name: Weight((channels_in, c), channels_in) for name, c in widths.items()}, apply)


def widened(x: Float[jax.Array, "B H W C"], width: int, halves: bool) -> Float[jax.Array, "B _ _ {width}"]:
    """The input of a preprocessing for its form as one 1x1 convolution of `width` inputs (`dense_preprocess`).

    A FactorizedReduce (`halves`) is a 1x1 convolution of the even pixels and the odd pixels side by side.
    """
    if halves:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = jnp.concatenate([x[:, ::2, ::2], x[:, 1::2, 1::2]], axis=3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))


def dense_preprocess(params: Params, width: int) -> Params:
    """The weights of any preprocessing as those of a 1x1 convolution of `width` inputs: padded, or block-diagonal."""
    kernel = params["pointwise"] if "pointwise" in params else block_diag(params["first"], params["second"])
    return {"pointwise": jnp.pad(kernel, ((0, width - kernel.shape[0]), (0, 0))), "bn": params["bn"]}


@cache
def stem_layer(channels: tuple[int, ...], stride: int, *, relu_first: bool = False) -> Layer:
    """3x3 convolutions of a stride, each with BN, and a ReLU before all but the first (`relu_first`: before all).

    Args:
      channels: of the input and after every convolution. Of several convolutions the names have numbers: conv1, bn1.
    """
    numbers = [""] if len(channels) == 2 else [str(n) for n in range(1, len(channels))]

    def apply(params: Params, x: jax.Array, layers: LayerSet) -> jax.Array:
        for n in numbers:
            x = jax.nn.relu(x) if relu_first or n != numbers[0] else x
            x = layers.norm(f"bn{n}", conv(x, params[f"conv{n}"], stride=stride))
        return x

    widths = zip(numbers, pairwise(channels), strict=True)
    return Layer(channels[0], {f"conv{n}": _dense(3, *ends) for n, ends in widths}, apply)


def _dense(kernel: int, channels_in: int, channels: int) -> Weight:
    return Weight((kernel, kernel, channels_in, channels), kernel * kernel * channels_in)


@cache
def auxiliary_head(channels_in: int, classes: int, stem: str, second_norm: bool = True) -> Layer:
    """ReLU, 5x5 average pool, 1x1 to 128, BN, ReLU, 2x2 (valid) to 768, BN (`second_norm`), ReLU, linear."""
    first, second = 128, 768
    weights = {
        "pointwise": Weight((channels_in, first), channels_in),
        "conv": _dense(2, first, second),
        **_linear_weights(second, classes),
    }
    window, strides = (1, AUX_POOL, AUX_POOL, 1), (1, AUX_STRIDES[stem], AUX_STRIDES[stem], 1)

    def apply(params: Params, x: jax.Array, layers: LayerSet) -> jax.Array:
        zero = np.zeros((), x.dtype)  # concrete: JAX then knows the window sum, which has a gradient
        x = lax.reduce_window(jax.nn.relu(x), zero, lax.add, window, strides, "VALID") / (AUX_POOL * AUX_POOL)
        x = jax.nn.relu(layers.norm("bn1", pointwise(x, params["pointwise"])))
        x = conv(x, params["conv"])
        x = jax.nn.relu(layers.norm("bn2", x) if second_norm else x)
        return _linear(params, x.reshape(x.shape[0], -1))

    return Layer(channels_in, weights, apply)


@cache
def classifier(channels_in: int, classes: int) -> Layer:
    """Global average pool, linear."""
    weights = _linear_weights(channels_in, classes)
    return Layer(channels_in, weights, lambda params, x, _: _linear(params, jnp.mean(_wide(x), axis=(1, 2))))


def _linear_weights(features: int, classes: int) -> dict[str, Weight]:
    return {"kernel": Weight((features, classes), features), "bias": Weight((classes,), features)}


def _linear(params: Params, x: jax.Array) -> jax.Array:
    x = _wide(x)
    return linear(x, params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype))


# --- batch normalisation ----------------------------------------------------------------------------------------------


def batch_norm(
    x: Float[jax.Array, "B H W C"],
    affine: Params,
    running: Params,
    *,
    train: bool,
    axis_name: str | None = None,
    own_kernels: bool = True,
) -> tuple[Float[jax.Array, "B H W C"], Params]:
    """Affine batch normalisation with running statistics, torch's convention.

        train:  y = scale (x - m) / sqrt(v + 1e-5) + bias        m, v: mean and biased variance of the batch
                mean <- 0.9 mean + 0.1 m,   var <- 0.9 var + 0.1 v n/(n-1)           n = B H W over all devices
        else:   y = scale (x - mean) / sqrt(var + 1e-5) + bias

    Args:
      x: [B,H,W,C]; statistics in at least float32.
      affine: {"scale": [C], "bias": [C]}.
      running: {"mean": [C], "var": [C]}.
      train: whether the statistics are those of the batch.
      axis_name: mapped axis over which the batch is split, or None.
      own_kernels: whether the CPU kernels may be used.

    Returns:
      (y in the dtype of x, the running statistics afterwards). No gradient flows through the statistics kept.

    >>> unit = {"scale": jnp.ones(1), "bias": jnp.zeros(1)}, {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    >>> x = jnp.asarray([0.0, 2.0]).reshape(2, 1, 1, 1)
    >>> print(batch_norm(x, *unit, train=True)[1]["var"])  # 0.9 * 1 + 0.1 * 2
    [1.1]
    """
    if train:
        y, moments = batch_norm_moments(x, axis_name, own_kernels=own_kernels)
        after = running_statistics(y.shape[0] * y.shape[1] * y.shape[2], moments, running, axis_name=axis_name)
        return _affine(_wide(y), affine).astype(y.dtype), after
    wide = _wide(x)
    inverse = lax.rsqrt(running["var"].astype(wide.dtype) + BN_EPS)
    y = (wide - per_channel(running["mean"].astype(wide.dtype))) * per_channel(inverse)
    return _affine(y, affine).astype(x.dtype), running


def _affine(y: jax.Array, affine: Params) -> jax.Array:
    scale, bias = (per_channel(affine[name].astype(y.dtype)) for name in ("scale", "bias"))
    return y * scale + bias


def running_statistics(count: int, moments: Moments, running: Params, *, axis_name: str | None) -> Params:
    """The running statistics after a batch of `count` = B H W a device with this (mean, biased variance)."""
    n = count if axis_name is None else count * lax.psum(1, axis_name)
    batch = {"mean": moments[0], "var": moments[1] * (n / max(n - 1, 1))}
    return jax.tree.map(
        lambda old, new: (1 - BN_MOMENTUM) * old + BN_MOMENTUM * lax.stop_gradient(new).astype(old.dtype),
        running,
        batch,
    )
