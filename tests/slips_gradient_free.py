"""Slips in searches without gradients, and in the choice of a cell by the protocol."""

from __future__ import annotations

from slips import Mutation

_TESTS = "tests/strategies/test_gradient_free.py"
_CELLS = "tests/strategies/test_cell_choices.py"

GRADIENT_FREE_SLIPS = (
    Mutation(
        "cells: a node takes three inputs",
        "prdarts_jax/strategies/cells.py",
        "used = (ahead < PAIRS)",
        "used = (ahead <= PAIRS)",
        (f"{_CELLS}::test_draws_from_logits_have_the_probabilities_of_the_policy",),
    ),
    Mutation(
        "cells: a new input takes an operation of its own",
        "prdarts_jax/strategies/cells.py",
        "op if may[kind, to, op] else rng.choice(",
        "rng.choice(",
        (f"{_CELLS}::test_a_mutation_changes_one_operation_or_one_input",),
    ),
    Mutation(
        "evolution: the youngest member dies",
        "prdarts_jax/strategies/evolution.py",
        "place = count % population",
        "place = min(count, population - 1)",
        (f"{_TESTS}::test_evolution_is_a_queue_of_children_of_the_best_of_a_tournament",),
    ),
    Mutation(
        "evolution: the worst of a tournament is the parent",
        "prdarts_jax/strategies/evolution.py",
        "living[max(drawn,",
        "living[min(drawn,",
        (f"{_TESTS}::test_evolution_is_a_queue_of_children_of_the_best_of_a_tournament",),
    ),
    Mutation(
        "ENAS: the second input is drawn as if the first were still there",
        "prdarts_jax/strategies/enas.py",
        'slope["edges"][kind, left] -= p',
        'slope["edges"][kind, list(edges)] -= _softmax(policy["edges"][kind, list(edges)])',
        (f"{_TESTS}::test_the_policy_gradient_is_that_of_ln_pi",),
    ),
    Mutation(
        "ENAS: the policy sees one batch alone",
        "prdarts_jax/strategies/enas.py",
        "first=steps * aggregate + k",
        "first=0",
        (f"{_TESTS}::test_the_policy_moves_as_adam_does_and_asks_for_a_new_batch_each_time",),
    ),
    Mutation(
        "PNAS: the beam is of the worst",
        "prdarts_jax/strategies/pnas.py",
        "np.argsort(-worth[rows]",
        "np.argsort(worth[rows]",
        (f"{_TESTS}::test_cells_grow_from_the_best_of_the_size_before",),
    ),
    Mutation(
        "gradient-free: the champion keeps the worth it once had",
        "prdarts_jax/strategies/gradient_free.py",
        "rated.insert(0, (worth(before), before))",
        "rated.insert(0, (1.0, before))",
        (f"{_TESTS}::test_the_champion_is_the_best_at_the_weights_of_now",),
    ),
    Mutation(
        "protocol: the worst cell is chosen",
        "prdarts_jax/protocol.py",
        'key=lambda name: (-measured[name]["accuracy"]',
        'key=lambda name: (measured[name]["accuracy"]',
        ("tests/test_protocol.py::test_best_first_by_brute_force",),
    ),
    Mutation(
        "protocol: a cell may be chosen by test images",
        "prdarts_jax/config/pipeline.py",
        "require(every == 0,",
        "require(every >= 0,",
        ("tests/test_protocol.py::test_impossible_configs_are_one_line",),
    ),
)
