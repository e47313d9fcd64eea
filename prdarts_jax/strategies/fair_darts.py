"""Fair DARTS: operations that do not compete, driven to 0 or 1, and kept above a threshold.

    w = sigmoid(alpha);   alpha descends CE_val - w01 mean (w - 1/2)^2  ("l2"), or - w01 mean |w - 1/2|  ("l1")

Chu, Zhou, Zhang, Li: Fair DARTS: Eliminating Unfair Advantages in Differentiable Architecture Search, ECCV 2020.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import gates as gating
from prdarts_jax.bilevel import alternating
from prdarts_jax.config.schema import require
from prdarts_jax.errors import unknown
from prdarts_jax.gates import Gates
from prdarts_jax.space.derive import derive_edges, derive_pairs
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.sampling import check_finite
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy, Tables

NORMS = ("l2", "l1")
KEEPS = ("sparse", "edge")
_PER_EDGE = 2  # operations of an edge that "edge" keeps, at most


def fair_darts(
    *, space: Space, w01: float = 10.0, norm: str = "l2", threshold: float = 0.85, keep: str = "sparse"
) -> Strategy:
    """The Fair DARTS strategy: dense, no sampling; alpha starts at 0 and moves first.

    Meant for a space without `none` (its settings leave it out). A node whose pairs all stay below the threshold does
    not exist in the derived network.

    Args:
      space: the search space.
      w01: coefficient of the zero-one loss.
      norm: of the zero-one loss, "l2" or "l1".
      threshold: of a kept operation.
      keep: "sparse": of the two edges a node that DARTS would keep, those whose operation reaches the threshold;
        "edge": of every edge the best operations that reach it, at most two.

    Raises:
      UserError: a value that is not possible.

    >>> strategy = fair_darts(space=Space(nodes=1))
    >>> strategy.derive(strategy.init(jax.random.key(0))).normal  # nothing has been learnt
    ((),)
    """
    check_finite(w01=w01)
    require(math.isfinite(threshold) and 0 <= threshold < 1, "method.options.threshold", threshold, "in [0, 1)")
    for option, value, names in (("norm", norm, NORMS), ("keep", keep, KEEPS)):
        if value not in names:
            raise unknown(f"method.options.{option}", value, names)
    entries = sum(int(space.allowed[kind].sum()) for kind in CELL_TYPES)

    def weights(arch: Arch) -> dict[str, jax.Array]:
        return {k: jnp.where(jnp.asarray(space.allowed[k]), jax.nn.sigmoid(arch[k]), 0.0) for k in CELL_TYPES}

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        return Gates(weights(arch), {kind: gating.all_ops(space.allowed[kind]) for kind in CELL_TYPES})

    def objective(
        ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        total = jnp.zeros((), ce.dtype)
        for kind, w in weights(arch).items():
            apart = jnp.where(jnp.asarray(space.allowed[kind]), w - 0.5, 0.0)
            total = total + jnp.sum(apart**2 if norm == "l2" else jnp.abs(apart))
        term = -numbers["w01"] * total / entries
        return ce + term, {"zero_one": term}

    def select(scores: Tables) -> Genotype:
        tables = {kind: np.asarray(table) for kind, table in scores.items()}
        if keep == "edge":
            return derive_edges(tables, space, per_edge=_PER_EDGE, least=threshold)
        return derive_pairs(tables, space, least=threshold)

    shape = (space.num_edges, space.num_ops)
    return Strategy(
        space=space,
        init=lambda key: {kind: jnp.zeros(shape, jnp.float32) for kind in CELL_TYPES},
        schedule=lambda epoch, epochs: {"w01": w01},
        sample=sample,
        objective=objective,
        probabilities=lambda arch, numbers: weights(arch),
        scores=weights,
        select=select,
        rule=alternating(first="arch"),
    )
