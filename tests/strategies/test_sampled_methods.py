"""SNAS, GDAS, Fair DARTS, ProxylessNAS and the method after BayesNAS: what they draw, their terms, their cells."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prdarts_jax.bilevel import Batches, Loss, Losses, Optimizers, SearchState
from prdarts_jax.data.batches import Batch
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates, executed_mask
from prdarts_jax.network.counts import pair_costs, profile, search_costs
from prdarts_jax.space.derive import derive_edges
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.bayesnas import bayesnas
from prdarts_jax.strategies.composition import transformed
from prdarts_jax.strategies.fair_darts import fair_darts
from prdarts_jax.strategies.gdas import gdas
from prdarts_jax.strategies.proxyless import proxyless, with_mass_of
from prdarts_jax.strategies.sampling import gumbel_noise
from prdarts_jax.strategies.snas import snas
from prdarts_jax.strategy import Continue, Stop, Strategy, View

OPS = ("none", "skip_connect", "avg_pool_3x3", "dil_conv_3x3")
_LISTS = (OPS, OPS[1::2]), (OPS[::2] + OPS[3:], OPS)  # not all of them on every edge
SPACE = Space(nodes=1, cells=3, channels=4, classes=3, ops=OPS, edge_ops=_LISTS, head_norm=False)
EDGES = ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4), (3, 4), (0, 5), (1, 5), (2, 5), (3, 5), (4, 5))


# --- what is drawn ----------------------------------------------------------------------------------------------------


FULL = Space(cells=3, channels=4)


def _arch(seed: int, space: Space = FULL, scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.normal(size=(space.num_edges, space.num_ops)), jnp.float32) for k in CELL_TYPES}


@pytest.mark.parametrize("make", [gdas, proxyless])
def test_an_operation_is_drawn_as_often_as_its_probability(make: Any) -> None:
    strategy, arch, number = make(space=FULL), _arch(0), 4000
    draw = jax.jit(jax.vmap(lambda key: strategy.sample(key, arch, (), {"tau": jnp.float32(0.5)}, "weights").ops))
    ops = draw(jax.random.split(jax.random.key(1), number))
    for kind in CELL_TYPES:
        table = np.asarray(ops[kind])
        assert set(np.unique(table)) == {0.0, 1.0} and (table.sum(axis=2) == 1).all()
        p = np.exp(np.asarray(arch[kind], np.float64))
        p /= p.sum(axis=1, keepdims=True)
        assert (np.abs(table.mean(axis=0) - p) < 5 * np.sqrt(p * (1 - p) / number)).all()


def test_two_candidates_are_drawn_without_replacement() -> None:
    """P({i,j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j), and one of them is then drawn from p between the two."""
    strategy, number = proxyless(space=FULL, mode="two"), 6000
    arch = _arch(0)

    def draw(key: jax.Array) -> Any:
        gates = strategy.sample(key, arch, (), {}, "arch")
        return gates.executed["normal"][3], gates.ops["normal"][3]

    pairs, ops = map(np.asarray, jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), number)))
    p = np.exp(np.asarray(arch["normal"][3], np.float64))
    p /= p.sum()
    for i in range(8):
        for j in range(i):
            share = p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))
            there = (np.sort(pairs, axis=1) == (j, i)).all(axis=1)
            assert abs(there.mean() - share) < 5 * math.sqrt(share / number)
            if there.sum() > 100:
                between = p[i] / (p[i] + p[j])
                assert abs(ops[there, i].mean() - between) < 5 * math.sqrt(between * (1 - between) / there.sum())


def test_a_small_temperature_is_the_argmax() -> None:
    arch, key = _arch(2), jax.random.key(3)
    strategy, noise = snas(space=FULL), gumbel_noise(key, FULL)
    for role, best in (("arch", {k: arch[k] + noise[k] for k in CELL_TYPES}), ("eval", arch)):
        z = strategy.sample(key, arch, (), {"tau": jnp.float32(1e-3)}, role).ops
        one = {k: jax.nn.one_hot(jnp.argmax(best[k], axis=1), 8) for k in CELL_TYPES}
        for kind in CELL_TYPES:
            np.testing.assert_allclose(z[kind], one[kind], atol=1e-3)
    # GDAS selects what SNAS then mixes; its relaxed probabilities are those of SNAS at every temperature.
    hard = gdas(space=FULL).sample(key, arch, (), {"tau": jnp.float32(1e-3)}, "arch").ops
    soft = snas(space=FULL).sample(key, arch, (), {"tau": jnp.float32(1e-3)}, "arch").ops
    for kind in CELL_TYPES:
        np.testing.assert_allclose(hard[kind], soft[kind], atol=1e-3)


def test_a_sample_for_each_cell_is_one_of_the_same_distribution() -> None:
    strategy, arch, key = snas(space=FULL, per_cell=True), _arch(4), jax.random.key(5)
    numbers = {"tau": jnp.float32(0.5), "resource": jnp.float32(1.0)}
    gates = strategy.sample(key, arch, (), numbers, "arch")
    noise = gumbel_noise(key, FULL, FULL.cells)
    for kind in CELL_TYPES:
        for cell in range(FULL.cells):
            wanted = jax.nn.softmax((arch[kind] + noise[kind][cell]) / 0.5, axis=1)
            np.testing.assert_allclose(gates.of_cell(kind, cell).ops[kind], wanted, rtol=1e-5)
    costs = search_costs(FULL)
    total = 0.0
    for cell, spec in enumerate(FULL.layout):
        number = sum(other.kind == spec.kind for other in FULL.layout)
        for table in costs:
            mean = (np.asarray(gates.ops[spec.kind][cell], np.float64) * table[cell]).sum(axis=1)
            total += np.log(np.maximum(mean, 1)).sum() / 3 / number
    _, terms = strategy.objective(jnp.float32(0), arch, gates, (), numbers)
    assert float(terms["resource"]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "numbers"),
    [
        (snas(space=FULL, resource=0.0), {"tau": 0.5, "resource": 0.0}),
        (fair_darts(space=FULL, w01=0.0), {"w01": 0.0}),
    ],
    ids=["snas", "fair-darts"],
)
def test_without_its_penalty_a_method_descends_the_cross_entropy(strategy: Strategy, numbers: Any) -> None:
    arch = _arch(6)
    gates = strategy.sample(jax.random.key(0), arch, (), numbers, "arch")
    slope = jax.grad(lambda arch: strategy.objective(jnp.float32(1.5), arch, gates, (), numbers)[0])(arch)
    assert float(strategy.objective(jnp.float32(1.5), arch, gates, (), numbers)[0]) == 1.5
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(slope))


def test_equal_parameters_are_an_even_mixture_and_pull_nowhere() -> None:
    space = Space(nodes=2, cells=3, channels=4)
    zeros = {kind: jnp.zeros((5, 8)) for kind in CELL_TYPES}
    z = snas(space=space).sample(jax.random.key(0), zeros, (), {"tau": 0.3}, "eval").ops
    assert all(bool((z[kind] == 1 / 8).all()) for kind in CELL_TYPES)
    fair = fair_darts(space=space)
    gates = fair.sample(jax.random.key(0), zeros, (), {}, "arch")
    assert all(bool((gates.ops[kind] == 0.5).all()) for kind in CELL_TYPES)
    slope = jax.grad(lambda arch: fair.objective(jnp.float32(0), arch, gates, (), {"w01": 10.0})[0])(zeros)
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(slope))
    assert all(bool((fair.init(jax.random.key(0))[kind] == 0).all()) for kind in CELL_TYPES)


def test_the_rest_of_an_edge_keeps_its_share() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(5, 8))
    moved = np.zeros((5, 8), bool)
    for e in range(4):  # the last edge does not move
        moved[e, rng.permutation(8)[:2]] = True
    after = before + moved * rng.normal(size=(5, 8))
    found = np.asarray(with_mass_of(jnp.asarray(before, jnp.float32), jnp.asarray(after, jnp.float32)))

    def p(table: np.ndarray) -> np.ndarray:
        return np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)

    np.testing.assert_allclose(p(found)[~moved], p(before)[~moved], rtol=1e-5)
    between = np.diff(found[:4][moved[:4]].reshape(4, 2)), np.diff(after[:4][moved[:4]].reshape(4, 2))
    np.testing.assert_allclose(*between, rtol=1e-4)


def test_the_multiplicative_cost() -> None:
    space = Space(nodes=2)
    strategy = proxyless(space=space, macs="50M", cells=5, channels=16, cost_scale=0.4, cost_power=0.7)
    arch = _arch(8, space)
    costs = pair_costs(space, "macs", cells=5, channels=16)
    expected = costs.fixed
    for kind in CELL_TYPES:
        p = np.exp(np.asarray(arch[kind], np.float64))
        p = p / p.sum(axis=1, keepdims=True) * ~space.group("none")
        for node in (2, 3):
            rows = [e for e, (_, n) in enumerate(space.edges) if n == node]
            expected += (2 * p[rows] / p[rows].sum() * costs.pairs[kind][rows]).sum()
    value, terms = strategy.objective(jnp.float32(2.0), arch, Gates({}, {}), (), {})
    wanted = 2.0 * 0.4 * (math.log(expected) / math.log(50e6)) ** 0.7
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(terms["cost"]) == pytest.approx(wanted - 2.0, rel=1e-5)


def test_costs_of_a_search_network_are_those_of_its_operations() -> None:
    """A derived network of one operation everywhere has the multiply-adds of that operation on two edges a node."""
    space = Space(cells=5, channels=8)
    costs, op = search_costs(space, image=32), 4
    node = (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    cell = (node,) * 4
    whole = profile(Genotype(cell, (2, 3, 4, 5), cell, (2, 3, 4, 5)), channels=8, cells=5)
    other = ((("skip_connect", 0), ("skip_connect", 1)),)
    pairs = [space.edges.index((j, n)) for n in (2, 3, 4, 5) for j in (0, 1)]
    without = profile(Genotype(other * 4, (2, 3, 4, 5), other * 4, (2, 3, 4, 5)), channels=8, cells=5)
    difference = (costs.macs[:, pairs, op] - costs.macs[:, pairs, space.ops.index("skip_connect")]).sum()
    assert whole.macs - without.macs == difference


# --- the groups of BayesNAS -------------------------------------------------------------------------------------------


SMALL = Space(nodes=1, cells=3, channels=4, ops=OPS)
LAMBDAS = {"edges": 0.02, "ops": 0.03}
CELLS = {"normal": [0], "reduce": [1, 2]}


def _group(hessian: np.ndarray, switch: np.ndarray) -> tuple[float, float]:
    """(omega, gamma) of a group after an epoch: H, C and omega as the program writes them, from gamma = 1/2."""
    c = 1 / (1 / 0.5 + hessian)
    omega = math.sqrt(np.sum(np.abs(-c / 0.5**2 + 1 / 0.5)))
    return omega, float(np.linalg.norm(switch)) / omega


@pytest.mark.parametrize("with_transforms", [False, True])
def test_omega_and_gamma_from_the_squares_of_an_epoch(with_transforms: bool) -> None:
    """On a cross-entropy that is linear in the gates; inside other transforms too. Then the cell that is left."""
    options = {f"lambda_{name}": value for name, value in LAMBDAS.items()} | {"warm_up": 0.0}
    rng = np.random.default_rng(0)
    slopes = {"ops": rng.normal(size=(3, 3, 2, 4)), "edges": rng.normal(size=(3, 3, 2))}  # of three batches

    def made(**more: Any) -> Strategy:
        plain = bayesnas(space=SMALL, **options, **more)
        return transformed(plain, ["edge_weights:init_scale=0", "cost:macs=500M"]) if with_transforms else plain

    def network(weights: Any, gates: Gates, batch: Batch, key: Any, numbers: Any) -> Any:
        assert gates.edges is not None
        ops, edges = (jnp.asarray(slopes[name], jnp.float32)[batch.labels[0]] for name in ("ops", "edges"))
        return jnp.sum(ops * gates.ops["normal"]) + jnp.sum(edges * gates.edges["normal"]), jnp.zeros(())

    strategy = made()

    def sample(weights: Any, arch: Any, memory: Any, batch: Any, key: Any, numbers: Any) -> Gates:
        return strategy.sample(key, arch, memory, numbers, "arch")

    loss, still = Loss(sample, network, strategy.objective), optax.with_extra_args_support(optax.sgd(0.0))
    arch, weights = strategy.init(jax.random.key(0)), {"w": jnp.float32(0)}
    switches = {name: rng.normal(size=slopes[name].shape[1:]) for name in slopes}
    own = {name: jnp.asarray(value, jnp.float32) for name, value in switches.items()}
    arch = {**arch, "base": own} if with_transforms else own
    memory = jax.tree.map(jnp.asarray, strategy.memory)
    state = SearchState(jnp.int32(0), weights, arch, still.init(weights), still.init(arch), memory)
    step = strategy.rule(Losses(loss, loss, loss, loss), Optimizers(still, still))
    for i in range(3):
        batch = Batch(jnp.zeros((5, 1, 1, 1)), jnp.full((5,), i, jnp.int32))
        state, metrics = step(state, Batches(batch, batch), jax.random.key(1), {})
    lasso = sum(
        LAMBDAS[name] * 0.5 * np.linalg.norm(table[cells], axis=0).sum()
        for name, table in switches.items()
        for cells in CELLS.values()
    )
    assert float(metrics["penalty/lasso"]) == pytest.approx(lasso, rel=1e-5)

    arch, memory = jax.device_get((state.arch, state.memory))
    view = View(0, 2, arch, memory, {}, {}, strategy.derive(arch), None)
    event = strategy.at_epoch(view)
    assert isinstance(event, Continue)
    after = event.memory[0] if with_transforms else event.memory
    assert float(after["steps"]) == 0 and not np.any(after["squares"]["ops"])
    share = 0.5 if with_transforms else 1.0  # edge_weights halves what a switch of an edge does
    hessian = {
        "edges": 5 * np.mean((share * slopes["edges"]) ** 2, axis=0) / LAMBDAS["edges"],
        "ops": 5 * np.mean(slopes["ops"] ** 2, axis=0) / LAMBDAS["ops"],
    }
    gamma: dict[str, dict[tuple[int, int], float]] = {kind: {} for kind in CELL_TYPES}
    for kind, cells in CELLS.items():
        for e in range(2):
            omega, of_edge = _group(hessian["edges"][cells, e], switches["edges"][cells, e])
            assert float(after["omega"][kind]["edges"][e]) == pytest.approx(omega, rel=1e-4)
            for o in range(4):
                omega, of_op = _group(hessian["ops"][cells, e, o], switches["ops"][cells, e, o])
                gamma[kind][e, o] = 1 / (1 / of_op + 1 / of_edge)
                assert float(after["omega"][kind]["ops"][e, o]) == pytest.approx(omega, rel=1e-4)
                assert float(after["gamma"][kind]["ops"][e, o]) == pytest.approx(gamma[kind][e, o], rel=1e-4)

    everything = [g for table in gamma.values() for g in table.values()]
    for threshold in (0.0, *np.quantile(everything, [0.3, 0.8, 1.0]) * 1.001):
        for pairs in (0, 2):
            stop = made(threshold=float(threshold), pairs=pairs).at_epoch(view._replace(epoch=1))
            assert isinstance(stop, Stop) and f"{sum(g < threshold for g in everything)} of 16" in stop.reason
            for kind, cell in (("normal", stop.genotype.normal), ("reduce", stop.genotype.reduce)):
                left = sorted((-g, e, o) for (e, o), g in gamma[kind].items() if g >= threshold and o > 0)
                names = [(OPS[o], e) for _, e, o in left]
                if pairs:
                    names = [pair for i, pair in enumerate(names) if pair[1] not in [e for _, e in names[:i]]][:2]
                assert sorted(cell[0]) == sorted(names)


def test_switches_rest_in_the_warm_up_and_leave_no_trace() -> None:
    strategy = bayesnas(space=SMALL)
    assert [strategy.schedule(epoch, 4)["arch_on"] for epoch in range(4)] == [0.0, 0.0, 1.0, 1.0]
    arch = strategy.init(jax.random.key(0))
    value, terms = strategy.objective(jnp.float32(1), arch, Gates({}, {}), strategy.memory, {"arch_on": 0.0})
    assert float(value) == 1.0 and float(terms["lasso"]) == 0.0
    view = View(3, 4, jax.device_get(arch), strategy.memory, {}, {}, strategy.derive(arch), None)
    assert strategy.at_epoch(view) is None, "of an epoch without a step nothing is known"


# --- cells ------------------------------------------------------------------------------------------------------------


def _rows(node: int) -> list[int]:
    return [e for e, (_, n) in enumerate(EDGES) if n == node]


def _by_loop(table: np.ndarray, rule: str, threshold: float) -> list[list[tuple[str, int]]]:
    """The pairs of the nodes of a full cell, as the published programs choose them from P."""
    nodes, ops = [], FULL.ops
    for node in (2, 3, 4, 5):
        chosen = []
        best = {e: max((o for o in range(8) if ops[o] != "none"), key=lambda o, e=e: table[e, o]) for e in _rows(node)}
        if rule == "argmax":
            for e in _rows(node):
                o = int(table[e].argmax())
                chosen += [] if ops[o] == "none" else [(e, o)]
        elif rule == "pairs":
            everything = [(e, o) for e in _rows(node) for o in range(8) if ops[o] != "none"]
            chosen = sorted(everything, key=lambda pair: -table[pair])[:2]
        elif rule == "darts":
            chosen = [(e, best[e]) for e in sorted(_rows(node), key=lambda e: -table[e, best[e]])[:2]]
        elif rule == "sparse":
            two = sorted(_rows(node), key=lambda e: -table[e, best[e]])[:2]
            chosen = [(e, best[e]) for e in two if table[e, best[e]] >= threshold]
        elif rule == "edge":
            for e in _rows(node):
                some = [o for o in np.argsort(table[e])[::-1] if ops[o] != "none"][:2]
                chosen += [(e, int(o)) for o in some if table[e, o] >= threshold]
        nodes.append([(ops[o], EDGES[e][0]) for e, o in chosen])
    return nodes


@pytest.mark.parametrize(
    ("make", "rule", "threshold"),
    [
        (snas, "argmax", 0.0),
        (gdas, "pairs", 0.0),
        (proxyless, "darts", 0.0),
        *[(lambda space, t=t: fair_darts(space=space, threshold=t), "sparse", t) for t in (0.6, 0.7, 0.85)],
        *[(lambda space, t=t: fair_darts(space=space, threshold=t, keep="edge"), "edge", t) for t in (0.6, 0.85)],
    ],
)
def test_cells_by_the_rules_of_the_programs(make: Any, rule: str, threshold: float) -> None:
    strategy, empty = make(space=FULL), 0
    for seed in range(6):
        arch = {kind: np.asarray(table) for kind, table in _arch(seed).items()}
        genotype = strategy.derive(arch)
        for kind, cell in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            e = np.exp(arch[kind].astype(np.float64))
            table = e / (1 + e) if threshold else e / e.sum(axis=1, keepdims=True)
            for found, wanted in zip(cell, _by_loop(table, rule, threshold), strict=True):
                assert sorted(found) == sorted(wanted)
                empty += not wanted
    assert (empty > 0) == (threshold > 0.6)


def test_skips_are_limited_in_every_derivation() -> None:
    for make in (snas, gdas, proxyless, fair_darts):
        arch = _arch(0, scale=0.1)
        arch["normal"] = arch["normal"].at[:, FULL.ops.index("skip_connect")].set(3.0)
        arch["normal"] = arch["normal"].at[:, FULL.ops.index("sep_conv_3x3")].set(2.0)
        plain = make(space=FULL)
        limited = transformed(plain, ["at_most_skips:skips=1"])
        assert plain.derive(arch).skips("normal") > 1 >= limited.derive(arch).skips("normal")
        assert limited.derive(arch).count("sep_conv_3x3") > 0


def test_edges_of_a_restricted_space() -> None:
    table = {kind: np.full((2, 4), 0.5) for kind in CELL_TYPES}
    table["normal"][1, 0] = 1.0  # not allowed there
    genotype = derive_edges(table, SPACE, none_competes=True)
    assert genotype.normal == ((("skip_connect", 1),),)  # `none` comes first on edge 0, of equal ones
    assert genotype.reduce == ((),)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (snas, {"tau_min": 0.0}, "method.options.tau_min: 0.0 is not possible; allowed: 0.001 to 1e+06"),
        (snas, {"resource": -1.0}, "method.options.resource: -1.0 is not possible; allowed: a finite number >= 0"),
        (snas, {"init_mean": math.nan}, "method.options.init_mean: nan"),
        (snas, {"image": 0}, "method.options.image: 0"),
        (gdas, {"grad": "al"}, "method.options.grad: unknown value 'al'; did you mean 'all'?"),
        (gdas, {"tau_max": math.inf}, "method.options.tau_max: inf"),
        (gdas, {"init_scale": -1.0}, "method.options.init_scale: -1.0"),
        (fair_darts, {"threshold": 1.0}, "method.options.threshold: 1.0 is not possible; allowed: in [0, 1)"),
        (fair_darts, {"norm": "l3"}, "method.options.norm: unknown value 'l3'"),
        (fair_darts, {"keep": "edges"}, "method.options.keep: unknown value 'edges'; did you mean 'edge'?"),
        (fair_darts, {"w01": math.nan}, "method.options.w01: nan"),
        (proxyless, {"mode": "tow"}, "method.options.mode: unknown value 'tow'; did you mean 'two'?"),
        (proxyless, {"weight_steps": 0}, "method.options.weight_steps: 0 is not possible; allowed: >= 1"),
        (proxyless, {"warm_up": 1.0}, "method.options.warm_up: 1.0 is not possible; allowed: in [0, 1)"),
        (proxyless, {"macs": "much"}, "method.options.macs: 'much'"),
        (proxyless, {"macs": "1"}, "method.options.macs: '1' is not possible; allowed: > 1"),
        (bayesnas, {"lambda_ops": 0.0}, "method.options.lambda_ops: 0.0 is not possible; allowed: > 0, finite"),
        (bayesnas, {"pairs": -1}, "method.options.pairs: -1"),
        (bayesnas, {"threshold": -0.1}, "method.options.threshold: -0.1"),
    ],
)
def test_a_bad_option_is_one_line(make: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        make(space=FULL, **options)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_executed_operations_of_each_role() -> None:
    arch, numbers = _arch(0), {"tau": jnp.float32(1.0)}
    for strategy, widths in (
        (gdas(space=FULL), (1, 1, 1)),
        (gdas(space=FULL, grad="all"), (1, 8, 1)),
        (proxyless(space=FULL), (1, 8, 1)),
        (proxyless(space=FULL, mode="two"), (1, 2, 1)),
    ):
        for role, width in zip(("weights", "arch", "eval"), widths, strict=True):
            gates = strategy.sample(jax.random.key(0), arch, (), numbers, role)
            assert gates.executed["normal"].shape == (14, width)
            mask = np.asarray(executed_mask(gates.executed["normal"], 8))
            assert (np.asarray(gates.ops["normal"])[~mask] == 0).all()
            assert (np.asarray(gates.ops["normal"]).sum(axis=1) == 1).all()
