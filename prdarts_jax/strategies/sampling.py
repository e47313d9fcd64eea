"""What methods that sample a categorical variable an edge share: noise, logits, a one-hot with a gradient."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import gates as gating
from prdarts_jax.config.schema import require
from prdarts_jax.space.spec import CELL_TYPES, Space

# float32 holds (logit + noise)/tau with room to spare: the noise is between -ln(87) and ln(2^24).
TAU_RANGE = (1e-3, 1e6)


def gumbel_noise(key: jax.Array, space: Space, cells: int | None = None) -> dict[str, jax.Array]:
    """{"normal", "reduce"} -> Gumbel noise, float32[E,O], or [cells,E,O]: the only randomness of these methods.

    >>> sorted(gumbel_noise(jax.random.key(0), Space(nodes=1)))
    ['normal', 'reduce']
    """
    shape = (space.num_edges, space.num_ops) if cells is None else (cells, space.num_edges, space.num_ops)
    return {kind: gating.gumbel(jax.random.fold_in(key, i), shape) for i, kind in enumerate(CELL_TYPES)}


def logits(arch: Mapping[str, jax.Array], space: Space) -> dict[str, jax.Array]:
    """The parameters, minus infinity where an edge may not use an operation."""
    return {kind: jnp.where(jnp.asarray(space.allowed[kind]), arch[kind], -jnp.inf) for kind in CELL_TYPES}


def softmax(arch: Mapping[str, jax.Array], space: Space) -> dict[str, jax.Array]:
    """Softmax over the operations an edge may use."""
    return {kind: jax.nn.softmax(table, axis=1) for kind, table in logits(arch, space).items()}


def one_hot_through(chosen: jax.Array, p: jax.Array) -> jax.Array:
    """Exactly one-hot in the forward pass, with the gradient of p: one_hot + (p - p), the last p a constant.

    >>> one_hot_through(jnp.array([1]), jnp.array([[0.3, 0.7]])).tolist()
    [[0.0, 1.0]]
    """
    return jax.nn.one_hot(chosen, p.shape[-1], dtype=p.dtype) + (p - jax.lax.stop_gradient(p))


def linear_tau(epoch: int, epochs: int, tau_max: float, tau_min: float) -> float:
    """From tau_max in the first to tau_min in the last epoch; a search of one epoch ends as all do."""
    share = epoch / (epochs - 1) if epochs > 1 else 1.0
    return tau_max * (1 - share) + tau_min * share


def check_taus(**taus: float) -> None:
    """Refuses temperatures that float32 cannot serve."""
    for name, tau in taus.items():
        require(TAU_RANGE[0] <= tau <= TAU_RANGE[1], f"method.options.{name}", tau, "{:g} to {:g}".format(*TAU_RANGE))


def check_finite(**options: float) -> None:
    """Refuses options that are no finite number >= 0."""
    for name, value in options.items():
        require(bool(np.isfinite(value)) and value >= 0, f"method.options.{name}", value, "a finite number >= 0")
