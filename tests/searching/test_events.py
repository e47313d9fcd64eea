"""Memory and events of a strategy, with toy strategies: stopped in every dispatch, killed, and resumed to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import search_cases
from search_cases import EPOCH_STEPS, assert_same, ended, rows, search

from prdarts_jax.bilevel import SearchState, alternating
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.report import page as report_page
from prdarts_jax.report import plots
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.loop import Start, Work
from prdarts_jax.run.metrics import comparable
from prdarts_jax.run.signals import StopRequest
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import loop, stages
from prdarts_jax.searching import program as search_program
from prdarts_jax.searching.population import search_population
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategy import Continue, Restage, Rollback, Stop, Strategy

MOMENT = 1e-9  # minutes: over as soon as the first dispatch is


@pytest.fixture(scope="module")
def _programs() -> dict[tuple[str, int], Any]:
    """A toy is one object a space and stage, so that its programs are traced once."""
    return {}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, _programs: dict[tuple[str, int], Any]) -> Iterator[None]:
    for name in ("make_dispatch", "_initial"):
        monkeypatch.setattr(search_program, name, _once(name, getattr(search_program, name), _programs))
    monkeypatch.setattr(search_inputs, "try_out", lambda *parts: dict.fromkeys(parts[-1], ""))  # has its own tests
    for name in ("cell_diagram", "save"):
        monkeypatch.setattr(plots, name, lambda *_, **__: None)
    monkeypatch.setattr(report_page, "report", lambda *_, **__: None)
    with search_cases.standard_promotion(), search_cases.stub_network():
        yield


def _once(name: str, make: Any, made: dict[tuple[str, int], Any]) -> Any:
    def once(problem: Any, *rest: Any) -> Any:
        key = name, id(problem.strategy)
        if key not in made:  # the problem is kept too: the number of an object that is gone may be given to another
            made[key] = make(problem, *rest), problem
        return made[key][0]

    return once


@functools.cache
def _counting(*, space: Space) -> Strategy:
    """The memory counts steps in the rule and epochs in the event, and both move the loss of the architecture."""
    base = darts(space=space)

    def rule(losses: Any, optimizers: Any) -> Any:
        inner = alternating("arch")(losses, optimizers)

        def step(state: Any, batches: Any, key: Any, numbers: Any) -> Any:
            state, metrics = inner(state, batches, key, numbers)
            return dataclasses.replace(state, memory={**state.memory, "steps": state.memory["steps"] + 1.0}), metrics

        return step

    def objective(ce: Any, arch: Any, gates: Any, memory: Any, numbers: Any) -> Any:
        term = (memory["steps"] + 10.0 * memory["epochs"]) * sum(jnp.sum(arch[kind] ** 2) for kind in CELL_TYPES)
        return ce + term, {"counted": term}

    def at_epoch(view: Any) -> Any:
        return Continue({**view.memory, "epochs": view.memory["epochs"] + 1})

    memory = {"steps": np.zeros((), np.float32), "epochs": np.zeros((), np.float32)}
    return base._replace(rule=rule, objective=objective, memory=memory, at_epoch=at_epoch)


@functools.cache
def _staged(*, space: Space, stage: int = 0) -> Strategy:
    """Three stages of one epoch each: fewer operations, then more cells; the weights are kept once."""
    base = darts(space=space)
    without_none = tuple(tuple(("skip_connect", "sep_conv_3x3") for _ in space.edges) for _ in CELL_TYPES)

    def at_epoch(view: Any) -> Any:
        if stage == 0:
            narrow = dataclasses.replace(space, edge_ops=without_none)
            return Restage(narrow, epochs=1, options={"stage": 1}, keep_weights=True)
        if stage == 1:
            return Restage(dataclasses.replace(space, cells=4), options={"stage": 2})
        return None

    return base._replace(at_epoch=at_epoch, stage_epochs=lambda epochs: 1)


@functools.cache
def _going_back(*, space: Space) -> Strategy:
    """After the third epoch, once, back to the end of the first one, with another weight decay."""
    base = darts(space=space)

    def at_epoch(view: Any) -> Any:
        if view.epoch == 2 and view.memory == 0:
            return Rollback(0, {"weights.weight_decay": 0.125}, memory=np.float32(1))
        return None

    return base._replace(at_epoch=at_epoch, memory=np.zeros((), np.float32), horizon=2)


TOYS = {"counting": _counting, "staged": _staged, "going back": _going_back}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("finished") / name.replace(" ", "-") for name in TOYS}


def _finished(finished: dict[str, Path], name: str) -> Path:
    workdir = finished[name]
    if not workdir.exists():
        assert search(workdir, given={"strategy": TOYS[name]}).status == "finished"
    return workdir


@pytest.mark.parametrize("name", TOYS)
def test_stopped_after_every_dispatch_it_ends_as_uninterrupted(
    finished: dict[str, Path], tmp_path: Path, name: str
) -> None:
    expected, statuses = ended(_finished(finished, name)), [""]
    flags = {"run__time_limit": MOMENT, "run__steps_per_dispatch": 4}  # an epoch is 4 + 3
    while statuses[-1] != "finished":
        statuses.append(search(tmp_path / "w", given={"strategy": TOYS[name]}, **flags).status)
        assert len(statuses) < 15
    assert len(statuses) > 5
    assert_same(ended(tmp_path / "w"), expected)


def test_killed_in_every_stage(finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved when it dies, in the fourth dispatch of each start: in the second stage, and in the third."""
    expected, done, starts = ended(_finished(finished, "staged")), Work.done, []

    class Killed(BaseException):
        pass

    def dying(work: Any) -> Any:
        starts[-1] += 1
        if starts[-1] == 4:
            raise Killed
        return done(work)

    monkeypatch.setattr(Work, "done", dying)
    status = ""
    while status != "finished":
        starts.append(0)
        with contextlib.suppress(Killed):
            status = search(tmp_path / "w", given={"strategy": _staged}).status
        assert len(starts) < 6
    assert starts == [4, 4, 3], "an epoch has three dispatches"
    assert_same(ended(tmp_path / "w"), expected)


def test_a_rule_and_an_event_change_the_memory(finished: dict[str, Path]) -> None:
    found = rows(_finished(finished, "counting"), "epoch")
    assert all(row["penalty/counted"] > 0 for row in found)
    # The coefficient grows with the steps, and by 10 with each epoch: the first epoch has seen 0..6 steps.
    first = rows(_finished(finished, "counting"), "step")[0]
    assert first["penalty/counted"] == 0.0


def test_kept_weights_reach_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that add 1 to the stem: the second stage goes on with the stem it is given, the third has another one."""
    stems: list[np.ndarray] = []

    def make_dispatch(problem: Any, mesh: Any) -> Any:
        def dispatch(carry: Any, count: Any, fresh: Any, orders: Any, *_: Any) -> Any:
            weights = carry.state.weights
            moved = jax.tree.map(lambda leaf: leaf + 1, weights["stem"])
            stems.extend(np.asarray(stem["conv"]) for stem in (weights["stem"], moved))
            state = dataclasses.replace(carry.state, weights={**weights, "stem": moved})
            metrics = {name: np.zeros(len(orders.train), np.float32) for name in carry.sums}
            return dataclasses.replace(carry, state=state), metrics

        return dispatch

    monkeypatch.setattr(search_program, "make_dispatch", make_dispatch)
    search(tmp_path / "w", given={"strategy": _staged}, run__steps_per_dispatch=EPOCH_STEPS)
    (_, first_end), (second, second_end), (third, _) = zip(stems[::2], stems[1::2], strict=True)
    np.testing.assert_array_equal(second, first_end)
    assert np.abs(third - second_end).min() > 0


def test_the_log_shows_the_stages(finished: dict[str, Path]) -> None:
    workdir = _finished(finished, "staged")
    assert [row.get("stage") for row in rows(workdir, "epoch")] == [None, 1, 2]
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["restage", "restage"]
    assert set(events[0]["space"]) == {"edge_ops"} and set(events[1]["space"]) == {"edge_ops", "cells"}
    assert events[1]["epochs"] == 1, "what is left of the search"
    tables = [json.loads(line) for line in (workdir / "probabilities.jsonl").read_text().splitlines()]
    assert [all(row[0] == 0 for row in table["normal"]) for table in tables] == [False, True, True]


def test_a_rollback_computes_the_epochs_again_with_other_hyperparameters(
    finished: dict[str, Path], tmp_path: Path
) -> None:
    workdir = _finished(finished, "going back")
    plain = tmp_path / "plain"
    search(plain, given={"strategy": lambda *, space: darts(space=space)})
    with_decay, without = rows(workdir, "epoch"), rows(plain, "epoch")
    assert [row["epoch"] for row in with_decay] == [0, 1, 2]
    assert comparable(with_decay[0]) == comparable(without[0])
    assert with_decay[1]["train_loss"] != without[1]["train_loss"]
    (event,) = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert event["epoch"] == 2 and event["goes_on_from_epoch"] == 1
    # The same search, begun with that weight decay after its first epoch, is the oracle.
    assert event["hyperparameters"] == {"weights.weight_decay": 0.125}


def test_killed_in_a_rollback(finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once after the newer checkpoints are gone, once before they are: it goes back again, to the same numbers."""
    expected, save, rewind = ended(_finished(finished, "going back")), Checkpointer.save, Checkpointer.rewind

    class Killed(BaseException):
        pass

    def killed(self: Any, step: int, *rest: Any) -> None:
        if rewound and not killed_once:
            killed_once.append(step)
            raise Killed
        save(self, step, *rest)

    def noting(self: Any, step: int) -> None:
        if not rewound:
            rewound.append(step)
            if first:
                raise Killed
        rewind(self, step)

    for first in (True, False):
        rewound: list[int] = []
        killed_once: list[int] = []
        workdir = tmp_path / f"w{first}"
        with monkeypatch.context() as patch:
            patch.setattr(Checkpointer, "save", killed)
            patch.setattr(Checkpointer, "rewind", noting)
            with pytest.raises(Killed):
                search(workdir, given={"strategy": _going_back})
        assert rewound == [EPOCH_STEPS]
        assert search(workdir, given={"strategy": _going_back}).status == "finished"
        assert_same(ended(workdir), expected)


def test_stop_ends_a_stage(tmp_path: Path) -> None:
    def factory(*, space: Space) -> Strategy:
        base = darts(space=space)
        return base._replace(at_epoch=lambda view: Stop(view.genotype, "enough"))

    result = search(tmp_path / "w", given={"strategy": factory})
    assert result.status == "finished" and len(rows(tmp_path / "w", "epoch")) == 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (lambda view: "enough", "at_epoch gives a str; allowed: None | Continue | Stop | Restage | Rollback"),
        (lambda view: Rollback(0), "Rollback to epoch 0 at epoch 0; allowed: earlier epochs of the stage, at most 0"),
        (lambda view: Continue((1,)), "the memory of an event is another tree than Strategy.memory"),
        (lambda view: Restage(Space(cells=3), epochs=0), "Restage for 0 epochs is not possible; allowed: >= 1"),
        (lambda view: Restage(Space(classes=3), epochs=1), "Restage to a space of {"),
    ],
)
def test_an_impossible_event_is_one_line(tmp_path: Path, event: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        search(
            tmp_path / "w",
            given={"strategy": lambda *, space: darts(space=space)._replace(at_epoch=event)},
        )
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Stop(None, "enough"), "Stop with a NoneType; allowed: a Genotype"),
        (Restage(None), "Restage with a NoneType; allowed: a Space"),
        (Restage(Space(), epochs=1.5), "Restage: 'float' object cannot be interpreted as an integer"),
        (Restage(Space(), options={"cells": Space()}), "Restage: Object of type Space is not JSON serializable"),
        (Rollback(0, {"weights.momentum": "much"}), "Rollback: could not convert string to float: 'much'"),
    ],
)
def test_an_event_that_no_checkpoint_can_hold_is_one_line(event: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        stages.plain_event(event)
    assert said in str(raised.value)


def test_numbers_of_numpy_in_events_become_those_of_python() -> None:
    event = stages.plain_event(Restage(Space(), np.int64(2), options={"stage": np.int32(1)}))
    assert json.dumps([event.epochs, event.options]) == '[2, {"stage": 1}]'


@pytest.mark.parametrize("change", [{"ops": ("none", "other")}, {"channels": 4, "partial": 3}])
def test_a_stage_on_an_impossible_space_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="with operations of the first space; partial divides channels"):
        stages.changed_fields(dataclasses.replace(Space(), **change), Space())


def test_a_memory_that_would_be_cut_is_refused() -> None:
    state = SearchState(jnp.int32(0), (), (), (), (), {"count": jnp.int32(0), "mean": jnp.float32(0)})
    mesh = sharding.make_mesh(jax.devices()[:1])
    carry = search_program.SearchCarry(state, {})
    new = stages.with_event(carry, Continue({"count": np.int64(2), "mean": 1}), mesh).state.memory
    assert new["count"].dtype == jnp.int32 and new["mean"].dtype == jnp.float32 and float(new["mean"]) == 1
    with pytest.raises(UserError, match=r"has float64 in place of int32, which would cut it"):
        stages.with_event(carry, Continue({"count": 0.5, "mean": 0.5}), mesh)


def test_an_event_may_set_the_architecture() -> None:
    """In the dtypes it has; another tree or shape is refused, and without one it stays."""
    state = SearchState(jnp.int32(0), (), {"normal": jnp.zeros((2, 3))}, (), (), ())
    mesh = sharding.make_mesh(jax.devices()[:1])
    carry = search_program.SearchCarry(state, {})
    table = np.arange(6.0).reshape(2, 3)
    new = stages.with_event(carry, Continue((), {"normal": table}), mesh).state.arch["normal"]
    assert new.dtype == jnp.float32 and new.tolist() == table.tolist()
    assert stages.with_event(carry, Continue(()), mesh).state.arch is state.arch
    for arch, said in (
        ({"reduce": table}, "another tree"),
        ({"normal": table[:1]}, "has shapes"),
        ((), "another tree"),
    ):
        with pytest.raises(UserError, match=f"the arch of an event .*{said}|the arch of an event {said}"):
            stages.with_event(carry, Continue((), arch), mesh)


@pytest.fixture
def _nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that change nothing, so that nothing is compiled for them."""

    def make_dispatch(problem: Any, mesh: Any) -> Any:
        def dispatch(carry: Any, count: Any, fresh: Any, orders: Any, *_: Any) -> Any:
            return carry, {name: np.zeros(len(orders.train), np.float32) for name in carry.sums}

        return dispatch

    monkeypatch.setattr(search_program, "make_dispatch", make_dispatch)


@pytest.mark.usefixtures("_nothing_computed")
def test_an_epoch_without_the_weights_has_no_training_loss(tmp_path: Path) -> None:
    def factory(*, space: Space) -> Strategy:
        return darts(space=space)._replace(schedule=lambda epoch, epochs: {"weights_on": 0.0})

    assert search(tmp_path / "w", given={"strategy": factory}).status == "finished"
    assert all("train_loss" not in row for row in rows(tmp_path / "w", "epoch"))


@pytest.mark.usefixtures("_nothing_computed")
def test_a_mistake_in_a_rollback_removes_no_checkpoint(tmp_path: Path) -> None:
    def factory(*, space: Space) -> Strategy:
        def at_epoch(view: Any) -> Any:
            return Rollback(0, {"weights.other": 0.5}) if view.epoch == 2 else None

        return darts(space=space)._replace(at_epoch=at_epoch, horizon=2)

    with pytest.raises(UserError, match=r"Rollback sets 'weights.other', which is no hyperparameter"):
        search(tmp_path / "w", given={"strategy": factory})
    assert Checkpointer(tmp_path / "w" / "checkpoints").steps() == [EPOCH_STEPS, 2 * EPOCH_STEPS]


@pytest.mark.usefixtures("_nothing_computed")
def test_what_a_rollback_sets_stays_in_the_next_stage(tmp_path: Path) -> None:
    seen: dict[int, list[float]] = {0: [], 1: []}

    def factory(*, space: Space, stage: int = 0) -> Strategy:
        def at_epoch(view: Any) -> Any:
            decay = view.hyperparameters["weights.weight_decay"]
            seen[stage].append(decay)
            if stage or view.epoch == 0:
                return None
            again = Rollback(0, {"weights.weight_decay": 0.125})
            return Restage(space, options={"stage": 1}, keep_weights=True) if decay == 0.125 else again

        return darts(space=space)._replace(at_epoch=at_epoch, horizon=1)

    assert search(tmp_path / "w", given={"strategy": factory}).status == "finished"
    assert seen[0][-1] == 0.125 and seen[0][0] != 0.125 and seen[1] == [0.125]


@pytest.mark.usefixtures("_nothing_computed")
def test_a_mistake_in_the_strategy_of_a_later_stage_is_one_line(tmp_path: Path) -> None:
    def factory(*, space: Space, later: bool = False) -> Strategy:
        if later:
            return darts(space=space)._replace(scores=lambda arch: 1 / 0)
        return darts(space=space)._replace(at_epoch=lambda view: Restage(space, options={"later": True}))

    with pytest.raises(UserError, match=r"method.strategy: .*test_events.py:\d+: ZeroDivisionError"):
        search(tmp_path / "w", given={"strategy": factory})


@pytest.mark.usefixtures("_nothing_computed")
def test_a_later_stage_is_not_resumed_side_by_side(tmp_path: Path) -> None:
    given = {"strategy": _staged, "data": search_cases.digits()}
    config = search_cases.config(run__time_limit=MOMENT, run__steps_per_dispatch=EPOCH_STEPS)
    assert loop.search(config, tmp_path, **given).status == "time-limit"  # the second stage has begun
    inputs = search_inputs.prepare(config, **given)
    start = Start(config.run, tmp_path, None, StopRequest(), None, search_inputs.document(config, inputs, None))
    run = loop._Search(config, inputs, start._replace(side_by_side=True), loop.Shared(inputs))
    with pytest.raises(UserError, match="searches side by side have one stage"):
        run.go()


def test_a_strategy_without_its_factory_has_no_stages(tmp_path: Path) -> None:
    space = Space.create(search_cases.config().space, classes=10, in_channels=1)
    with pytest.raises(UserError, match=r"a Strategy cannot be made again for a new stage; allowed: its factory"):
        search(tmp_path / "w", given={"strategy": _staged(space=space)})


# --- weights from stage to stage --------------------------------------------------------------------------------------


def test_the_report_shows_the_stages(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a search with stages, and of one that went back."""
    workdirs = [_finished(finished, name) for name in ("staged", "going back")]
    monkeypatch.undo()
    for workdir, said in zip(workdirs, ("cells = 4", "weights.weight_decay = 0.125"), strict=True):
        page = report_page.report([workdir], tmp_path / "report.html").read_text()
        assert "Stages and steps back" in page and said in page


@pytest.mark.multidevice
def test_searches_side_by_side_go_back_and_have_one_stage(finished: dict[str, Path], tmp_path: Path) -> None:
    """A member that goes back ends as it does alone; one that would begin a stage fails in one line."""
    config = search_cases.config(run__devices="2")
    given = {"data": search_cases.digits()}
    result = search_population(config, tmp_path / "back", {"seed": [0, 1]}, strategy=_going_back, **given)
    assert result.status == "finished"
    alone = [comparable(row) for row in rows(_finished(finished, "going back"), "epoch")]
    member = [comparable(row) for row in rows(tmp_path / "back" / "seed=0", "epoch")]
    for a, b in zip(alone, member, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    result = search_population(config, tmp_path / "stages", {"seed": [0, 1]}, strategy=_staged, **given)
    assert result.status == "failed" and "searches side by side have one stage" in result.failures["seed=0"]
