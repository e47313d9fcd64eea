"""Slips that a careless change could make, and the tests that must notice each of them: what `mutate.py` tries."""

from __future__ import annotations

from slips import Mutation
from slips_darts import DARTS_SLIPS
from slips_gradient_free import GRADIENT_FREE_SLIPS
from slips_methods import CONTRACT_SLIPS, GATE_SLIPS, PENALTY_SLIPS, STEP_SLIPS
from slips_network import CELL_SLIPS, KERNEL_SLIPS, LAYER_SLIPS
from slips_runs import DATA_SLIPS, RESULT_SLIPS, RUN_SLIPS
from slips_sampling import SAMPLING_SLIPS
from slips_theory import THEORY_SLIPS

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = (
    *GATE_SLIPS,
    *PENALTY_SLIPS,
    *CELL_SLIPS,
    *KERNEL_SLIPS,
    *LAYER_SLIPS,
    *STEP_SLIPS,
    *DATA_SLIPS,
    *RUN_SLIPS,
    *RESULT_SLIPS,
    *CONTRACT_SLIPS,
    *DARTS_SLIPS,
    *SAMPLING_SLIPS,
    *GRADIENT_FREE_SLIPS,
    *THEORY_SLIPS,
)
