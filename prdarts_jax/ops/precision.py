"""The precision of products of float32 arrays, set on purpose: matrix products and convolutions, forward and backward.

| name    | GPU (Ampere and later) | TPU                   | CPU     |
| ---     | ---                    | ---                   | ---     |
| default | as JAX is set; unless it is set: TensorFloat-32 | one pass of bfloat16 | float32 |
| bf16    | TensorFloat-32         | one pass of bfloat16  | float32 |
| tf32    | TensorFloat-32         | three passes          | float32 |
| highest | float32                | six passes            | float32 |

Sums are taken in float32 everywhere. A CPU multiplies in float32 whatever is asked for, and its kernels do too. No
compiler for GPUs multiplies float32 arrays as bfloat16: `dtype` bfloat16 makes the arrays so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

_OF_JAX: Mapping[str, str] = {"bf16": "bfloat16", "tf32": "tensorfloat32", "highest": "highest"}


def at_precision(precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced so that its products of float32 arrays have a precision; "default" leaves it as it is.

    Source: `jax.lax.Precision` (DEFAULT, HIGH, HIGHEST), of which the names above are those of `prdarts --precision`.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 2))
    >>> "HIGHEST" in jax.jit(at_precision("highest", jnp.dot)).lower(x, x).as_text()
    True
    """
    if precision == "default":
        return function

    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(_OF_JAX[precision]):
            return function(*args, **kwargs)

    return traced
