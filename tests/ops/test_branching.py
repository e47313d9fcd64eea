"""One of several functions: the loops of CPU, the switch of other platforms, and their derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prdarts_jax.ops.lowering import _loops, _switch, run_branch

BRANCHES = (lambda s, x: s * x, None, lambda s, x: s + jnp.sin(x))
STATE, OPERAND = 3.0, 2.0
# By hand: value, d/dstate, d/doperand, d2/dstate doperand, d2/doperand2; index 3 is past the last.
EXPECTED = [
    (6.0, 2.0, 3.0, 1.0, 0.0),
    (3.0, 1.0, 0.0, 0.0, 0.0),
    (3 + np.sin(2.0), 1.0, np.cos(2.0), 0.0, -np.sin(2.0)),
    (3.0, 1.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("index", range(4))
def test_values_and_derivatives_are_those_of_the_chosen_branch(index: int) -> None:
    def value(state: Any, operand: Any) -> Any:
        return run_branch(BRANCHES, jnp.int32(index), state, operand)

    slopes = [jax.grad(value, n) for n in (0, 1)]
    mixed, twice = (jax.grad(slope, 1) for slope in slopes)
    found = [float(f(STATE, OPERAND)) for f in (value, *slopes, mixed, twice)]
    np.testing.assert_allclose(found, EXPECTED[index], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lowering", [_loops, _switch])
def test_both_lowerings_choose_the_same(lowering: Any) -> None:
    run = jax.jit(lambda index: lowering(BRANCHES, index, jnp.float32(STATE), jnp.float32(OPERAND)))
    np.testing.assert_allclose([run(i) for i in range(4)], [row[0] for row in EXPECTED], rtol=1e-6)
