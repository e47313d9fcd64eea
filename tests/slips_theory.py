"""Slips in the cell of the paper's theory, and in the closed forms of gates that are 0 or 1."""

from __future__ import annotations

from slips import Mutation

_THEORY, _GATES = "tests/test_theory.py", "tests/test_gates.py"

THEORY_SLIPS = (
    Mutation(
        "theory: the window of a convolution begins at its position",
        "prdarts_jax/theory.py",
        "jnp.pad(z, ((0, 0), (half, half)))",
        "jnp.pad(z, ((0, 0), (0, 2 * half)))",
        (f"{_THEORY}::test_a_product_with_the_patches_is_a_convolution",),
    ),
    Mutation(
        "theory: nodes sum convolutions without their gates",
        "prdarts_jax/theory.py",
        "gates[e, CONV] * conv(",
        "conv(",
        (f"{_THEORY}::test_nodes_output_and_loss_by_loops",),
    ),
    Mutation(
        "theory: the shallow cell has edges between its branches",
        "prdarts_jax/theory.py",
        "first = max(root for root in roots if root <= node)",
        "first = 0",
        (f"{_THEORY}::test_the_shallow_cell_is_the_sum_of_its_branches",),
    ),
    Mutation(
        "theory: descent climbs",
        "prdarts_jax/theory.py",
        "w - rate * g, weights",
        "w + rate * g, weights",
        (f"{_THEORY}::test_a_step_moves_every_weight_against_its_gradient",),
    ),
    Mutation(
        "theory: A(a) with skips into the last node",
        "prdarts_jax/theory.py",
        "term = gates[places[source, nodes - 1], CONV] ** 2",
        "term = gates[places[source, nodes - 1], SKIP] ** 2",
        (f"{_THEORY}::test_rate_sum_and_what_it_depends_on",),
    ),
    Mutation(
        "theory: K_ij as it may be meant has the printed corner",
        "prdarts_jax/theory.py",
        "return smallest(products), smallest(own)",
        "return smallest(products), smallest(products)",
        (f"{_THEORY}::test_eigenvalues_of_pairs_by_numpy",),
    ),
    Mutation(
        "gates: P(g = 1) with the upper end of the interval alone",
        "prdarts_jax/gates.py",
        "math.log((1 - a) / (b - 1))",
        "math.log(1 / (b - 1))",
        (f"{_GATES}::test_regimes_by_monte_carlo",),
    ),
    Mutation(
        "gates: zeros are executed before what lies inside",
        "prdarts_jax/gates.py",
        "np.minimum(counts[None, :], k - counts[:, None])",
        "np.maximum(counts[None, :] - counts[:, None], 0)",
        (f"{_GATES}::test_shares_without_gradient_by_monte_carlo",),
    ),
    Mutation(
        "optimizers: every extra argument is handed on",
        "prdarts_jax/optimizers.py",
        "for name in names & set(extra)}",
        "for name in extra}",
        ("tests/test_optax.py::test_what_takes_more_than_gradients",),
    ),
)
