r"""The operation `noise` of the space S4: Gaussian noise of the output's shape, whatever the input.

    prdarts search --preset digits --method.executed_ops 1 \
        --space.ops experiments/spaces/s4.json --space.primitives experiments/spaces/noise.py

A primitive is a pure function without a key, and the backward pass computes it again: the key is made of the bits of
the input, so the noise differs from batch to batch and device to device and is the same each time it is computed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from prdarts_jax.ops.layer_set import LayerSet
from prdarts_jax.ops.layers import Weight
from prdarts_jax.ops.primitives import Primitive


def _weights(channels: int, stride: int) -> dict[str, Weight]:
    return {}


def _noise(params: dict[str, jax.Array], x: jax.Array, stride: int, layers: LayerSet) -> jax.Array:
    bits = lax.bitcast_convert_type(jnp.sum(x.astype(jnp.float32)), jnp.uint32)
    key = jax.random.fold_in(jax.random.key(0), bits)
    b, h, w, c = x.shape
    return jax.random.normal(key, (b, -(-h // stride), -(-w // stride), c)).astype(x.dtype)


PRIMITIVES = {"noise": Primitive("other", _weights, _noise)}
