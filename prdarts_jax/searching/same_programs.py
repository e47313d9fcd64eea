"""Whether the members of a population may share a compiled program: their own parts are lowered and compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prdarts_jax.errors import UserError
from prdarts_jax.searching.inputs import Inputs
from prdarts_jax.searching.program import Problem
from prdarts_jax.space import supernet
from prdarts_jax.strategy import Strategy


def same_programs(members: Mapping[str, Inputs]) -> None:
    """Refuses members whose strategies or own optimizers compute something else than the first member's.

    A number that reaches the step through `schedule` or the state of an optimizer leaves no trace in the lowered
    program; a Python number that a function has closed over is a constant in it.

    Args:
      members: by name; the program of the first one is used by all.

    Raises:
      UserError: a program differs.
    """
    (_, first), *others = members.items()
    parts = {
        "method.strategy": ("strategy", _strategy),
        "weights.transform": ("weight_tx", _transformation),
        "arch.transform": ("arch_tx", _transformation),
    }
    for field, (attribute, lowered) in parts.items():
        mine = getattr(first.problem, attribute)
        # The optimizers of the config have their numbers in their state.
        own = field == "method.strategy" or field in first.digests
        differing = [(n, o) for n, o in others if own and getattr(o.problem, attribute) is not mine]
        expected = lowered(first.problem, attribute) if differing else ""
        for name, other in differing:
            if lowered(other.problem, attribute) != expected:
                raise UserError(
                    f"sweep: {name} makes another program of {field}, which has frozen a swept number; "
                    "allowed: numbers that enter the step as arrays"
                )


def _strategy(problem: Problem, attribute: str) -> str:
    """The functions of a strategy that are compiled, lowered on shapes."""
    strategy: Strategy = getattr(problem, attribute)
    progress = {name: np.float32(value) for name, value in strategy.schedule(0, 2).items()}

    def everything(key: jax.Array, arch: Any, progress: Any) -> Any:
        gates = strategy.sample(key, arch, progress)
        return gates, strategy.penalty(arch, gates, progress), strategy.expected(arch, progress)

    arch = jax.eval_shape(strategy.init, jax.random.key(0))
    first = jax.jit(strategy.init).lower(jax.random.key(0)).as_text()
    return first + jax.jit(everything).lower(jax.random.key(0), arch, progress).as_text() + str(strategy.traits)


def _transformation(problem: Problem, attribute: str) -> str:
    """First state and update of a transformation, lowered on shapes."""
    tx: optax.GradientTransformation = getattr(problem, attribute)
    made = problem.strategy.init if attribute == "arch_tx" else lambda key: supernet.init(key, problem.space)
    parameters = jax.eval_shape(made, jax.random.key(0))
    state = jax.eval_shape(tx.init, parameters)

    def update(parameters: Any, state: Any) -> Any:
        return tx.update(jax.tree.map(jnp.ones_like, parameters), state, parameters)

    return jax.jit(tx.init).lower(parameters).as_text() + jax.jit(update).lower(parameters, state).as_text()
