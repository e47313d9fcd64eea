"""Whether a user's primitives compute what the network expects, tried on shapes and on numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from prdarts_jax.config import userfile
from prdarts_jax.errors import UserError
from prdarts_jax.ops.layer_set import fast_layers
from prdarts_jax.ops.layers import Reduction, draw, factorized_reduce
from prdarts_jax.ops.pools import Pool
from prdarts_jax.ops.primitives import Primitive


def check_primitives(
    user: Mapping[str, Primitive],
    uses: Iterable[tuple[str, int]],
    *,
    channels: int,
    size: tuple[int, int],
    dtype: str,
    field: str,
) -> None:
    """Refuses a primitive of the user that does not map [B,H,W,C] to [B,ceil(H/s),ceil(W/s),C], dtype kept.

    Args:
      user: name -> primitive.
      uses: (name, stride) of what will run; names of other primitives are passed over.
      channels, size: C and (H, W) to try it on.
      dtype: of activations.
      field: dotted path of the config field they came from.

    Raises:
      UserError: another shape or dtype, or an exception in the user's file.
    """
    height, width = size
    x = jax.ShapeDtypeStruct((2, height, width, channels), np.dtype(dtype))

    for name, stride in sorted(set(uses)):
        if name not in user:
            continue
        one = user[name]

        def run(key: jax.Array, x: jax.Array, one: Primitive = one, stride: int = stride) -> jax.Array:
            return one.apply(draw(key, one.weights(channels, stride)), x, stride, fast_layers())

        allowed = jax.ShapeDtypeStruct((2, -(-height // stride), -(-width // stride), channels), x.dtype)
        with userfile.errors_of({field: one}):
            found = jax.eval_shape(run, jax.random.key(0), x)
        if _text(found) != _text(allowed):
            raise UserError(
                f"{field}: {name!r} gives {_text(found)} for {_text(x)} at stride {stride}; allowed: {_text(allowed)}"
            )
        if one.units is not None:
            with userfile.errors_of({field: one}):
                agrees = _units_agree(one, channels, stride)
            if not agrees:
                raise UserError(f"{field}: units and apply of {name!r} differ at stride {stride}; allowed: the same")


def _units_agree(one: Primitive, channels: int, stride: int) -> bool:
    """Whether the units of a primitive compute what it applies, on numbers."""
    assert one.units is not None
    layers, params = fast_layers(own_kernels=False), draw(jax.random.key(0), one.weights(channels, stride))
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, channels))
    units = one.units(params, stride)
    if units is None:
        return True
    if isinstance(units, Pool):
        y = (layers.max_pool if units.kind == "maximum" else layers.avg_pool)(x, units.stride)
    elif isinstance(units, Reduction):
        y = layers.norm("bn", factorized_reduce(jax.nn.relu(x), *units))
    else:
        y = layers.separable([f"bn{i}" for i in range(len(units))], x, units) if units else x
    found = one.apply(params, x, stride, layers)
    return y.shape == found.shape and bool(jax.numpy.allclose(y, found, rtol=1e-3, atol=1e-3))


def _text(value: Any) -> str:
    """A shape with its dtype, as float32[2,8,8,4]."""
    if not hasattr(value, "shape"):
        return f"a {type(value).__name__}"
    return f"{np.dtype(value.dtype).name}[{','.join(map(str, value.shape))}]"
