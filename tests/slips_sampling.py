"""Slips in the methods with gates of their own: SNAS, GDAS, Fair DARTS, ProxylessNAS and the one after BayesNAS."""

from __future__ import annotations

from slips import Mutation

_TESTS = "tests/strategies/test_sampled_methods.py"
_TORCH = "tests/strategies/test_torch_sampling.py::test_three_steps_are_those_of_torch"

SAMPLING_SLIPS = (
    Mutation(
        "sampling: the logits get noise of another distribution",
        "prdarts_jax/gates.py",
        "return -jnp.log(-jnp.log(uniform_open(key, shape)))",
        "return jnp.log(uniform_open(key, shape))",
        (f"{_TESTS}::test_an_operation_is_drawn_as_often_as_its_probability",),
    ),
    Mutation(
        "sampling: the choice has no gradient",
        "prdarts_jax/strategies/sampling.py",
        " + (p - jax.lax.stop_gradient(p))",
        "",
        (f"{_TORCH}[gdas]",),
    ),
    Mutation(
        "SNAS: the resource term is a sum over cells",
        "prdarts_jax/strategies/snas.py",
        "/ (3 * len(cells))",
        "/ 3",
        (f"{_TESTS}::test_a_sample_for_each_cell_is_one_of_the_same_distribution",),
    ),
    Mutation(
        "SNAS: `none` is no candidate of an edge",
        "prdarts_jax/strategies/snas.py",
        "none_competes=True",
        "none_competes=False",
        (f"{_TESTS}::test_cells_by_the_rules_of_the_programs",),
    ),
    Mutation(
        "Fair DARTS: the zero-one loss pulls to 1/2",
        "prdarts_jax/strategies/fair_darts.py",
        'term = -numbers["w01"]',
        'term = numbers["w01"]',
        ("tests/strategies/test_tabulated.py::test_the_best_cell_is_found[fair-darts]",),
    ),
    Mutation(
        "Fair DARTS: the threshold is left out",
        "prdarts_jax/strategies/fair_darts.py",
        "return derive_pairs(tables, space, least=threshold)",
        "return derive_pairs(tables, space)",
        (f"{_TESTS}::test_cells_by_the_rules_of_the_programs",),
    ),
    Mutation(
        "ProxylessNAS: the share of the others is not kept",
        "prdarts_jax/strategies/proxyless.py",
        'jax.tree.map(with_mass_of, state.arch, after.arch) if mode == "two" else after.arch',
        "after.arch",
        (f"{_TORCH}[proxyless, two]",),
    ),
    Mutation(
        "BayesNAS: the edge has no part in gamma of its operations",
        "prdarts_jax/strategies/bayesnas.py",
        'own = 1 / (1 / np.maximum(own, _LEAST) + 1 / np.maximum(gamma[kind]["edges"], _LEAST)[:, None])',
        "pass",
        (f"{_TESTS}::test_omega_and_gamma_from_the_squares_of_an_epoch",),
    ),
    Mutation(
        "BayesNAS: the lasso is in the squares",
        "prdarts_jax/strategies/bayesnas.py",
        "slope = jax.tree.map(jnp.subtract, losses.own(found.arch), of_lasso)",
        "slope = losses.own(found.arch)",
        (f"{_TESTS}::test_omega_and_gamma_from_the_squares_of_an_epoch",),
    ),
    Mutation(
        "optimizers: SGD of the architecture has no momentum",
        "prdarts_jax/optimizers.py",
        "optax.sgd(learning_rate, momentum=config.momentum or None)",
        "optax.sgd(learning_rate)",
        ("tests/test_optimizers.py::test_sgd_of_the_architecture",),
    ),
)
