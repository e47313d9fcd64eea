"""A boundary for XLA:CPU's fusions."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def materialised(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """function(x), computed once and stored.

    XLA:CPU ignores optimization barriers when it fuses, and would repeat the function for each use of each element. A
    conditional is a boundary it keeps. Its other branch is taken where x begins with NaN, and gives NaN everywhere (0
    where the dtype has none): a run that meets NaN stops anyway. On other platforms it is function(x).

    >>> materialised(lambda x: 2 * x, jnp.arange(3.0)).tolist()
    [0.0, 2.0, 4.0]
    """
    shape = jax.eval_shape(function, x)
    other = jnp.nan if jnp.issubdtype(shape.dtype, jnp.floating) else 0

    def guarded(x: jax.Array) -> jax.Array:
        probe = x.reshape(-1)[0]
        return lax.cond(probe == probe, function, lambda _: jnp.full(shape.shape, other, shape.dtype), x)

    return lax.platform_dependent(x, cpu=guarded, default=function)
