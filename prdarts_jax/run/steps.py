"""Several steps a dispatch, as one compiled loop: what the programs of a search and of a training share.

Images stay on the devices as uint8; gathering a batch and augmenting it happen inside the program. The number of steps
of a dispatch is an argument of one compiled loop, so dispatches of any length run the same instructions: their lengths,
and where a resumed run begins, cannot change a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Sums = dict[str, jax.Array]
State = TypeVar("State")


def run_steps(
    step: Callable[[jax.Array, State], tuple[State, Sums]],
    state: State,
    sums: Sums,
    *,
    count: jax.Array,
    fresh: jax.Array,
    length: int,
) -> tuple[State, Sums, Sums]:
    """`count` steps of a dispatch of at most `length`.

    Args:
      step: (index in the dispatch, state) -> (state, metrics of the step).
      state: before the first of them.
      sums: the sums of the epoch's metrics so far, name -> float32[].
      count: int32[], at most `length`; an argument of the program.
      fresh: bool[], whether an epoch begins.
      length: static.

    Returns:
      (state, sums, each metric of each step, name -> float32[length]).
    """
    sums = {name: jnp.where(fresh, 0.0, value) for name, value in sums.items()}
    rows = {name: jnp.zeros((length,), jnp.float32) for name in sums}

    def body(i: jax.Array, loop: tuple[State, Sums, Sums]) -> tuple[State, Sums, Sums]:
        state, sums, rows = loop
        state, metrics = step(i, state)
        sums = {name: sums[name] + metrics[name] for name in sums}
        rows = {name: rows[name].at[i].set(metrics[name]) for name in rows}
        return state, sums, rows

    return lax.fori_loop(0, count, body, (state, sums, rows))
