"""Every method of the registry through the same tests: its functions, one step, options; whole searches (slow)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import search_cases

from prdarts_jax import presets
from prdarts_jax.bilevel import Batches
from prdarts_jax.config import schema
from prdarts_jax.config.search import OPS
from prdarts_jax.data.batches import Batch
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates, all_ops, executed_mask
from prdarts_jax.ops.losses import cross_entropy
from prdarts_jax.ops.primitives import PRIMITIVES, Primitive
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.searching import program as search_program
from prdarts_jax.searching import step as search_step
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import get, registry
from prdarts_jax.strategy import ROLES, Continue, Strategy, View, cross_entropy_alone

METHODS = [row.name for row in registry.rows()]
_LISTS = (("skip_connect",), ("none", "max_pool_3x3"), OPS, ("sep_conv_3x3", "skip_connect"), ("dil_conv_5x5",))
_NOISE = Primitive("conv", lambda c, stride: {}, lambda params, x, stride, layers: 0.1 * x[:, ::stride, ::stride])
SPACES = {
    "full": Space(nodes=2),
    "restricted": Space(nodes=2, edge_ops=(_LISTS, _LISTS[::-1])),  # as S1: an edge has its own operations
    "without-none": Space(nodes=2, ops=("skip_connect", "sep_conv_3x3")),  # S2
    "s3": Space(nodes=2, ops=("none", "skip_connect", "sep_conv_3x3")),
    "s4": Space(nodes=2, ops=("noise", "sep_conv_3x3"), primitives=(*PRIMITIVES.items(), ("noise", _NOISE))),
}
QUICK = ("full", "restricted", "without-none")
CE = jnp.float32(1.25)
STEP_SPACE = Space(nodes=1, cells=3, channels=2, classes=3, in_channels=1, ops=("skip_connect", "max_pool_3x3"))


class _Flat:
    """The probe of a loss that is zero everywhere."""

    def loss(self, arch: Any, *, batches: int | None = 1) -> float:
        return 0.0

    def grad(self, arch: Any, *, batches: int | None = 1) -> Any:
        return jax.tree.map(np.zeros_like, arch)

    def hvp(self, arch: Any, vector: Any, *, radius: float | None = None, batches: int | None = 1) -> Any:
        return jax.tree.map(np.zeros_like, arch)

    def gates_loss(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        return 0.0

    def gates_accuracy(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        return 0.0


def fitting(name: str, space: Space) -> Space:
    """The space, without `none` for a method that was published without it."""
    if "none" in registry.settings(name).get("space.ops", ("none",)):
        return space
    lists = tuple(tuple(tuple(op for op in ops if op != "none") for ops in cell) for cell in space.edge_ops)
    return dataclasses.replace(space, ops=tuple(op for op in space.ops if op != "none"), edge_ops=lists)


def _same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bool((x == y).all()) for x, y in pairs)


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SPACES])
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, place: str) -> None:
    space = fitting(name, SPACES[place])
    strategy = get(name, space=space)
    arch = strategy.init(jax.random.key(0))
    assert _same(arch, strategy.init(jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(arch)} == {np.dtype(np.float32)}
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(arch))

    rows = [strategy.schedule(epoch, 20) for epoch in range(20)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    progress = {key: jnp.float32(value) for key, value in rows[10].items()}

    @oracles.quick_jit
    def run(key: jax.Array, arch: Any, progress: Any) -> Any:
        gates = {role: strategy.sample(key, arch, strategy.memory, progress, role) for role in ROLES}
        objectives = {
            "arch": strategy.objective(CE, arch, gates["arch"], strategy.memory, progress),
            "weights": (strategy.weight_objective or cross_entropy_alone)(
                CE, arch, gates["weights"], strategy.memory, progress
            ),
        }

        def loss(arch: Any) -> jax.Array:
            """As a network that is the sum of what is executed would have it."""
            drawn = strategy.sample(key, arch, strategy.memory, progress, "arch")
            parts = jax.tree.leaves((drawn.ops, drawn.edges))
            return strategy.objective(sum(jnp.sum(part**2) for part in parts), arch, drawn, strategy.memory, progress)[
                0
            ]

        return gates, objectives, strategy.probabilities(arch, progress), jax.grad(loss)(arch)

    gates, objectives, probabilities, gradient = run(jax.random.key(1), arch, progress)
    again, *_ = run(jax.random.key(2), arch, progress)
    for sample in gates.values():
        _check_gates(sample, space)
    assert _same(gates["eval"], again["eval"]), "gates for an evaluation are deterministic"
    for total, terms in objectives.values():
        added = sum(map(float, terms.values()))
        assert total.shape == () and float(total) == pytest.approx(float(CE) + added, abs=1e-6)
    for kind in CELL_TYPES:
        p = np.asarray(probabilities[kind])
        assert p.shape == (space.num_edges, space.num_ops) and (p >= 0).all() and (p <= 1).all()
    for leaf, slope in zip(jax.tree.leaves(arch), jax.tree.leaves(gradient), strict=True):
        assert slope.shape == leaf.shape and bool(jnp.isfinite(slope).all())
    _check_derivation(strategy, arch)
    assert strategy.space == space
    assert callable(strategy.rule) and strategy.horizon >= 0 and 1 <= strategy.stage_epochs(20) <= 20
    assert all(isinstance(leaf, np.ndarray | np.generic | jax.Array) for leaf in jax.tree.leaves(strategy.memory))
    host = jax.device_get(arch)
    view = View(0, 20, host, strategy.memory, {}, rows[0], strategy.derive(host), _Flat())
    assert isinstance(strategy.at_epoch(view), Continue | None), (
        "nothing ends or changes after one epoch of a flat loss"
    )


def _check_gates(sample: Gates, space: Space) -> None:
    """Shapes, dtypes; an operation runs at most once an edge, and only where it is allowed."""
    for kind in CELL_TYPES:
        ops, executed = np.asarray(sample.ops[kind]), np.asarray(sample.executed[kind])
        assert ops.shape[-2:] == (space.num_edges, space.num_ops) and ops.dtype == np.float32
        assert executed.shape[-2] == space.num_edges and executed.dtype == np.int32
        assert np.isfinite(ops).all() and (executed >= 0).all() and (executed <= space.num_ops).all()
        for row in executed.reshape(-1, space.num_edges, executed.shape[-1]):
            for e, chosen in enumerate(row):
                real = [o for o in chosen.tolist() if o < space.num_ops]
                assert len(set(real)) == len(real), "an operation runs at most once an edge"
                assert all(space.allowed[kind][e, o] for o in real)
        assert (ops[..., ~space.allowed[kind]] == 0).all()
        if sample.edges is not None:
            assert sample.edges[kind].shape[-1] == space.num_edges and sample.edges[kind].dtype == np.float32


def _check_derivation(strategy: Strategy, arch: Any) -> None:
    """Pairs that exist; two a node from distinct inputs, unless the method chooses in its own way."""
    space, genotype = strategy.space, strategy.derive(jax.tree.map(np.asarray, arch))
    own = dict(zip(strategy._fields, strategy, strict=True))
    usual = own["select"] is None and own["derive"] is None
    for kind, cell in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        assert len(cell) == space.nodes
        for node, pairs in enumerate(cell, start=2):
            usable = [
                j
                for e, (j, n) in enumerate(space.edges)
                if n == node and (space.allowed[kind][e] & ~space.group("none")).any()
            ]
            if usual:
                assert len(pairs) == min(2, len(usable)) and len({j for _, j in pairs}) == len(pairs)
            for op, j in pairs:
                e = space.edges.index((j, node))
                assert op != "none" and space.allowed[kind][e, space.ops.index(op)]
    if strategy.derives_from_scores:
        scores = strategy.scores(jax.device_get(arch))
        assert all(np.shape(scores[kind]) == (space.num_edges, space.num_ops) for kind in CELL_TYPES)
        assert all((np.asarray(scores[kind]) >= 0).all() for kind in CELL_TYPES)
        assert strategy.select(scores) == genotype


# --- one step ---------------------------------------------------------------------------------------------------------


def _step_parts(name: str, space: Space) -> tuple[dict[str, Any], Any]:
    """(space, strategy and optimizers; the numbers of a late epoch)."""
    strategy = get(name, space=space)
    made = {
        "space": space,
        "strategy": strategy,
        "weight_tx": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        "arch_tx": optax.sgd(0.1),
    }
    numbers = strategy.schedule(19, 20) | {"weight_learning_rate": 0.1, "arch_learning_rate": 0.1}
    return made, {key: jnp.float32(value) for key, value in numbers.items()}


def _batches(space: Space) -> Batches:
    images = jax.random.normal(jax.random.key(1), (4, 4, 4, space.in_channels))
    batch = Batch(images, jnp.array([0, 1, 2, 0], jnp.int32))
    return Batches(batch, batch)


# An architecture that moves in every so-many-th step alone moves in this one.
_MANY = jnp.int32(59)


@pytest.mark.parametrize("name", METHODS)
def test_one_bilevel_step_runs_and_moves_both_groups(name: str) -> None:
    made, numbers = _step_parts(name, fitting(name, STEP_SPACE))
    state = jax.jit(lambda key: search_step.init_state(key, **made))(jax.random.key(0))
    step = oracles.quick_jit(search_step.make_search_step(**made))
    new, metrics = step(state.replace(step=_MANY), _batches(STEP_SPACE), jax.random.key(2), numbers)
    assert int(new.step) == _MANY + 1 and all(np.isfinite(float(m)) for m in metrics.values())
    by_gradient = name not in search_cases.WITHOUT_GRADIENTS
    assert {"train_loss", "train_accuracy"} <= metrics.keys() and ("penalty/total" in metrics) == by_gradient
    assert not _same(state.weights, new.weights) and _same(state.arch, new.arch) != by_gradient


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in SPACES if place != "full"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_keeps_shapes_and_dtypes_in_every_space(name: str, place: str) -> None:
    """Traced, not compiled."""
    space = dataclasses.replace(fitting(name, SPACES[place]), cells=3, channels=4, in_channels=1)
    made, numbers = _step_parts(name, space)
    state = jax.eval_shape(lambda key: search_step.init_state(key, **made), jax.random.key(0))
    after, _ = jax.eval_shape(search_step.make_search_step(**made), state, _batches(space), jax.random.key(2), numbers)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in registry.rows() if row.executed.isdecimal()])
def test_executing_few_operations_is_executing_all_with_zeros(name: str) -> None:
    """The loss, and its gradients in the weights and in the multipliers of what is executed."""
    space = fitting(name, Space(nodes=1, cells=3, channels=4, classes=3, in_channels=1))
    strategy = get(name, space=space)
    numbers = {key: jnp.float32(value) for key, value in strategy.schedule(10, 20).items()}
    gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), strategy.memory, numbers, "arch")
    weights, batch = jax.jit(lambda key: supernet.init(key, space))(jax.random.key(2)), _batches(space).train

    def loss(weights: Any, ops: Any, executed: Any) -> jax.Array:
        drawn = dataclasses.replace(gates, ops=ops, executed=executed, stats={})
        return cross_entropy(supernet.apply(weights, drawn, batch.images, space=space)[0], batch.labels)

    found = jax.jit(jax.value_and_grad(loss, (0, 1)))
    few, dense = gates.executed, {kind: all_ops(space.allowed[kind]) for kind in CELL_TYPES}
    assert few["normal"].shape[1] == int(registry.row(name).executed) < dense["normal"].shape[1]
    (value, (d_weights, d_ops)), (expected, (e_weights, e_ops)) = (found(weights, gates.ops, x) for x in (few, dense))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(d_weights), jax.tree.leaves(e_weights), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for kind in CELL_TYPES:
        mask = np.asarray(executed_mask(few[kind], space.num_ops))
        np.testing.assert_allclose(np.asarray(d_ops[kind])[mask], np.asarray(e_ops[kind])[mask], atol=1e-4)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_options_of_another_type_or_name_are_one_line(name: str) -> None:
    options = registry.options(name)
    with pytest.raises(UserError, match=r"^method\.options\.no_such: unknown value 'no_such'[^\n]*$"):
        get(name, space=Space(), no_such=1)
    for option, default in options.items():
        if not isinstance(default, str):
            with pytest.raises(
                UserError, match=rf"^method\.options\.{option}: 'many' is not possible; allowed: [^\n]*$"
            ):
                get(name, space=Space(), **{option: "many"})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("darts", {"order": 3}, "method.options.order: 3 is not possible; allowed: 1 | 2"),
        ("darts", {"exact": True}, "method.options.exact: True is not possible; allowed: False with order=1"),
        ("milenas", {"scale": -1.0}, "method.options.scale: -1.0 is not possible; allowed: a finite number >= 0"),
        ("darts+", {"skips": 0}, "stop_at_skips.skips: 0 is not possible; allowed: >= 1"),
        ("darts+", {"share": 1.0}, "stop_at_skips.share: 1.0 is not possible; allowed: in [0, 1)"),
        ("pc-darts", {"frozen_epochs": -1}, "frozen.epochs: -1 is not possible; allowed: >= 0"),
        ("pc-darts", {"init_scale": -1.0}, "init_scale: -1.0 is not possible; allowed: a finite number >= 0"),
        ("p-darts", {"skip_dropout": "0.1,0.4"}, "skip_dropout: '0.1,0.4' is not possible; allowed: three numbers"),
        ("p-darts", {"skip_dropout": "a,b,c"}, "skip_dropout: 'a,b,c' is not possible; allowed: three numbers"),
        ("p-darts", {"stage": 3}, "method.options.stage: 3 is not possible; allowed: 0 | 1 | 2"),
        ("robust-darts", {"alarm": "stpo"}, "method.options.alarm: unknown value 'stpo'; did you mean 'stop'?"),
        ("robust-darts", {"drop_path": 1.0}, "method.options.drop_path: 1.0 is not possible; allowed: in [0, 1)"),
        ("robust-darts", {"alarm": "rollback", "factor": 1.0}, "hessian_rollback.factor: 1.0 is not possible"),
    ],
)
def test_impossible_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        get(name, space=Space(), **options)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("preset", ["digits", "cifar10-small"])
@pytest.mark.parametrize("name", METHODS)
def test_published_settings_and_the_scale_of_two_cores(name: str, preset: str) -> None:
    """A preset keeps its scale; all else is as published."""
    made, scale = presets.resolve(preset, name), presets.PRESETS[preset].settings
    for path, value in registry.settings(name).items():
        kept = path in scale
        assert made.sources[path].startswith(f"preset {preset}" if kept else f"strategy {name}"), path
        found, expected = schema.get(made.config, path), scale[path] if kept else value
        assert (tuple(found) if isinstance(found, list) else found) == expected, path
    assert made.config.epochs == scale["epochs"] and made.config.space.cells == scale["space.cells"]


# --- whole searches ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _shared() -> Iterator[None]:
    with search_cases.shared_programs():
        yield


def _stages(workdir: Path) -> int:
    path = workdir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return 1 + sum(event["event"] == "restage" for event in events)


@pytest.mark.slow
@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize("name", METHODS)
def test_a_search_compiles_once_a_stage_and_resumes_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs: list[Any] = []
    make = search_program.make_dispatch

    def noting(problem: Any, mesh: Any) -> Any:
        programs.append(make(problem, mesh))
        return programs[-1]

    config = search_cases.config_of(name, run__steps_per_dispatch=search_cases.EPOCH_STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(search_program, "make_dispatch", noting)
        search_loop.search(config, tmp_path / "once", data=search_cases.digits())
    made = {id(program): program for program in programs}
    assert len(made) == _stages(tmp_path / "once")
    assert [program._cache_size() for program in made.values()] == [1] * len(made)
    workdir = search_cases.assert_resumes(config, tmp_path, dispatch=search_cases.EPOCH_STEPS)
    search_cases.assert_same(search_cases.ended(tmp_path / "once"), search_cases.ended(workdir))


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize("name", METHODS)
def test_two_devices_search_as_one(name: str, tmp_path: Path) -> None:
    """Sums in another order alone: losses and probabilities agree."""
    found = []
    for devices in ("1", "2"):
        workdir = tmp_path / devices
        config = search_cases.config_of(name, run__devices=devices, epochs=3)
        assert search_loop.search(config, workdir, data=search_cases.digits()).status == "finished"
        tables = [json.loads(line) for line in (workdir / "probabilities.jsonl").read_text().splitlines()]
        rows = search_cases.rows(workdir, "epoch")
        found.append(([row["train_loss"] for row in rows], [table["normal"] for table in tables]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-2)
    np.testing.assert_allclose(found[0][1][0], found[1][1][0], atol=1e-3)
