"""DARTS: every edge is the softmax mixture of all its operations.

    node_n = sum over edges and operations of softmax(alpha)_o op_o(x);   alpha moves first, on the validation batch
    order 1: down grad_alpha L_val(w, alpha);   order 2: down grad_alpha L_val(w'(alpha), alpha), see `bilevel.unrolled`

Liu, Simonyan, Yang: DARTS: Differentiable Architecture Search, ICLR 2019.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import alternating, unrolled
from prdarts_jax.config.schema import require
from prdarts_jax.gates import Gates
from prdarts_jax.space.derive import init_normal
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy


def darts(*, space: Space, order: int = 1, exact: bool = False, init_scale: float = 1e-3) -> Strategy:
    """The DARTS strategy: dense, no sampling, no penalty.

    Args:
      space: the search space.
      order: 1, or 2 with the virtual step of the weights (2.5 times as many passes through the network).
      exact: the second-order product by automatic differentiation in place of the published finite difference; the
        network is then unrolled into plain JAX operations: for small spaces.
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = darts(space=Space())
    >>> gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), (), {}, "eval")
    >>> bool(jnp.allclose(gates.ops["normal"].sum(axis=1), 1.0, atol=1e-6))
    True
    """
    require(order in (1, 2), "method.options.order", order, "1 | 2")
    require(order == 2 or not exact, "method.options.exact", exact, "False with order=1")
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
        rule=alternating(first="arch") if order == 1 else unrolled(exact),
    )
