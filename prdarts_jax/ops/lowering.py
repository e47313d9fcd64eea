"""Lowerings that differ by platform: one of several functions chosen by a traced index, and a boundary for fusions.

`lax.switch` returns its state in a new array. In a loop XLA:CPU then copies it into that of the loop, and once more
where a branch returns what it was given. A while loop of at most one turn for each branch works in place. Elsewhere a
switch is one decision, the loops would be many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Lowering(NamedTuple):
    """What a program is lowered for, decided once, where its devices are known (`devices.sharding.lowering_of`).

    The platform of this process says nothing of it: a program for a GPU or TPU can be lowered where there is none.

    >>> Lowering("tpu").own_kernels, Lowering().own_kernels
    (False, True)
    """

    platform: str | None = None  # of the devices, as JAX calls it; None: not known, and what differs is traced for all
    cell: str = "auto"  # the mixed cell: scan | waves | kernels (`space/cell.py`); auto: what suits the platform

    @property
    def own_kernels(self) -> bool:
        """Whether the CPU kernels may be used: a branch that is lowered for a CPU alone."""
        return self.platform in (None, "cpu")


ANYWHERE = Lowering()


Branch = Callable[[Any, Any], Any]  # (state, operands) -> state of the same shapes; closes over static values only


def _switch(branches: Sequence[Branch | None], index: jax.Array, state: Any, operands: Any) -> Any:
    taken = [branch or (lambda state, operands: state) for branch in (*branches, None)]
    return lax.switch(jnp.minimum(index, len(branches)), taken, state, operands)


def _loops(branches: Sequence[Branch | None], index: jax.Array, state: Any, operands: Any) -> Any:
    for i, branch in enumerate(branches):
        if branch is not None:
            turn = partial(_turn, branch, operands)
            _, state = lax.while_loop(lambda carry: carry[0], turn, (index == i, state))
    return state


def _turn(branch: Branch, operands: Any, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    return jnp.zeros((), bool), branch(carry[1], operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_branch(branches: Sequence[Branch | None], index: jax.Array, state: Any, operands: Any) -> Any:
    """branches[index](state, operands). A branch None, and an index past the last, give the state as it is.

    Args:
      branches: static; what they read comes in through `operands`.
      index: int32[], not negative.
      state, operands: trees of arrays.

    Returns:
      The new state. Reverse-mode derivatives of any order (of a while loop there are none: they are those of a switch).

    >>> import jax.numpy as jnp
    >>> [float(run_branch((lambda s, x: s + x, None, jnp.multiply), jnp.int32(i), 3.0, 2.0)) for i in range(4)]
    [5.0, 3.0, 6.0, 3.0]
    """
    # Jitted, a branch is traced once for both lowerings.
    traced = tuple(branch and jax.jit(branch) for branch in branches)
    return lax.platform_dependent(index, state, operands, cpu=partial(_loops, traced), default=partial(_switch, traced))


def _forward(branches: Sequence[Branch | None], index: jax.Array, state: Any, operands: Any) -> Any:
    return run_branch(branches, index, state, operands), (index, state, operands)


def _backward(branches: Sequence[Branch | None], residuals: Any, cotangent: Any) -> Any:
    index, state, operands = residuals
    _, pull = jax.vjp(partial(_switch, branches, index), state, operands)
    return np.zeros(np.shape(index), jax.dtypes.float0), *pull(cotangent)


run_branch.defvjp(_forward, _backward)


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
