"""Transforms: what each adds, against loops in numpy; order, idempotence, and their texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_cases

from prdarts_jax.bilevel import Loss, Losses, Optimizers, SearchState
from prdarts_jax.data.batches import Batch
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.network.counts import pair_costs, profile
from prdarts_jax.space.derive import derive_pairs
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import composition, get, registry
from prdarts_jax.strategies.composition import transformed
from prdarts_jax.strategies.stability import dominant_eigenvalue
from prdarts_jax.strategy import Continue, Rollback, Stop, Strategy, View

SPACE = Space(nodes=2, cells=3, channels=4, classes=10, in_channels=1)
METHODS = ("prdarts", "darts")
NUMBERS = {"tau": 1.0, "lambda1": 0.01, "lambda2": 0.01, "lambda3": 0.01, "gate_dropout": 0.0, "perturbation": 0.2}
KEY = jax.random.key(5)


def _view(strategy: Strategy, arch: Any, memory: Any = None, **changes: Any) -> View:
    view = View(0, 10, arch, strategy.memory if memory is None else memory, {}, NUMBERS, strategy.derive(arch), None)
    return view._replace(**changes)


def _skips(number: int, strategy: Strategy) -> Any:
    """An architecture of DARTS whose derived normal cell has so many skip connections."""
    arch = {kind: np.zeros((SPACE.num_edges, SPACE.num_ops), np.float32) for kind in CELL_TYPES}
    arch["normal"][:, SPACE.ops.index("sep_conv_3x3")] = 1.0
    arch["normal"][:number, SPACE.ops.index("skip_connect")] = 2.0
    return arch


# --- each of them -----------------------------------------------------------------------------------------------------


def test_frozen_counts_epochs_or_a_share() -> None:
    base = get("darts", space=SPACE)
    on = [transformed(base, ["frozen"]).schedule(epoch, 50)["arch_on"] for epoch in range(50)]
    assert on == [0.0] * 15 + [1.0] * 35, "PC-DARTS: 15 of 50"
    assert [transformed(base, ["frozen:epochs=3"]).schedule(e, 50)["arch_on"] for e in (2, 3)] == [0.0, 1.0]
    both = transformed(base, ["frozen:epochs=3", "frozen:epochs=5"])
    assert [both.schedule(epoch, 50)["arch_on"] for epoch in (3, 4, 5)] == [0.0, 0.0, 1.0]
    with pytest.raises(UserError, match=r"frozen.epochs: 50 is not possible; allowed: 0..49"):
        transformed(base, ["frozen:epochs=50"]).schedule(0, 50)


@pytest.mark.parametrize("method", METHODS)
def test_edge_weights_by_a_loop(method: str) -> None:
    base, strategy = get(method, space=SPACE), transformed(get(method, space=SPACE), ["edge_weights:init_scale=1"])
    arch = strategy.init(jax.random.key(0))
    gates = strategy.sample(KEY, arch, (), NUMBERS, "weights")
    plain = base.sample(KEY, arch["base"], (), NUMBERS, "weights")
    scores = strategy.scores(arch)
    for kind in CELL_TYPES:
        b = np.asarray(arch["edges"][kind], np.float64)
        for e, (_, node) in enumerate(SPACE.edges):
            into = [i for i, (_, other) in enumerate(SPACE.edges) if other == node]
            share = np.exp(b[e]) / np.exp(b[into]).sum()
            assert float(gates.edges[kind][e]) == pytest.approx(share, rel=1e-5)
            np.testing.assert_allclose(
                scores[kind][e], share * np.asarray(base.scores(arch["base"])[kind][e]), rtol=1e-5
            )
        np.testing.assert_array_equal(gates.ops[kind], plain.ops[kind])
    twice = transformed(base, ["edge_weights", "edge_weights"])
    gates = twice.sample(KEY, twice.init(jax.random.key(0)), (), NUMBERS, "eval")
    assert bool(jnp.isfinite(gates.edges["normal"]).all())


def test_stop_at_skips() -> None:
    base = get("darts", space=SPACE)
    strategy = transformed(base, ["stop_at_skips:skips=2,from_epoch=3"])
    for skips, epoch, stops in ((1, 5, False), (2, 5, True), (3, 3, True), (3, 2, False)):
        event = strategy.at_epoch(_view(strategy, _skips(skips, base), epoch=epoch))
        assert isinstance(event, Stop) is stops, (skips, epoch)
    assert event is None


@pytest.mark.parametrize("most", [0, 1, 2])
def test_at_most_skips_by_the_rule_of_p_darts(most: int) -> None:
    """Skips are taken away one by one, the weakest first, and the edges are chosen again."""
    base = get("darts", space=Space())
    strategy = transformed(base, [f"at_most_skips:skips={most}"])
    rng = np.random.default_rng(most)
    for _ in range(5):
        scores = {kind: rng.uniform(size=(14, 8)) for kind in CELL_TYPES}
        scores["normal"][:, 3] += 0.5
        table = scores["normal"].copy()
        while (cell := derive_pairs({**scores, "normal": table}, Space())).skips("normal") > most:
            chosen = [
                (table[Space().edges.index((j, n)), 3], Space().edges.index((j, n)))
                for n, pairs in enumerate(cell.normal, start=2)
                for op, j in pairs
                if op == "skip_connect"
            ]
            table[min(chosen)[1], 3] = 0.0
        assert strategy.select(scores) == cell
        assert strategy.select(scores).reduce == base.select(scores).reduce
    again = transformed(strategy, [f"at_most_skips:skips={most}"])
    assert again.select(scores) == strategy.select(scores)


def test_at_most_skips_where_nothing_else_is_allowed() -> None:
    """It ends, with the skips that there have to be."""
    only = tuple(tuple(("skip_connect",) for _ in SPACE.edges) for _ in CELL_TYPES)
    strategy = transformed(get("darts", space=dataclasses.replace(SPACE, edge_ops=only)), ["at_most_skips:skips=0"])
    assert strategy.derive(strategy.init(KEY)).skips("normal") == 4


def test_perturbed_at_random_stays_in_its_box_and_keeps_sums() -> None:
    base, strategy = get("darts", space=SPACE), transformed(get("darts", space=SPACE), ["perturbed"])
    arch = base.init(jax.random.key(0))
    plain = base.sample(KEY, arch, (), NUMBERS, "weights")
    e, p = 0.05, 1 / 8  # a box that 0 does not cut, around equal gates
    numbers = {**NUMBERS, "perturbation": e}
    drawn = [strategy.sample(jax.random.key(i), arch, (), numbers, "weights") for i in range(200)]
    for kind in CELL_TYPES:
        tables = np.stack([np.asarray(gates.ops[kind]) for gates in drawn])
        np.testing.assert_allclose(tables.sum(axis=2), 1.0, rtol=1e-5)
        # The ends of the box over the least and the largest sum that the others can have; most of it is reached.
        least, most = (p - e) / (p - e + 7 * (p + e)), (p + e) / (p + e + 7 * (p - e))
        assert least * 0.99 < tables.min() < 0.08 and 0.19 < tables.max() < most * 1.01
        np.testing.assert_allclose(tables.mean(axis=(0, 1)), p, atol=0.003)
    for role in ("arch", "eval"):
        same = strategy.sample(KEY, arch, (), NUMBERS, role)
        np.testing.assert_array_equal(same.ops["normal"], base.sample(KEY, arch, (), NUMBERS, role).ops["normal"])
    still = strategy.sample(KEY, arch, (), {**NUMBERS, "perturbation": 0.0}, "weights")
    np.testing.assert_allclose(still.ops["normal"], plain.ops["normal"], rtol=1e-6)


def test_perturbed_by_an_adversary_goes_to_the_corner() -> None:
    """For a loss that is linear in the gates the worst point of the box is known: each entry at its own end."""
    slope = np.random.default_rng(0).normal(size=(SPACE.num_edges, SPACE.num_ops)).astype(np.float32)
    base = get("darts", space=SPACE)
    strategy = transformed(base, ["perturbed:mode=adversarial"])

    def network(weights: Any, gates: Gates, batch: Any, key: Any, numbers: Any) -> Any:
        return weights["w"] * jnp.sum(gates.ops["normal"] * slope), jnp.zeros(())

    def gates_of(weights: Any, arch: Any, memory: Any, batch: Any, key: Any, numbers: Any) -> Gates:
        return base.sample(key, arch, memory, numbers, "weights")

    loss = Loss(gates_of, network)
    seen: list[Losses] = []

    def rule(losses: Losses, optimizers: Any) -> Any:
        seen.append(losses)
        return lambda *_: None

    transformed(base._replace(rule=rule), ["perturbed:mode=adversarial"]).rule(Losses(loss, loss, loss, loss), None)
    arch = base.init(jax.random.key(0))
    point = ({"w": jnp.float32(1.0)}, arch, (), Batch(jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)), KEY, NUMBERS)
    found = np.asarray(seen[0].weight.gates(*point).ops["normal"])
    p = np.asarray(base.sample(KEY, arch, (), NUMBERS, "weights").ops["normal"])
    # The gradient in the raw shift is that of the renormalised gates: the sign of slope - its mean under the gates.
    assert (found * slope).sum() > (p * slope).sum() + 0.1
    random = transformed(base, ["perturbed"])
    others = [
        np.asarray(random.sample(jax.random.key(i), arch, (), NUMBERS, "weights").ops["normal"]) for i in range(50)
    ]
    assert (found * slope).sum() > max((other * slope).sum() for other in others)
    assert seen[0].full is loss and strategy.schedule(9, 10)["perturbation"] == pytest.approx(0.3)
    gradient = jax.grad(lambda w: seen[0].weight({"w": w}, *point[1:]))(jnp.float32(1.0))
    assert float(gradient) == pytest.approx((found * slope).sum(), rel=1e-4), "the adversary is a constant"
    np.testing.assert_array_equal(seen[0].twice.gates(*point).ops["normal"], found)


# --- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["macs", "params"])
def test_pair_costs_add_up_to_the_profile(what: str) -> None:
    """Against the counts of whole networks, for published cells and random ones."""
    space, rng = Space(), np.random.default_rng(0)
    costs = pair_costs(space, what)
    scores = {kind: rng.uniform(size=(14, 8)) for kind in CELL_TYPES}
    for genotype in (Genotype.named("PRDARTS"), Genotype.named("DARTS_V2"), derive_pairs(scores, space)):
        assert costs.of(genotype, space) == getattr(profile(genotype), what)
    small = pair_costs(space, what, channels=16, cells=8)
    assert small.of(Genotype.named("PRDARTS"), space) == getattr(
        profile(Genotype.named("PRDARTS"), channels=16, cells=8), what
    )
    wide = pair_costs(space, what, channels=48, cells=14, classes=1000, image=224, stem="imagenet")
    assert wide.of(Genotype.named("DARTS_V2"), space) == getattr(profile(Genotype.named("DARTS_V2"), "imagenet"), what)


@pytest.mark.parametrize("method", METHODS)
def test_the_multiplier_follows_the_derived_network(method: str) -> None:
    base = get(method, space=SPACE)
    text = "cost:macs=500K,cells=5,channels=8,image=8,scale=2"
    strategy = transformed(base, [text])
    arch = strategy.init(jax.random.key(0))
    costs = pair_costs(SPACE, "macs", cells=5, channels=8, image=8)
    above = costs.of(strategy.derive(arch), SPACE) / 5e5 - 1
    event = strategy.at_epoch(_view(strategy, arch))
    assert isinstance(event, Continue) and above != 0
    assert float(event.memory[1]) == pytest.approx(max(0.0, 2 * above), rel=1e-5)
    event = strategy.at_epoch(_view(strategy, arch, ((), np.float32(5.0))))
    assert float(event.memory[1]) == pytest.approx(max(0.0, 5 + 2 * above), rel=1e-5)

    gates = strategy.sample(KEY, arch, strategy.memory, NUMBERS, "arch")
    value, terms = strategy.objective(jnp.float32(1.0), arch, gates, ((), jnp.float32(3.0)), NUMBERS)
    plain, _ = base.objective(jnp.float32(1.0), arch, gates, (), NUMBERS)
    expected = costs.fixed / 5e5
    for kind, p in base.probabilities(arch, NUMBERS).items():
        p = np.asarray(p, np.float64) * (~SPACE.group("none"))[None]
        for node in (2, 3):
            rows = [e for e, (_, n) in enumerate(SPACE.edges) if n == node]
            expected += (2 * p[rows] / p[rows].sum() * costs.pairs[kind][rows]).sum() / 5e5
    assert float(terms["cost"]) == pytest.approx(3 * expected, rel=1e-4)
    assert float(value) == pytest.approx(float(plain) + 3 * expected, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "exactly one of the two"),
        ("macs=1M,params=1M", "exactly one of the two"),
        ("macs=much", "a number > 0, with K, M or G"),
        ("macs=1", "the cheapest cell at this size"),
        ("macs=600M,cells=2", "cells: 2 is too few"),
        ("macs=600M,stem=mnist", "unknown value 'mnist'"),
    ],
)
def test_impossible_budgets(options: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        transformed(get("darts", space=SPACE), [f"cost:{options}" if options else "cost"])
    assert said in str(raised.value)


# --- curvature and perturbation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 40])
def test_lanczos_finds_the_eigenvalue_of_largest_modulus(size: int) -> None:
    rng = np.random.default_rng(size)
    vectors = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.append(rng.uniform(-1, 1, size - 1), -3.0)
    matrix = vectors @ np.diag(values) @ vectors.T
    found = dominant_eigenvalue(lambda v: matrix @ v, size, iterations=12)
    assert found == pytest.approx(np.linalg.eigvalsh(matrix)[0], rel=1e-5)


def test_hessian_stop_returns_the_earlier_cell() -> None:
    """Eigenvalues 1, 1, 1, 2, 2, 2 in windows of 3: the means rise by more than 1.3 with two of the new."""
    base = get("darts", space=SPACE)
    strategy = transformed(base, ["hessian_stop:window=3,delta=2,every=2,from_epoch=0,iterations=2,weight_decay=0"])
    curvature, memory, event, archs = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], strategy.memory, None, []
    for epoch in range(12):
        arch = _skips(epoch % 4, base)
        archs.append(arch)
        asked: list[int] = []

        def hvp(at: Any, vector: Any, now: float = curvature[epoch // 2], asked: list[int] = asked, **_: Any) -> Any:
            asked.append(1)
            return jax.tree.map(lambda v: np.float32(now) * v, vector)

        event = strategy.at_epoch(_view(strategy, arch, memory, epoch=epoch, probe=SimpleNamespace(hvp=hvp)))
        assert bool(asked) is (epoch % 2 == 1)
        if isinstance(event, Stop):
            break
        memory = event.memory if isinstance(event, Continue) else memory
    # Measurements are made in epochs 1, 3, 5, 7, 9, 11. Means: (1, 1, 4/3, 5/3): after epoch 9 5/3 against 1.
    assert isinstance(event, Stop) and epoch == 9
    assert event.genotype == base.derive(archs[3]) and "epoch 4" in event.reason


def test_no_step_back_goes_behind_the_one_before_it() -> None:
    """Where eigenvalues rise without an end, each return is to an epoch whose checkpoint is still there."""
    base = get("darts", space=SPACE)
    text = "hessian_rollback:window=3,delta=2,every=1,from_epoch=0,iterations=1,threshold=1.0001,weight_decay=0,most=9"
    strategy, arch = transformed(base, [text]), _skips(0, base)
    kept, epoch, decay, returns = {-1: strategy.memory}, 0, 1e-3, []
    for measured in range(1, 60):

        def hvp(at: Any, vector: Any, now: float = 2.0 ** max(measured - 20, 0), **_: Any) -> Any:
            return jax.tree.map(lambda v: np.float32(now) * v, vector)

        now = {"weights.weight_decay": decay}
        view = _view(strategy, arch, kept[epoch - 1], epoch=epoch, probe=SimpleNamespace(hvp=hvp), hyperparameters=now)
        event = strategy.at_epoch(view._replace(epochs=1000))
        if isinstance(event, Rollback):
            assert event.epoch in kept and epoch - event.epoch <= strategy.horizon
            epoch, decay = event.epoch, event.hyperparameters["weights.weight_decay"]
            kept = {e: memory for e, memory in kept.items() if e <= epoch}
            returns.append(epoch)
        else:
            kept[epoch] = event.memory
            kept = {e: memory for e, memory in kept.items() if e >= epoch - strategy.horizon}
        epoch += 1
    assert len(returns) == 4 and returns == sorted(returns)


def test_an_early_cell_is_derived_by_the_whole() -> None:
    """at_most_skips around hessian_stop: the earlier architecture has three skips, the cell one."""
    base = get("darts", space=SPACE)
    text = "hessian_stop:window=1,delta=1,every=1,from_epoch=0,iterations=1,weight_decay=0"
    strategy = transformed(base, [text, "at_most_skips:skips=1"])
    memory, event = strategy.memory, None
    for epoch, curvature in enumerate((1.0, 9.0)):

        def hvp(at: Any, vector: Any, now: float = curvature, **_: Any) -> Any:
            return jax.tree.map(lambda v: np.float32(now) * v, vector)

        view = _view(strategy, _skips(3, base), memory, epoch=epoch, probe=SimpleNamespace(hvp=hvp))
        event = strategy.at_epoch(view._replace(derive=strategy.derive))
        memory = event.memory if isinstance(event, Continue) else memory
    assert isinstance(event, Stop) and event.genotype.skips("normal") == 1
    assert base.derive(_skips(3, base)).skips("normal") > 1


def test_selection_by_perturbation_keeps_what_hurts() -> None:
    """An accuracy that is a known table of the gates: the best cell is known, and found."""
    base, rng = get("darts", space=SPACE), np.random.default_rng(1)
    worth = {kind: rng.uniform(size=(SPACE.num_edges, SPACE.num_ops)) for kind in CELL_TYPES}

    def accuracy(gates: Gates, batches: Any = None) -> float:
        return float(sum((worth[k] * (np.asarray(gates.ops[k]) > 0)).sum() for k in CELL_TYPES))

    strategy = transformed(base, ["select_by_perturbation"])
    arch = base.init(jax.random.key(0))
    view = _view(strategy, arch, epoch=9, probe=SimpleNamespace(gates_accuracy=accuracy))
    assert strategy.at_epoch(view._replace(epoch=8)) is None
    event = strategy.at_epoch(view)
    assert isinstance(event, Stop)
    usable = {k: np.where(SPACE.group("none")[None], -1, worth[k]) for k in CELL_TYPES}
    assert event.genotype == _sorted(derive_pairs(usable, SPACE))


def _sorted(genotype: Genotype) -> Genotype:
    cells = [
        tuple(tuple(sorted(pairs, key=lambda pair: pair[1])) for pairs in cell)
        for cell in (genotype.normal, genotype.reduce)
    ]
    return Genotype(cells[0], genotype.normal_concat, cells[1], genotype.reduce_concat)


def test_selection_with_tuning_decides_an_edge_at_a_time() -> None:
    space = Space(nodes=1, ops=("skip_connect", "sep_conv_3x3"))
    strategy = transformed(get("darts", space=space), ["select_by_perturbation:tuning=2"])
    arch, memory, decided, event = strategy.init(KEY), strategy.memory, [], None
    for epoch in range(10):
        numbers = strategy.schedule(epoch, 10)
        assert numbers["arch_on"] == float(epoch < 2)
        probe = SimpleNamespace(gates_accuracy=lambda gates, batches=None: float(gates.ops["normal"][:, 0].sum()))
        event = strategy.at_epoch(_view(strategy, arch, memory, epoch=epoch, epochs=10, probe=probe))
        memory = event.memory if isinstance(event, Continue) else memory
        decided.append(int(sum((memory[1][kind].sum(axis=1) == 1).sum() for kind in CELL_TYPES)))
    assert decided == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert isinstance(event, Stop) and all(op == "skip_connect" for op, _ in event.genotype.normal[0])
    with pytest.raises(UserError, match=r"select_by_perturbation.tuning: 2 is not possible; allowed: at most 1 in 8"):
        strategy.schedule(0, 8)


# --- composition ------------------------------------------------------------------------------------------------------


def test_the_order_of_transforms() -> None:
    """The first one is innermost: at_most_skips inside edge_weights chooses by weighted scores all the same."""
    base = get("darts", space=SPACE)
    pair = ["at_most_skips:skips=1", "edge_weights:init_scale=2"]
    one, other = transformed(base, pair), transformed(base, pair[::-1])
    for seed in range(5):
        arch = one.init(jax.random.key(seed))
        arch["base"] = _skips(5, base)
        assert one.derive(arch) == other.derive(arch)
        assert one.derive(arch).skips("normal") <= 1
    memory = transformed(base, ["cost:macs=600M", "hessian_stop"]).memory
    assert np.shape(memory[0][1]) == () and set(memory[1]) == {"count", "eigenvalues", "epochs", "decay", "arch"}


def test_events_of_inner_and_outer_transforms_meet() -> None:
    """Both memories move at once; a Stop of the inner one stays one."""
    base = get("darts", space=SPACE)
    two = transformed(base, ["cost:macs=500K,cells=5,channels=8,image=8", "select_by_perturbation:tuning=1"])
    arch = _skips(3, base)
    probe = SimpleNamespace(gates_accuracy=lambda gates, batches=None: 0.5)
    view = _view(two, arch, (((), np.float32(5.0)), two.memory[1]), probe=probe)
    edges = 2 * SPACE.num_edges
    event = two.at_epoch(view._replace(epoch=0, epochs=edges + 1))
    assert isinstance(event, Continue)
    assert 0 < float(event.memory[0][1]) != 5.0
    assert sum(int((event.memory[1][kind].sum(axis=1) == 1).sum()) for kind in CELL_TYPES) == 1
    stops = transformed(base, ["stop_at_skips:skips=2", "cost:macs=500K,cells=5,channels=8,image=8"])
    assert isinstance(stops.at_epoch(_view(stops, arch, ((), np.float32(0)))), Stop)


def test_a_rule_keeps_the_memory_of_an_outer_transform() -> None:
    """A method whose rule counts in its memory does so inside a transform with a memory of its own."""
    base = get("darts", space=SPACE)

    def rule(losses: Losses, optimizers: Any) -> Any:
        def step(state: SearchState, batches: Any, key: Any, numbers: Any) -> Any:
            value = losses.full(state.weights, state.arch, state.memory, None, key, numbers)
            return dataclasses.replace(state, memory=state.memory + 1), {"value": value}

        return step

    method = base._replace(rule=rule, memory=np.float32(0), objective=lambda ce, arch, g, memory, n: (ce + memory, {}))
    strategy = transformed(method, ["cost:macs=500K,cells=5,channels=8,image=8"])
    loss = Loss(lambda *_: Gates({}, {}), lambda *_: (jnp.float32(0), jnp.float32(0)), strategy.objective)
    arch = base.init(KEY)
    state = SearchState(jnp.int32(0), {}, arch, (), (), (jnp.float32(5), jnp.float32(2)))
    state, metrics = strategy.rule(Losses(loss, loss, loss, loss), Optimizers(None, None))(state, None, KEY, NUMBERS)
    assert [float(m) for m in state.memory] == [6.0, 2.0]
    _, terms = strategy.objective(jnp.float32(0), arch, Gates({}, {}), (jnp.float32(5), jnp.float32(2)), NUMBERS)
    assert float(metrics["value"]) == pytest.approx(5 + float(terms["cost"]))


@pytest.mark.parametrize("method", [row.name for row in registry.rows()])
@pytest.mark.parametrize("name", composition.TRANSFORMS)
def test_every_transform_of_every_method_is_a_strategy(method: str, name: str) -> None:
    text = f"{name}:macs=500K,cells=5,channels=8,image=8" if name == "cost" else name
    if registry.row(method).competes == "whole cells" and name not in ("stop_at_skips", "at_most_skips"):
        with pytest.raises(UserError, match=f"{name} needs an architecture that gradients move"):
            transformed(get(method, space=SPACE), [text])
        return
    strategy = transformed(get(method, space=SPACE), [text])
    arch, numbers = strategy.init(KEY), {k: jnp.float32(v) for k, v in strategy.schedule(3, 12).items()}
    for role in ("weights", "arch", "eval"):
        gates = strategy.sample(KEY, arch, strategy.memory, numbers, role)
        value, _ = strategy.objective(jnp.float32(1), arch, gates, strategy.memory, numbers)
        assert gates.ops["normal"].shape[-2:] == (SPACE.num_edges, SPACE.num_ops) and bool(jnp.isfinite(value))
    one, other = (strategy.sample(jax.random.key(i), arch, strategy.memory, numbers, "eval") for i in (0, 1))
    assert all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))
    assert isinstance(strategy.derive(arch), Genotype)
    assert strategy.schedule(0, 12).keys() == strategy.schedule(11, 12).keys()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("frozne", "unknown value 'frozne'; did you mean 'frozen'?"),
        ("frozen:epoch=3", "method.transforms.frozen: unknown value 'epoch'; did you mean 'epochs'?"),
        ("frozen:epochs", "allowed: NAME:option=value,option=value"),
        ("frozen:epochs=1,epochs=2", "gives 'epochs' twice"),
        ("frozen:epochs=many", "method.transforms.frozen.epochs: 'many' is not possible; allowed: a number | none"),
        ("stop_at_skips:skips=1.5", "method.transforms.stop_at_skips.skips: '1.5' is not possible"),
        ("perturbed:mode=wild", "method.transforms.perturbed.mode: unknown value 'wild'"),
    ],
)
def test_a_mistake_in_a_text_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "--preset", "digits", "--with", text, "--workdir", str(tmp_path / "w")]
    search_cases.one_error(capsys, command, 2, said)
    assert not (tmp_path / "w").exists()


def test_transforms_are_kept_in_the_config_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    from prdarts_jax import cli

    words = ["--with", "cost:macs=5M,cells=5,channels=8,image=8", "--with=edge_weights"]
    assert cli.main(["search", "--preset", "digits", *words, "--print-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["method.transforms"]
    assert shown == {"value": ["cost:macs=5M,cells=5,channels=8,image=8", "edge_weights"], "source": "flag"}
