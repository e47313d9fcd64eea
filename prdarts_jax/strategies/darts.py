"""First-order DARTS: every edge is the softmax mixture of all its operations.

    node_n = sum over edges and operations of softmax(alpha)_o op_o(x);   alpha moves first, on the validation batch

Liu, Simonyan, Yang: DARTS: Differentiable Architecture Search, ICLR 2019.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import alternating
from prdarts_jax.config.schema import require
from prdarts_jax.gates import Gates
from prdarts_jax.space.derive import init_normal
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy


def darts(*, space: Space, init_scale: float = 1e-3) -> Strategy:
    """The DARTS strategy, first order: dense, no sampling, no penalty.

    Args:
      space: the search space.
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = darts(space=Space())
    >>> gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), (), {}, "eval")
    >>> bool(jnp.allclose(gates.ops["normal"].sum(axis=1), 1.0, atol=1e-6))
    True
    """

    possible = math.isfinite(init_scale) and init_scale >= 0
    require(possible, "method.options.init_scale", init_scale, "a finite number >= 0")

    def weights(arch: Arch) -> dict[str, jax.Array]:
        """Softmax over the operations an edge may use."""
        return {
            kind: jax.nn.softmax(jnp.where(jnp.asarray(space.allowed[kind]), arch[kind], -jnp.inf), axis=1)
            for kind in CELL_TYPES
        }

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        return Gates(weights(arch), {kind: gating.all_ops(space.allowed[kind]) for kind in CELL_TYPES})

    return Strategy(
        space=space,
        init=lambda key: init_normal(key, space, init_scale),
        schedule=lambda epoch, epochs: {},
        sample=sample,
        probabilities=lambda arch, numbers: weights(arch),
        scores=weights,
        rule=alternating(first="arch"),
    )
