"""DARTS with the path term of PR-DARTS, without its gates: a part of the ablation of Figure 1(e), as a user's strategy.

prdarts search --strategy experiments/path_term.py:darts_with_path --method.lambda3 0.005
"""

from __future__ import annotations

import jax

from prdarts_jax.gates import Gates
from prdarts_jax.regularizers import path_depth_term
from prdarts_jax.space import Space
from prdarts_jax.space.spec import CELL_TYPES
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategy import Arch, Memory, Numbers, Strategy


def darts_with_path(*, space: Space, lambda3: float = 0.005) -> Strategy:
    """L_val - lambda3 L_path, the probabilities of eq. 8 being the softmax weights of DARTS."""
    base = darts(space=space)

    def objective(
        ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        p = base.probabilities(arch, numbers)
        path = sum(path_depth_term(p[kind], space, kind=kind) for kind in CELL_TYPES)
        term = -lambda3 * path / 2
        return ce + term, {"path": term}

    return base._replace(objective=objective)
