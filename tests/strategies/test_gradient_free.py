"""Searches without gradients: the policy gradient, growing cells, ageing, champions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import search_cases
from choices import SPACE, every_cell, logits_of, probability_of

from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import cells, composition, enas, get, pnas, transforms
from prdarts_jax.strategies.perturbation import select_by_perturbation
from prdarts_jax.strategy import Continue, Strategy, View

NAMES = ("random", "evolution", "enas", "pnas")

# --- the rounds -------------------------------------------------------------------------------------------------------


class _Judge:
    """A probe with a worth of its own for each cell, and a log of what it was asked."""

    def __init__(self, worth: Callable[[np.ndarray], float]) -> None:
        self.worth, self.log = worth, list[tuple[np.ndarray, float, int | None, int]]()

    def gates_accuracy(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        choice = cells.of_table(gates.ops)
        self.log.append((choice, self.worth(choice), batches, first))
        return self.log[-1][1]


def _hashed(choice: np.ndarray) -> float:
    """A worth that says nothing of similar cells."""
    return float(np.random.default_rng(list(choice.tobytes())).random())


def _linear(choice: np.ndarray) -> float:
    """A sum over the operations of edges."""
    table = np.random.default_rng(7).normal(size=(*choice.shape, SPACE.num_ops + 1))
    table[..., -1] = 0.0
    return float(np.take_along_axis(table, choice[..., None], axis=2).sum())


def _view(strategy: Strategy, arch: Any, memory: Any, judge: _Judge, epoch: int, epochs: int, seed: int = 0) -> View:
    return View(epoch, epochs, arch, memory, {}, {}, strategy.derive(arch), judge, seed=(seed, epoch))


def _rounds(strategy: Strategy, judge: _Judge, epochs: int) -> list[tuple[Any, Any, int]]:
    """(architecture, memory, cells judged so far) after each epoch that has a round."""
    arch, memory, after = jax.device_get(strategy.init(jax.random.key(0))), strategy.memory, []
    for epoch in range(epochs):
        event = strategy.at_epoch(_view(strategy, arch, memory, judge, epoch, epochs))
        if event is not None:
            assert isinstance(event, Continue)
            arch, memory = event.arch, event.memory
            after.append((arch, memory, len(judge.log)))
    return after


_FEW: dict[str, dict[str, Any]] = {
    "random": {"cells": 3},
    "evolution": {"cells": 4, "population": 6, "tournament": 3},
    "enas": {"policy_steps": 2, "aggregate": 3, "samples": 2, "warm_up": 0.5},
    "pnas": {"cells": 5, "beam": 3, "warm_up": 0.5},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_view_gives_the_same_event(name: str) -> None:
    strategy = get(name, space=SPACE, **_FEW[name])
    arch, memory, _ = _rounds(strategy, _Judge(_hashed), 6)[0]
    events = [strategy.at_epoch(_view(strategy, arch, memory, _Judge(_hashed), 4, 6, seed)) for seed in (0, 0, 1)]
    assert all(isinstance(event, Continue) for event in events)
    same, other = (
        all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((events[0], events[1]), (events[0], events[2]))
    )
    assert same and (name == "pnas" or not other)


@pytest.mark.parametrize("name", NAMES)
def test_rounds_begin_after_the_warm_up_and_shapes_stay(name: str) -> None:
    strategy = get(name, space=SPACE, **{**_FEW[name], "warm_up": 0.5})
    after = _rounds(strategy, _Judge(_hashed), 5)
    assert len(after) == 3  # the last of 5 epochs, from int(2.5) on
    for arch, memory, _ in after:
        for found, first in ((arch, strategy.init(jax.random.key(0))), (memory, strategy.memory)):
            assert jax.tree.structure(found) == jax.tree.structure(first)
            for a, b in zip(*map(jax.tree.leaves, (found, first)), strict=True):
                assert np.shape(a) == np.shape(b) and np.asarray(a).dtype == np.asarray(b).dtype
        assert all(np.all((p >= 0) & (p <= 1)) for p in arch["p"].values())


@pytest.mark.parametrize("name", NAMES)
def test_the_champion_is_the_best_at_the_weights_of_now(name: str) -> None:
    """The worths change between rounds, as those of a network do; the champion of before competes at those of now."""
    strategy = get(name, space=SPACE, **{**_FEW[name], "warm_up": 0.0})
    arch, memory, champion = jax.device_get(strategy.init(jax.random.key(0))), strategy.memory, None
    for epoch in range(8):
        judge = _Judge(lambda choice, epoch=epoch: _hashed(np.concatenate([choice, [[epoch] * SPACE.num_edges]])))
        event = strategy.at_epoch(_view(strategy, arch, memory, judge, epoch, 8))
        assert isinstance(event, Continue)
        arch, memory = event.arch, event.memory
        whole = {row.tobytes(): worth for row, worth, batches, _ in judge.log if batches is None and _is_whole(row)}
        if champion is not None:
            assert champion.tobytes() in whole, "it is judged again"
        found = cells.of_table(arch["best"])
        if whole and _is_whole(found):
            assert whole[found.tobytes()] == max(whole.values())
            champion = found
            genotype = strategy.derive(arch)
            pairs = [(e, int(found[0, e])) for e in range(SPACE.num_edges) if found[0, e] < SPACE.num_ops]
            expected = {(SPACE.edges[e][1], SPACE.ops[o], SPACE.edges[e][0]) for e, o in pairs}
            assert {(n, op, j) for n, node in enumerate(genotype.normal, 2) for op, j in node} == expected
            gates = strategy.sample(jax.random.key(0), jax.tree.map(jnp.asarray, arch), memory, {}, "eval")
            np.testing.assert_array_equal(cells.of_table(gates.ops), found)
    assert champion is not None


def _is_whole(choice: np.ndarray) -> bool:
    return tuple(choice[0].tolist()) in _WHOLE[0] and tuple(choice[1].tolist()) in _WHOLE[1]


_WHOLE = [set(every_cell(SPACE, kind)) for kind in CELL_TYPES]


def test_evolution_is_a_queue_of_children_of_the_best_of_a_tournament() -> None:
    """Against the births that the probe saw: the oldest dies, and with a tournament of many the best is the parent."""
    strategy = get("evolution", space=SPACE, population=6, tournament=200, cells=4, identity=0.0, warm_up=0.0)
    judge = _Judge(_hashed)
    after, births = _rounds(strategy, judge, 6), list[tuple[np.ndarray, float]]()
    begin = 0
    for number, (arch, memory, end) in enumerate(after):
        asked = [(row, worth) for row, worth, _, _ in judge.log[begin:end]]
        births += asked[:4]  # then the champion is judged again
        assert len(asked) == 4 + (number > 0)
        begin = end
        living = births[-6:]
        kept = Counter(row.tobytes() for row in memory["cells"][: len(living)])
        assert kept == Counter(row.tobytes() for row, _ in living) and int(memory["count"]) == len(births)
        share = np.mean([cells.gates(row, SPACE).ops["normal"] for row, _ in living], axis=0)
        np.testing.assert_allclose(arch["p"]["normal"], share, atol=1e-6)
    for i in range(6, len(births)):
        parent = max(births[i - 6 : i], key=lambda born: born[1])[0]
        changed = int((births[i][0] != parent).sum())
        assert changed in (1, 2), "one mutation away from the best of the living"


# --- enas -------------------------------------------------------------------------------------------------------------


def test_the_policy_gradient_is_that_of_ln_pi() -> None:
    """Of one order of the inputs; the mean over draws of R times it is the gradient of the expected R."""
    edges, ops = logits_of(3)
    policy, rng = {"edges": edges, "ops": ops}, np.random.default_rng(0)

    def ln_pi(tables: Any, choice: np.ndarray, order: tuple[tuple[int, ...], ...]) -> Any:
        total = 0.0
        for (kind, node), inputs in zip(itertools.product(range(2), range(2, 2 + SPACE.nodes)), order, strict=True):
            left = [e for e, (_, target) in enumerate(SPACE.edges) if target == node]
            for e in inputs:
                total = total + jax.nn.log_softmax(tables["edges"][kind, jnp.array(left)])[left.index(e)]
                total = total + jax.nn.log_softmax(tables["ops"][kind, e, 1:])[choice[kind, e] - 1]
                left.remove(e)
        return total

    tables = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), policy)
    choice, slope, _ = enas.drawn(rng, policy, SPACE)
    used = [
        [e for e, (_, target) in enumerate(SPACE.edges) if target == node and choice[kind, e] < SPACE.num_ops]
        for kind, node in itertools.product(range(2), range(2, 2 + SPACE.nodes))
    ]
    slopes = [jax.grad(ln_pi)(tables, choice, order) for order in itertools.product(*map(itertools.permutations, used))]
    assert any(all(np.allclose(found[name], slope[name], atol=1e-5) for name in slope) for found in slopes), (
        "the gradient of one of the orders in which the inputs may have been drawn"
    )

    worth = {choice: rng.random() for choice in every_cell(SPACE, "normal")}
    number, total = 8_000, np.zeros_like(ops)
    for _ in range(number):
        choice, slope, _ = enas.drawn(rng, policy, SPACE)
        total += worth[tuple(choice[0].tolist())] * slope["ops"] / number

    def expected(tables: Any) -> Any:
        reduce = every_cell(SPACE, "reduce")[0]
        p = [probability_of(np.array([c, reduce]), tables["edges"], tables["ops"], jnp) for c in worth]
        return sum(a * b for a, b in zip(p, worth.values(), strict=True)) / sum(p)

    np.testing.assert_allclose(total[0], jax.grad(expected)(tables)["ops"][0], atol=0.03)


def test_the_entropy_is_that_of_what_was_drawn_from() -> None:
    zeros = {"edges": np.zeros((2, SPACE.num_edges)), "ops": np.zeros((2, SPACE.num_edges, SPACE.num_ops))}
    _, _, entropy = enas.drawn(np.random.default_rng(0), zeros, SPACE)
    of_inputs = (math.log(2) + math.log(1)) + (math.log(3) + math.log(2))
    assert entropy == pytest.approx(2 * (of_inputs + 4 * math.log(2)))


def test_the_policy_moves_as_adam_does_and_asks_for_a_new_batch_each_time() -> None:
    """One step against optax, from the rewards that the probe gave and the cells that it saw."""
    options: dict[str, Any] = {"policy_steps": 2, "aggregate": 3, "samples": 2, "learning_rate": 0.1, "entropy": 0.0}
    strategy, judge = get("enas", space=SPACE, **options), _Judge(_hashed)
    (_, memory, _), *_ = _rounds(strategy, judge, 1)
    asked = judge.log[:6]
    assert [(batches, first) for *_, batches, first in asked] == [(1, k) for k in range(6)]
    assert [batches for *_, batches, _ in judge.log[6:]] == [None, None]
    policy = jax.tree.map(lambda t: np.asarray(t, np.float64), strategy.memory["policy"])
    tx, rng, baseline = optax.adam(0.1, b1=0.0, b2=0.999, eps=1e-3), np.random.default_rng((0, 0)), None
    state = tx.init(jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), policy))
    update = jax.jit(tx.update)
    for step in range(2):
        gradient = jax.tree.map(np.zeros_like, policy)
        for k in range(3):
            choice, slope, _ = enas.drawn(rng, policy, SPACE)
            np.testing.assert_array_equal(choice, asked[3 * step + k][0])
            reward = _hashed(choice)
            baseline = reward if baseline is None else 0.99 * baseline + 0.01 * reward
            gradient = {name: gradient[name] - (reward - baseline) / 3 * slope[name] for name in gradient}
        with search_cases.standard_promotion():
            updates, state = update(jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), gradient), state)
        policy = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), policy, updates)
    assert float(memory["baseline"]) == pytest.approx(baseline) and int(memory["steps"]) == 2
    for name, table in policy.items():
        np.testing.assert_allclose(memory["policy"][name], table, atol=1e-5)


# --- pnas -------------------------------------------------------------------------------------------------------------


def _size(choice: np.ndarray) -> int:
    """Nodes with an input, which are there from the first on: normal, reduce, normal, reduce."""
    into = np.array([target for _, target in SPACE.edges])
    there = [bool((choice[kind][into == node] < SPACE.num_ops).any()) for node in (2, 3) for kind in (0, 1)]
    assert there == sorted(there, reverse=True)
    return sum(there)


def test_cells_grow_from_the_best_of_the_size_before() -> None:
    judge = _Judge(_hashed)
    strategy = get("pnas", space=SPACE, cells=5, beam=2, warm_up=0.0)
    _rounds(strategy, judge, 8)  # two rounds a size
    sizes = [_size(row) for row, *_ in judge.log]
    judged = {
        size: {row.tobytes(): (row, w) for row, w, *_ in judge.log if _size(row) == size} for size in (1, 2, 3, 4)
    }
    assert len(judged[1]) == 4, "all of the first size: two operations on two edges"
    assert sorted(set(sizes)) == [1, 2, 3, 4]
    for size in (2, 3, 4):
        best = sorted(judged[size - 1].values(), key=lambda each: -each[1])[:2]
        kind, edges = cells.blocks(SPACE)[size - 1]
        for row, _ in judged[size].values():
            parent = row.copy()
            parent[kind, list(edges)] = SPACE.num_ops
            assert any(np.array_equal(parent, each) for each, _ in best)
    whole = [row.tobytes() for row, *_ in judge.log if _size(row) == 4]
    assert len(whole) - len(set(whole)) <= 1, "no cell is judged twice but the champion"


def test_extensions_by_brute_force() -> None:
    parents = np.stack([cells.random(np.random.default_rng(seed), SPACE) for seed in (0, 1, 0)])
    into = np.array([target for _, target in SPACE.edges])
    parents[:, 1, into == 3] = SPACE.num_ops
    found = {row.tobytes() for row in pnas.extended(parents, 3, SPACE)}
    expected = set()
    for parent in parents:
        for cell in every_cell(SPACE, "reduce"):
            row = parent.copy()
            row[1, into == 3] = np.array(cell)[into == 3]
            expected.add(row.tobytes())
    assert found == expected and len(found) == len(pnas.extended(parents, 3, SPACE))


def test_the_surrogate_ranks_a_sum_over_operations() -> None:
    rng = np.random.default_rng(0)
    seen = np.stack([cells.random(rng, SPACE) for _ in range(120)])
    fresh = np.stack([cells.random(rng, SPACE) for _ in range(60)])
    worth = np.array([_linear(row) for row in seen])
    guess = pnas.predicted(rng, seen, worth, fresh, 5, SPACE)
    truth = np.array([_linear(row) for row in fresh])
    assert np.corrcoef(guess, truth)[0, 1] > 0.95
    assert np.abs(pnas.predicted(rng, seen[:1], worth[:1], fresh, 5, SPACE)).max() == 0


def test_steps_train_whole_cells_and_cells_of_the_size_of_now() -> None:
    strategy = get("pnas", space=SPACE)
    memory = {**strategy.memory, "size": np.int32(2)}
    sample = jax.jit(
        jax.vmap(lambda key: strategy.sample(key, strategy.init(key), memory, {}, "weights").executed, in_axes=0)
    )
    executed = sample(jax.random.split(jax.random.key(0), 400))
    drawn = np.stack([np.asarray(executed[kind])[..., 0] for kind in CELL_TYPES], axis=1)
    sizes = Counter(_size(row) for row in drawn)
    assert set(sizes) == {2, 4} and sizes[4] / 400 == pytest.approx(0.5, abs=0.1)


def test_an_architecture_that_an_event_sets_is_completed_by_what_is_around_the_method() -> None:
    tables = {kind: np.ones((SPACE.num_edges, SPACE.num_ops), np.float32) for kind in CELL_TYPES}
    base = get("darts", space=SPACE)._replace(at_epoch=lambda view: Continue((), tables))
    larger = transforms.edge_weights(base)
    arch = jax.device_get(larger.init(jax.random.key(0)))
    event = larger.at_epoch(_view(larger, arch, (), _Judge(_hashed), 0, 5))
    assert isinstance(event, Continue) and event.arch == {"base": tables, "edges": arch["edges"]}
    remembering = select_by_perturbation(base, tuning=1)  # which decides about the first edge after epoch 3 of 13
    arch = jax.device_get(remembering.init(jax.random.key(0)))
    event = remembering.at_epoch(_view(remembering, arch, remembering.memory, _Judge(_hashed), 3, 13))
    assert isinstance(event, Continue) and event.arch is tables
    assert not all(np.array_equal(event.memory[1][kind], remembering.memory[1][kind]) for kind in CELL_TYPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_search_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    """Stopped after every dispatch, with a stub of the network; test_methods has the real one."""
    few = {f"method__options__{option}": value for option, value in {**_FEW[name], "warm_up": 0.3}.items()}
    with search_cases.shared_programs(stub=True):
        workdir = search_cases.assert_resumes(search_cases.config_of(name, **few), tmp_path)
    assert Genotype.load(workdir).normal[0] and len(search_cases.rows(workdir, "epoch")) == search_cases.EPOCHS


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("random", {"cells": 0}, "method.options.cells: 0 is not possible; allowed: >= 1"),
        ("random", {"warm_up": 1.0}, "method.options.warm_up: 1.0 is not possible; allowed: in [0, 1)"),
        ("random", {"batches": -1}, "method.options.batches: -1 is not possible; allowed: >= 0 (0: all)"),
        ("evolution", {"population": 0}, "method.options.population: 0 is not possible; allowed: >= 1"),
        ("evolution", {"tournament": 0}, "method.options.tournament: 0 is not possible; allowed: >= 1"),
        ("evolution", {"identity": 1.0}, "method.options.identity: 1.0 is not possible; allowed: in [0, 1)"),
        ("enas", {"policy_steps": 0}, "method.options.policy_steps: 0 is not possible; allowed: >= 1"),
        ("enas", {"learning_rate": -1.0}, "method.options.learning_rate: -1.0 is not possible; allowed: a finite"),
        ("enas", {"beta1": 1.0}, "method.options.beta1: 1.0 is not possible; allowed: in [0, 1)"),
        ("enas", {"eps": 0.0}, "method.options.eps: 0.0 is not possible; allowed: > 0, finite"),
        ("enas", {"baseline_decay": -0.1}, "method.options.baseline_decay: -0.1 is not possible"),
        ("pnas", {"explore": 1.5}, "method.options.explore: 1.5 is not possible; allowed: in [0, 1]"),
        ("pnas", {"history": 10}, "method.options.history: 10 is not possible; allowed: >= cells (20)"),
        ("pnas", {"members": 0}, "method.options.members: 0 is not possible; allowed: >= 1"),
    ],
)
def test_impossible_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        get(name, space=SPACE, **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", sorted(composition.TRANSFORMS))
def test_transforms_that_need_a_gradient_are_refused(text: str) -> None:
    given = "cost:macs=1M" if text == "cost" else text
    strategy = get("evolution", space=Space())
    if text in ("stop_at_skips", "at_most_skips"):
        assert composition.transformed(strategy, [given]).rule is strategy.rule
        return
    with pytest.raises(UserError, match=r"^method\.transforms: .* allowed: stop_at_skips \| at_most_skips$") as raised:
        composition.transformed(strategy, [given])
    assert "\n" not in str(raised.value)


def test_at_most_skips_replaces_a_skip_by_what_is_used_most() -> None:
    strategy = composition.transformed(get("evolution", space=SPACE, cells=8, population=8), ["at_most_skips:skips=1"])
    arch, *_ = _rounds(strategy, _Judge(lambda choice: float((choice[0] == 1).sum())), 4)[-1]
    assert (cells.of_table(arch["best"])[0] == 1).sum() >= 3
    assert strategy.derive(arch).skips("normal") == 1
