"""The layers of the derived network as plain data: the weights they declare and the function they compute.

An operation is the primitive of the search, with another normalisation: affine, with running statistics. Primitives
and layers name their normalisations when they run (`leaves.norm(name, x)`); an abstract run finds the names, so that
weights and statistics are declared before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.ops.batch_norm import BN_EPS, Moments, batch_norm_moments, per_channel
from prdarts_jax.ops.depthwise import depthwise_conv_reference, wide_dtype
from prdarts_jax.ops.layer_set import Leaves, composed_pointwise, composed_separable
from prdarts_jax.ops.layers import Weight, conv, factorized_reduce, linear, pointwise
from prdarts_jax.ops.primitives import Params, Primitive

BN_MOMENTUM = 0.1  # torch's: the weight of the new statistic
_AUX_POOL = 5
_AUX_CHANNELS = (128, 768)
AUX_STRIDES: Mapping[str, int] = {"cifar": 3, "imagenet": 2}
_PROBE = 8  # pixels; every layer accepts them


@dataclass(frozen=True, eq=False)
class Layer:
    """A part of the network with weights of its own. Equal parts are the same object: constructors are cached.

    Attributes:
      channels_in: of its input [B,H,W,channels_in].
      weights: what it declares besides normalisations.
      apply: (params, x, leaves) -> y.
    """

    channels_in: int
    weights: Mapping[str, Weight]
    apply: Callable[[Params, jax.Array, Leaves], jax.Array]

    @cached_property
    def norms(self) -> Mapping[str, int]:
        """The normalisations it runs: name -> channels."""
        found: dict[str, int] = {}

        def norm(name: str, x: jax.Array) -> jax.Array:
            found[name] = x.shape[3]
            return x

        x = jax.ShapeDtypeStruct((1, _PROBE, _PROBE, self.channels_in), jnp.float32)
        jax.eval_shape(lambda params, x: self.apply(params, x, shape_leaves(norm)), abstract(self.weights), x)
        return found

    @property
    def declared(self) -> dict[str, Any]:
        """Its entry in the parameters: the weights, and {"scale", "bias"} a normalisation."""
        affine = {
            name: {"scale": Weight((c,), constant=1.0), "bias": Weight((c,), constant=0.0)}
            for name, c in self.norms.items()
        }
        return {**self.weights, **affine}

    @property
    def statistics(self) -> dict[str, Any]:
        """Its entry in the running statistics: {"mean", "var"} a normalisation."""
        return {
            name: {"mean": Weight((c,), constant=0.0), "var": Weight((c,), constant=1.0)}
            for name, c in self.norms.items()
        }


def abstract(declared: Any) -> Any:
    """Shapes and dtypes of a tree of declarations."""
    return jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), declared, is_leaf=lambda node: isinstance(node, Weight)
    )


def shape_leaves(norm: Callable[[str, jax.Array], jax.Array]) -> Leaves:
    """Leaves for abstract runs: a convolution is one equation of the trace, pools and norms only have a shape."""

    def pool(x: jax.Array, stride: int) -> jax.Array:
        b, h, w, c = x.shape
        return jnp.zeros((b, -(-h // stride), -(-w // stride), c), x.dtype)

    units = composed_separable(depthwise_conv_reference, norm), composed_pointwise(norm)
    return Leaves(depthwise_conv_reference, pool, pool, norm, *units)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(wide_dtype(x))


# --- the layers -------------------------------------------------------------------------------------------------------


@cache
def operation(primitive: Primitive, channels: int, stride: int) -> Layer:
    """An operation of a cell: a primitive of the search space at a width and stride."""
    return Layer(channels, primitive.weights(channels, stride), partial(_operation, primitive.apply, stride))


def _operation(run: Callable[..., jax.Array], stride: int, params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    return run(params, x, stride, leaves)


@cache
def preprocess(channels_in: int, channels: int, reduces: bool) -> Layer:
    """What a cell does to an input: ReLU, 1x1 convolution (FactorizedReduce after a reduction), BN."""
    half = channels // 2
    if reduces:
        weights = {
            "first": Weight((channels_in, half), channels_in),
            "second": Weight((channels_in, channels - half), channels_in),
        }
    else:
        weights = {"pointwise": Weight((channels_in, channels), channels_in)}
    return Layer(channels_in, weights, _preprocess)


def _preprocess(params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    if "pointwise" in params:
        return leaves.pointwise("bn", x, params["pointwise"])
    return leaves.norm("bn", factorized_reduce(jax.nn.relu(x), params["first"], params["second"]))


def widened(x: jax.Array, width: int, halves: bool) -> jax.Array:
    """The input of a preprocessing for its form as one 1x1 convolution of `width` inputs (`dense_preprocess`).

    A FactorizedReduce (`halves`) is a 1x1 convolution of the even pixels and the odd pixels side by side.
    """
    if halves:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = jnp.concatenate([x[:, ::2, ::2], x[:, 1::2, 1::2]], axis=3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3])))


def dense_preprocess(params: Params, width: int) -> Params:
    """The weights of any preprocessing as those of a 1x1 convolution of `width` inputs: padded, or block-diagonal."""
    if "pointwise" in params:
        kernel = params["pointwise"]
    else:
        first, second = params["first"], params["second"]
        top = jnp.pad(first, ((0, 0), (0, second.shape[1])))
        kernel = jnp.concatenate([top, jnp.pad(second, ((0, 0), (first.shape[1], 0)))])
    return {"pointwise": jnp.pad(kernel, ((0, width - kernel.shape[0]), (0, 0))), "bn": params["bn"]}


def _dense(kernel: int, channels_in: int, channels: int) -> Weight:
    return Weight((kernel, kernel, channels_in, channels), kernel * kernel * channels_in)


@cache
def cifar_stem(channels_in: int, channels: int) -> Layer:
    """3x3 convolution to 3C, BN."""
    return Layer(channels_in, {"conv": _dense(3, channels_in, 3 * channels)}, _cifar_stem)


def _cifar_stem(params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    return leaves.norm("bn", conv(x, params["conv"]))


@cache
def imagenet_stem0(channels_in: int, channels: int) -> Layer:
    """3x3 convolution of stride 2 to C/2, BN, ReLU, the same to C, BN: the first cell's c_{k-2}."""
    half = channels // 2
    weights = {"conv1": _dense(3, channels_in, half), "conv2": _dense(3, half, channels)}
    return Layer(channels_in, weights, _imagenet_stem0)


def _imagenet_stem0(params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    x = leaves.norm("bn1", conv(x, params["conv1"], stride=2))
    return leaves.norm("bn2", conv(jax.nn.relu(x), params["conv2"], stride=2))


@cache
def imagenet_stem1(channels: int) -> Layer:
    """ReLU, 3x3 convolution of stride 2, BN: the first cell's c_{k-1}."""
    return Layer(channels, {"conv": _dense(3, channels, channels)}, _imagenet_stem1)


def _imagenet_stem1(params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    return leaves.norm("bn", conv(jax.nn.relu(x), params["conv"], stride=2))


@cache
def auxiliary_head(channels_in: int, classes: int, stem: str) -> Layer:
    """ReLU, 5x5 average pool, 1x1 to 128, BN, ReLU, 2x2 (valid) to 768, BN, ReLU, linear."""
    first, second = _AUX_CHANNELS
    weights = {
        "pointwise": Weight((channels_in, first), channels_in),
        "conv": _dense(2, first, second),
        "kernel": Weight((second, classes), second),
        "bias": Weight((classes,), second),
    }
    return Layer(channels_in, weights, partial(_auxiliary_head, AUX_STRIDES[stem]))


def _auxiliary_head(stride: int, params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    zero = np.zeros((), x.dtype)  # concrete: JAX then knows the window sum, which has a gradient
    window, strides = (1, _AUX_POOL, _AUX_POOL, 1), (1, stride, stride, 1)
    x = lax.reduce_window(jax.nn.relu(x), zero, lax.add, window, strides, "VALID") / (_AUX_POOL * _AUX_POOL)
    x = jax.nn.relu(leaves.norm("bn1", pointwise(x, params["pointwise"])))
    x = jax.nn.relu(leaves.norm("bn2", conv(x, params["conv"])))
    return _linear(params, x.reshape(x.shape[0], -1))


def auxiliary_fits(size: int, stem: str) -> bool:
    """Whether the head turns a feature map of this height or width into one pixel, which its linear layer takes."""
    return (size - _AUX_POOL) // AUX_STRIDES[stem] + 1 == 2


@cache
def classifier(channels_in: int, classes: int) -> Layer:
    """Global average pool, linear."""
    weights = {"kernel": Weight((channels_in, classes), channels_in), "bias": Weight((classes,), channels_in)}
    return Layer(channels_in, weights, _classifier)


def _classifier(params: Params, x: jax.Array, leaves: Leaves) -> jax.Array:
    return _linear(params, jnp.mean(_wide(x), axis=(1, 2)))


def _linear(params: Params, x: jax.Array) -> jax.Array:
    x = _wide(x)
    return linear(x, params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype))


# --- batch normalisation ----------------------------------------------------------------------------------------------


def batch_norm(
    x: jax.Array,
    affine: Params,
    running: Params,
    *,
    train: bool,
    axis_name: str | None = None,
    own_kernels: bool = True,
) -> tuple[jax.Array, Params]:
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
      own_kernels: whether kernels of ours may be used on CPU.

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
