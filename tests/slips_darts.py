"""Slips in the methods that are made of DARTS."""

from __future__ import annotations

from slips import Mutation

DARTS_SLIPS = (
    Mutation(
        "method: P-DARTS keeps the operations of lowest score",
        "prdarts_jax/strategies/p_darts.py",
        "ranked[len(there) - math.ceil(share * len(there)) :]",
        "ranked[: math.ceil(share * len(there))]",
        ("tests/strategies/test_darts_methods.py::test_the_stages_of_p_darts_are_the_published_ones",),
    ),
    Mutation(
        "method: the dropout of P-DARTS stays while the architecture rests",
        "prdarts_jax/strategies/p_darts.py",
        "early, late = (epochs - epoch - 1) / epochs,",
        "early, late = 1.0,",
        ("tests/strategies/test_darts_methods.py::test_the_dropout_of_p_darts_is_that_of_its_program",),
    ),
    Mutation(
        "method: RobustDARTS goes back by one epoch",
        "prdarts_jax/strategies/stability.py",
        "found = alarm(view, at, arch, why)",
        "found = alarm(view, view.epoch - 1, arch, why)",
        ("tests/strategies/test_darts_methods.py::test_robust_darts_stops_or_goes_back_where_the_published_rule_does",),
    ),
    Mutation(
        "method: edges of PC-DARTS do not rank pairs",
        "prdarts_jax/strategies/transforms.py",
        "np.asarray(table) * np.asarray(own[k])[:, None]",
        "np.asarray(table)",
        ("tests/strategies/test_darts_methods.py::test_the_derived_cell_of_pc_darts_has_weighted_edges",),
    ),
)
