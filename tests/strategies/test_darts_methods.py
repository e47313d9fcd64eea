"""What methods made of DARTS add to it: stages, dropout, derivation, early stops and rollbacks, by formulas."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import search_cases

from prdarts_jax.errors import UserError
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import get
from prdarts_jax.strategies.composition import transformed
from prdarts_jax.strategy import Continue, Restage, Rollback, Stop, Strategy, View

SPACE = Space()
SMALL = Space(nodes=2, cells=3, channels=4, classes=10, in_channels=1)


def _arch(seed: int, space: Space = SPACE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {kind: rng.normal(size=(space.num_edges, space.num_ops)).astype(np.float32) for kind in CELL_TYPES}


def _view(strategy: Strategy, arch: Any, epoch: int, epochs: int, **more: Any) -> View:
    memory = more.pop("memory", strategy.memory)
    return View(epoch, epochs, arch, memory, {}, {}, strategy.derive(arch), None)._replace(**more)


# --- the derived cell -------------------------------------------------------------------------------------------------


def _probabilities(alpha: np.ndarray, space: Space, kind: str) -> np.ndarray:
    e = np.exp(alpha.astype(np.float64)) * space.allowed[kind]
    return e / e.sum(axis=1, keepdims=True)


def _parse(p: np.ndarray, space: Space) -> list[set[tuple[str, int]]]:
    """As the released program of DARTS: sort the edges into a node by their best operation but `none`, keep two."""
    none, nodes, start = space.ops.index("none"), [], 0
    for n in range(2, 2 + space.nodes):
        rows = p[start : start + n].copy()
        start += n
        rows[:, none] = -1
        best = sorted(range(n), key=lambda j: -max(rows[j]))[:2]
        nodes.append({(space.ops[int(np.argmax(rows[j]))], j) for j in best})
    return nodes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["darts", "milenas", "darts+", "robust-darts"])
def test_the_derived_cell_is_that_of_the_program_of_darts(name: str, seed: int) -> None:
    strategy, arch = get(name, space=SPACE), _arch(seed)
    genotype = strategy.derive(arch)
    for kind, cell in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        assert [set(pairs) for pairs in cell] == _parse(_probabilities(arch[kind], SPACE, kind), SPACE)


@pytest.mark.parametrize("seed", range(5))
def test_the_derived_cell_of_pc_darts_has_weighted_edges(seed: int) -> None:
    strategy, arch, rng = get("pc-darts", space=SPACE), _arch(seed), np.random.default_rng(seed)
    edges = {kind: rng.normal(size=SPACE.num_edges).astype(np.float32) for kind in CELL_TYPES}
    genotype = strategy.derive({"base": arch, "edges": edges})
    for kind, cell in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        p, start = _probabilities(arch[kind], SPACE, kind), 0
        for n in range(2, 2 + SPACE.nodes):
            share = np.exp(edges[kind][start : start + n].astype(np.float64))
            p[start : start + n] *= (share / share.sum())[:, None]
            start += n
        assert [set(pairs) for pairs in cell] == _parse(p, SPACE)


def test_equal_parameters_give_the_first_edges_and_operations() -> None:
    zeros = {kind: np.zeros((SMALL.num_edges, SMALL.num_ops), np.float32) for kind in CELL_TYPES}
    first = tuple((SMALL.ops[1], j) for j in range(2))
    for name in ("darts", "milenas", "darts+", "robust-darts", "p-darts"):
        assert get(name, space=SMALL).derive(zeros).normal == (first, first)


def test_pc_darts_with_all_channels_is_darts_with_edge_weights() -> None:
    one = get("pc-darts", space=SMALL, frozen_epochs=0)
    other = transformed(get("darts", space=SMALL), ["edge_weights"])
    key, arch = jax.random.key(1), one.init(jax.random.key(0))
    found, expected = (s.sample(key, arch, (), {}, "arch") for s in (one, other))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.derive(arch) == other.derive(arch)


# --- P-DARTS ----------------------------------------------------------------------------------------------------------


def test_the_stages_of_p_darts_are_the_published_ones() -> None:
    """5, 11, 17 cells; 8, 5, 3 operations an edge, those of the largest softmax of what there was; 25 epochs each."""
    space, strategy = dataclasses.replace(SPACE, cells=5), get("p-darts", space=dataclasses.replace(SPACE, cells=5))
    assert strategy.stage_epochs(75) == 25
    there = {kind: [set(range(8))] * 14 for kind in CELL_TYPES}
    for stage, (cells, kept) in enumerate(((11, 5), (17, 3)), start=1):
        arch = _arch(stage)
        assert strategy.at_epoch(_view(strategy, arch, 23, 25)) is None
        event = strategy.at_epoch(_view(strategy, arch, 24, 25))
        assert isinstance(event, Restage) and (event.space.cells, event.options) == (cells, {"stage": stage})
        assert event.epochs == (25 if stage == 1 else None) and not event.keep_weights
        for kind in CELL_TYPES:
            for e, old in enumerate(there[kind]):
                best = set(sorted(old, key=lambda o: -arch[kind][e, o])[:kept])
                there[kind][e] = best
                assert set(np.flatnonzero(event.space.allowed[kind][e])) == best
        space, strategy = event.space, get("p-darts", space=event.space, **event.options)
    assert strategy.at_epoch(_view(strategy, _arch(3), 24, 25)) is None
    assert strategy.derive(_arch(3)).skips("normal") <= 2 and space.cells == 17


def test_the_dropout_of_p_darts_is_that_of_its_program() -> None:
    for stage, p0 in enumerate((0.1, 0.4, 0.7)):
        strategy = get("p-darts", space=SPACE, stage=stage)
        for epoch in range(25):
            numbers = strategy.schedule(epoch, 25)
            rate = p0 * (25 - epoch - 1) / 25 if epoch < 10 else p0 * math.exp(-0.2 * (epoch - 10))
            assert numbers == {"arch_on": float(epoch >= 10), "dropout/skip_connect": pytest.approx(rate)}
    without = get("p-darts", space=dataclasses.replace(SPACE, ops=("none", "sep_conv_3x3")))
    assert without.schedule(0, 25) == {"arch_on": 0.0}


def test_p_darts_leaves_out_skips_but_two_of_the_normal_cell() -> None:
    arch = _arch(0)
    for kind in CELL_TYPES:
        arch[kind][:, SPACE.ops.index("skip_connect")] += 6
    genotype = get("p-darts", space=SPACE).derive(arch)
    assert (genotype.skips("normal"), genotype.skips("reduce")) == (2, 8)
    assert get("p-darts", space=SPACE, skips=0).derive(arch).skips("normal") == 0


def test_a_search_in_stages_needs_an_epoch_each() -> None:
    with pytest.raises(UserError, match=r"^epochs: 2 is not possible; allowed: >= 3, one a stage$"):
        get("p-darts", space=SPACE).stage_epochs(2)


@pytest.mark.slow
def test_p_darts_searches_three_networks(tmp_path: Path) -> None:
    config = search_cases.config_of("p-darts", epochs=4, space__ops="none,skip_connect,sep_conv_3x3,max_pool_3x3")
    with search_cases.shared_programs():
        search_loop.search(config, tmp_path / "w", data=search_cases.digits())
    events = [json.loads(line) for line in (tmp_path / "w" / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["space"]["cells"], event["epochs"]) for event in events] == [
        ("restage", 7, 1),
        ("restage", 11, 2),
    ]
    assert [{len(ops) for ops in event["space"]["edge_ops"][0]} for event in events] == [{3}, {2}]
    assert [row.get("stage") for row in search_cases.rows(tmp_path / "w", "epoch")] == [None, 1, 2, 2]


# --- DARTS+ and RobustDARTS -------------------------------------------------------------------------------------------


def test_darts_plus_ends_after_the_first_fifth() -> None:
    strategy, arch = get("darts+", space=SMALL), _arch(0, SMALL)
    arch["normal"][:, SMALL.ops.index("skip_connect")] += 6
    assert strategy.at_epoch(_view(strategy, arch, 9, 50)) is None
    event = strategy.at_epoch(_view(strategy, arch, 10, 50))
    assert isinstance(event, Stop) and event.genotype == strategy.derive(arch)


def test_drop_path_of_robust_darts_is_a_ramp() -> None:
    strategy = get("robust-darts", space=SMALL, drop_path=0.4)
    rates = [strategy.schedule(epoch, 50)["drop_path"] for epoch in range(50)]
    np.testing.assert_allclose(rates, 0.4 * np.arange(50) / 49)
    assert get("robust-darts", space=SMALL).schedule(0, 50) == {}


def _run(strategy: Strategy, curvature: list[float], decay: float) -> tuple[int, Any]:
    """(epoch, event) of the first event of 50 epochs that ends or turns the search; eigenvalues are given."""
    memory = strategy.memory
    for epoch, now in enumerate(curvature):
        probe = SimpleNamespace(
            hvp=lambda at, vector, now=now, **_: jax.tree.map(lambda v: np.float32(now) * v, vector)
        )
        view = _view(strategy, _arch(epoch, SMALL), epoch, 50, memory=memory, probe=probe)
        event = strategy.at_epoch(view._replace(hyperparameters={"weights.weight_decay": decay}))
        if isinstance(event, Stop | Rollback):
            return epoch, event
        memory = event.memory if isinstance(event, Continue) else memory
    return -1, None


def test_robust_darts_stops_or_goes_back_where_the_published_rule_does() -> None:
    """Every 2 epochs; mean of the newest 5 against that of the 5 that lie 4 earlier; the cell of 12 epochs before."""
    curvature = [1.0 if epoch < 30 else 3.0 for epoch in range(50)]
    measured, expected = curvature[1::2], None
    for i in range(8, len(measured)):
        at = 2 * (i - 6) + 1
        if at >= 10 and (np.mean(measured[i - 4 : i + 1]) + 1e-3) / (np.mean(measured[i - 8 : i - 3]) + 1e-3) > 1.3:
            expected = (2 * i + 1, at)
            break
    assert expected is not None
    stops = get("robust-darts", space=SMALL)
    epoch, event = _run(stops, curvature, 3e-4)
    assert (epoch, event.genotype) == (expected[0], get("darts", space=SMALL).derive(_arch(expected[1], SMALL)))
    back = get("robust-darts", space=SMALL, alarm="rollback")
    assert back.horizon == expected[0] - expected[1] == 12
    for decay, after in ((3e-4, 3e-3), (3e-3, 0.03), (0.01, 0.03)):
        epoch, event = _run(back, curvature, decay)
        assert (epoch, event.epoch) == expected and event.memory is None
        assert event.hyperparameters == {"weights.weight_decay": pytest.approx(after)}
    assert _run(back, curvature, float(np.float32(0.03))) == (-1, None), "at the largest decay it goes to its end"
    assert _run(get("robust-darts", space=SMALL, alarm="none"), curvature, 3e-4) == (-1, None)


def test_a_rollback_needs_a_weight_decay_to_set() -> None:
    strategy = transformed(
        get("darts", space=SMALL),
        ["hessian_rollback:window=1,delta=1,every=1,from_epoch=0,iterations=1,threshold=1e-9"],
    )
    probe = SimpleNamespace(hvp=lambda at, vector, **_: vector)
    first = strategy.at_epoch(_view(strategy, _arch(0, SMALL), 0, 3, probe=probe))
    with pytest.raises(UserError, match=r"^weights\.transform: .* sets its weight_decay; allowed: [^\n]*$"):
        strategy.at_epoch(_view(strategy, _arch(1, SMALL), 1, 3, probe=probe, memory=first.memory))
