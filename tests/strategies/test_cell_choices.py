"""Cells as choices: draws against enumeration, gates, mutations."""

from __future__ import annotations

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choices import RESTRICTED, SPACE, every_cell, frequencies, logits_of, probability_of

from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import cells, enas


@pytest.mark.parametrize("space", [SPACE, RESTRICTED], ids=["full", "restricted"])
@pytest.mark.parametrize("where", ["host", "step"])
def test_uniform_draws_are_uniform_over_all_cells(space: Space, where: str) -> None:
    number = 6000
    if where == "host":
        rng = np.random.default_rng(0)
        drawn = np.stack([cells.random(rng, space) for _ in range(number)])
    else:
        keys = jax.random.split(jax.random.key(0), number)
        drawn = np.asarray(jax.jit(jax.vmap(lambda key: cells.uniform(key, space)))(keys))
    assert drawn.dtype == np.int32
    for i, kind in enumerate(CELL_TYPES):
        every, found = every_cell(space, kind), frequencies(drawn, i)
        assert set(found) <= set(every)
        if space is SPACE:  # inputs are drawn first, so cells of edges with more operations are rarer each
            p = 1 / len(every)
            assert all(abs(found[c] / number - p) < 5 * math.sqrt(p / number) for c in every), kind
        else:
            assert len(found) > 0.9 * len(every) or len(every) > 100
    assert not np.array_equal(drawn[:, 0], drawn[:, 1])


def test_draws_from_logits_have_the_probabilities_of_the_policy() -> None:
    edges, ops = logits_of(0)
    number, keys = 20_000, jax.random.split(jax.random.key(0), 20_000)
    given = jnp.asarray(edges, jnp.float32), jnp.asarray(ops, jnp.float32)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: cells.draw(key, *given, SPACE)))(keys))
    rng, policy = np.random.default_rng(1), {"edges": edges, "ops": ops}
    on_host = np.stack([enas.drawn(rng, policy, SPACE)[0] for _ in range(5000)])
    every = every_cell(SPACE, "normal")
    both = every_cell(SPACE, "reduce")[0]
    rest = probability_of(np.array([every[0], both]), edges, ops) / sum(
        probability_of(np.array([c, both]), edges, ops) for c in every
    )
    assert 0 < rest < 1
    for choices, n in ((drawn, number), (on_host, 5000)):
        found = frequencies(choices, 0)
        of_reduce = sum(probability_of(np.array([every[0], c]), edges, ops) for c in every_cell(SPACE, "reduce"))
        for cell in every:
            # The probability of the normal cell alone: that of both, summed over the reduction cells.
            p = probability_of(np.array([cell, both]), edges, ops) / probability_of(
                np.array([every[0], both]), edges, ops
            )
            p *= of_reduce
            assert abs(found[cell] / n - p) < 5 * math.sqrt(p / n) + 1e-3, cell


def test_gates_execute_what_is_chosen_and_tables_give_it_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        choice = cells.random(rng, RESTRICTED)
        for made in (cells.gates(choice, RESTRICTED), cells.gates(jnp.asarray(choice), RESTRICTED)):
            np.testing.assert_array_equal(cells.of_table(made.ops), choice)
            for i, kind in enumerate(CELL_TYPES):
                np.testing.assert_array_equal(np.asarray(made.executed[kind])[:, 0], choice[i])
                assert np.asarray(made.ops[kind]).sum() == (choice[i] < RESTRICTED.num_ops).sum()


def test_a_mutation_changes_one_operation_or_one_input() -> None:
    rng, kinds, reached = np.random.default_rng(0), Counter[str](), set[bytes]()
    choice = cells.random(rng, SPACE)
    valid = {(*a, *b) for a in every_cell(SPACE, "normal") for b in every_cell(SPACE, "reduce")}
    for _ in range(4000):
        new = cells.mutated(rng, choice, SPACE)
        assert (*new[0].tolist(), *new[1].tolist()) in valid
        changed = np.argwhere(new != choice)
        reached.add(new.tobytes())
        if not len(changed):
            kinds["identity"] += 1
        elif len(changed) == 1:
            kinds["operation"] += 1
        else:
            (a, e), (b, f) = changed
            assert a == b and SPACE.edges[e][1] == SPACE.edges[f][1], "an input of one node gives way to another"
            assert {int(choice[a, e]), int(choice[a, f])} == {int(new[a, e]), int(new[a, f])}, (
                "the operation goes along"
            )
            kinds["input"] += 1
    assert kinds["identity"] / 4000 == pytest.approx(0.05, abs=0.02)
    assert kinds["input"] / kinds["operation"] == pytest.approx(1, abs=0.15)
    # 8 pairs have one other operation; the second node of each type has one free input, for either of its pairs.
    assert len(reached) == 1 + 8 + 2 * 2


@pytest.mark.parametrize("identity", [0.0, 0.9])
def test_mutations_of_a_restricted_space_stay_in_it(identity: float) -> None:
    rng = np.random.default_rng(0)
    every = [set(every_cell(RESTRICTED, kind)) for kind in CELL_TYPES]
    choice, same = cells.random(rng, RESTRICTED), 0
    for _ in range(300):
        new = cells.mutated(rng, choice, RESTRICTED, identity=identity)
        assert all(tuple(new[i].tolist()) in every[i] for i in range(2))
        same += np.array_equal(new, choice)
        choice = new
    assert same / 300 == pytest.approx(identity, abs=0.06)
