"""SNAS, GDAS, Fair DARTS, ProxylessNAS and the method after BayesNAS, each against a loop of its own in torch or numpy.

The noise of a loop is drawn by the function that the method draws it with, from the key of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax.bilevel import Batches, SearchState
from prdarts_jax.config.search import ArchConfig, WeightsConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates, executed_mask
from prdarts_jax.network.counts import pair_costs, profile, search_costs
from prdarts_jax.optimizers import arch_transform, weight_transform
from prdarts_jax.searching import step as search_step
from prdarts_jax.space.derive import derive_edges
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.bayesnas import bayesnas
from prdarts_jax.strategies.composition import transformed
from prdarts_jax.strategies.fair_darts import fair_darts
from prdarts_jax.strategies.gdas import gdas
from prdarts_jax.strategies.proxyless import pair_noise, proxyless, with_mass_of
from prdarts_jax.strategies.sampling import gumbel_noise
from prdarts_jax.strategies.snas import snas
from prdarts_jax.strategy import Continue, Stop, Strategy, View

OPS = ("none", "skip_connect", "avg_pool_3x3", "dil_conv_3x3")
_LISTS = (OPS, OPS[1::2]), (OPS[::2] + OPS[3:], OPS)  # not all of them on every edge
SPACE = Space(nodes=1, cells=3, channels=4, classes=3, ops=OPS, edge_ops=_LISTS, head_norm=False)
KINDS = ["reduce" if i in SPACE.reductions else "normal" for i in range(3)]
STEPS, IMAGE, BATCH = 3, 6, 4
WEIGHTS = WeightsConfig(learning_rate=0.05, momentum=0.9, nesterov=False, weight_decay=3e-3, clip_norm=math.inf)
EDGES = ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4), (2, 4), (3, 4), (0, 5), (1, 5), (2, 5), (3, 5), (4, 5))


# --- three steps in torch ---------------------------------------------------------------------------------------------


@pytest.fixture
def _double() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _batches(seed: int) -> Batches:
    rng = np.random.default_rng(seed)

    def batch() -> Batch:
        images, labels = rng.normal(size=(BATCH, IMAGE, IMAGE, 3)), rng.integers(0, 3, BATCH)
        return Batch(jnp.asarray(images), jnp.asarray(labels, jnp.int32))

    return Batches(batch(), batch())


def _ours(strategy: Strategy, arch_config: ArchConfig, numbers: dict[str, float]) -> tuple[SearchState, SearchState]:
    """The state before the first step, whose architecture is random, and after the third."""
    parts = {"space": SPACE, "strategy": strategy}
    parts |= {"weight_tx": weight_transform(WEIGHTS), "arch_tx": arch_transform(arch_config)}
    state = oracles.quick_jit(lambda key: search_step.init_state(key, **parts))(jax.random.key(0))
    rng = np.random.default_rng(7)
    wide = {name: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), getattr(state, name)) for name in state_parts}
    wide["arch"] = jax.tree.map(lambda a: a + jnp.asarray(0.7 * rng.normal(size=a.shape)), wide["arch"])
    wide |= {"weight_opt": parts["weight_tx"].init(wide["weights"]), "arch_opt": parts["arch_tx"].init(wide["arch"])}
    before = state.replace(**wide)
    step = oracles.quick_jit(search_step.make_search_step(**parts))
    after = before
    for i in range(STEPS):
        after, _ = step(after, _batches(i), jax.random.key(100 + i), numbers)
    return before, after


state_parts = ("weights", "arch", "memory")


class _Cells:
    """Gates of a network's cells, in the order in which it asks for them."""

    def __init__(self, of_cell: list[Any]) -> None:
        self._next = iter(of_cell)

    def __getitem__(self, kind: str) -> Any:
        return next(self._next)


class _Torch:
    """Weights, architecture and their optimizers in torch, from a state of ours."""

    def __init__(self, state: SearchState, arch_optimizer: Callable[[list[Any]], Any]) -> None:
        self.torch = oracles.require_torch()
        self.weights, self.arch = oracles.torch_leaves(state.weights), oracles.torch_leaves(state.arch)
        options = {"momentum": WEIGHTS.momentum, "weight_decay": WEIGHTS.weight_decay}
        self.weight_opt = self.torch.optim.SGD(jax.tree.leaves(self.weights), WEIGHTS.learning_rate, **options)
        self.arch_opt = arch_optimizer(jax.tree.leaves(self.arch))
        self.allowed = {kind: self.torch.tensor(SPACE.allowed[kind]) for kind in CELL_TYPES}

    def ce(self, gates: Any, batch: Batch) -> Any:
        images = self.torch.tensor(np.asarray(batch.images))
        logits = oracles.torch_supernet(SPACE, self.weights, gates, images)
        return self.torch.nn.functional.cross_entropy(logits, self.torch.tensor(np.asarray(batch.labels)).long())

    def masked(self, kind: str) -> Any:
        return self.arch[kind].masked_fill(~self.allowed[kind], -math.inf)

    def move(self, loss: Any, *optimizers: Any) -> None:
        self.weight_opt.zero_grad()
        self.arch_opt.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def check(self, after: SearchState) -> None:
        for name in ("weights", "arch"):
            ours, theirs = jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(self, name))
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), atol=1e-9, rtol=1e-9, err_msg=name)


def _noise(key: Any, torch: Any, draw: Callable[..., Any] = gumbel_noise) -> dict[str, Any]:
    return {kind: torch.tensor(np.asarray(g, np.float64)) for kind, g in draw(key, SPACE).items()}


def _snas_costs() -> list[dict[str, np.ndarray]]:
    """Size, flops and access of each cell, [E,O], by the formulas of the published program, on images of 8 pixels."""
    tables, side, c = [], 8, SPACE.channels
    for kind in KINDS:
        stride = 2 if kind == "reduce" else 1
        side, c = -(-side // stride), c * stride
        y, conv = side**2, 9 * c + c * c
        skip = (0, 0, 2 * c * y) if stride == 1 else (c * c, c * c * y, 3 * c * y + c * c)
        columns = [
            (0, 0, 0),
            skip,
            (0, 9 * y * c, (2 if stride == 1 else 5) * y * c),
            (conv, conv * y, y * ((3 if stride == 1 else 6) * c + c) + conv),
        ]
        tables.append({name: np.array([[column[i] for column in columns]] * 2, float) for i, name in enumerate("sfa")})
    return tables


@pytest.mark.slow
@pytest.mark.reference
def test_three_steps_of_snas(_double: None) -> None:
    strategy = snas(space=SPACE, resource=0.01, image=8)
    config = ArchConfig(optimizer="sgd", learning_rate=0.3, weight_decay=0.0)
    numbers = {"tau": 0.7, "resource": 0.01, "weight_learning_rate": WEIGHTS.learning_rate}
    before, after = _ours(strategy, config, numbers)
    side = _Torch(before, lambda arch: oracles.require_torch().optim.SGD(arch, 0.3))
    torch, costs = side.torch, _snas_costs()
    for i in range(STEPS):
        noise = _noise(jax.random.key(100 + i), torch)
        z = {kind: torch.softmax((side.masked(kind) + noise[kind]) / 0.7, 1) for kind in CELL_TYPES}
        resource = 0.0
        for kind, cell in zip(KINDS, costs, strict=True):
            for table in cell.values():
                resource += (z[kind] * torch.tensor(table)).sum(1).clamp(min=1).log().sum() / 3 / KINDS.count(kind)
        side.move(side.ce(z, _batches(i).train) + 0.01 * resource, side.weight_opt, side.arch_opt)
    side.check(after)


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("grad", ["selected", "all"])
def test_three_steps_of_gdas(_double: None, grad: str) -> None:
    config = ArchConfig(learning_rate=0.03)
    numbers = {"tau": 2.0, "weight_learning_rate": WEIGHTS.learning_rate}
    before, after = _ours(gdas(space=SPACE, grad=grad), config, numbers)
    side = _Torch(before, _adam(config))
    torch = side.torch

    def gates(key: Any) -> dict[str, Any]:
        noise, drawn = _noise(key, torch), {}
        for kind in CELL_TYPES:
            p = torch.softmax((torch.log_softmax(side.masked(kind), 1) + noise[kind]) / 2.0, 1)
            one = torch.nn.functional.one_hot(p.argmax(1), len(OPS)).double()
            through = p - p.detach() + one
            drawn[kind] = through * one if grad == "selected" else through
        return drawn

    for i in range(STEPS):
        weight_key, arch_key = jax.random.split(jax.random.key(100 + i))
        side.move(side.ce(gates(weight_key), _batches(i).train), side.weight_opt)
        side.move(side.ce(gates(arch_key), _batches(i).val), side.arch_opt)
    side.check(after)


def _adam(config: ArchConfig) -> Callable[[list[Any]], Any]:
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    adam = oracles.require_torch().optim.Adam
    return lambda arch: adam(arch, config.learning_rate, betas, config.eps, decay)


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_three_steps_of_fair_darts(_double: None, norm: str) -> None:
    config = ArchConfig(learning_rate=0.03, beta1=0.9)
    numbers = {"w01": 10.0, "weight_learning_rate": WEIGHTS.learning_rate}
    before, after = _ours(fair_darts(space=SPACE, norm=norm), config, numbers)
    side = _Torch(before, _adam(config))
    loss = side.torch.nn.MSELoss() if norm == "l2" else side.torch.nn.L1Loss()
    for i in range(STEPS):
        w = {kind: side.torch.sigmoid(side.arch[kind]) for kind in CELL_TYPES}
        entries = side.torch.cat([w[kind][side.allowed[kind]] for kind in CELL_TYPES])
        zero_one = loss(entries, side.torch.full_like(entries, 0.5))
        side.move(side.ce(w, _batches(i).val) - 10 * zero_one, side.arch_opt)
        w = {kind: side.torch.sigmoid(side.arch[kind]) for kind in CELL_TYPES}
        side.move(side.ce(w, _batches(i).train), side.weight_opt)
    side.check(after)


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize("mode", ["full", "two"])
def test_three_steps_of_proxyless(_double: None, mode: str) -> None:
    """The gradient of alpha is made of those of the gates by the double sum, and two updated entries are rescaled."""
    config = ArchConfig(learning_rate=0.03, beta1=0.0, weight_decay=0.0)
    numbers = {"weight_learning_rate": WEIGHTS.learning_rate}
    before, after = _ours(proxyless(space=SPACE, mode=mode, weight_steps=1, warm_up=0.0), config, numbers)
    side = _Torch(before, _adam(config))
    torch = side.torch
    for i in range(STEPS):
        weight_key, arch_key = jax.random.split(jax.random.key(100 + i))
        noise = _noise(weight_key, torch)
        path = {k: torch.nn.functional.one_hot((side.masked(k) + noise[k]).argmax(1), len(OPS)) for k in CELL_TYPES}
        side.move(side.ce({k: one.double() for k, one in path.items()}, _batches(i).train), side.weight_opt)
        noise, again = _noise(arch_key, torch), _noise(arch_key, torch, pair_noise)
        gates, involved = {}, {}
        for kind in CELL_TYPES:
            drawn = side.masked(kind).detach() + noise[kind]
            gates[kind] = torch.zeros_like(drawn)
            for e in range(2):
                candidates = torch.isfinite(drawn[e]).nonzero()[:, 0].tolist()
                chosen = int(drawn[e].argmax())
                if mode == "two":
                    candidates = sorted(candidates, key=lambda o, row=drawn[e]: -float(row[o]))[:2]
                    alpha = side.arch[kind].detach()
                    chosen = max(candidates, key=lambda o, k=kind, e=e, a=alpha: float(a[e, o] + again[k][e, o]))
                involved[kind, e] = candidates
                gates[kind][e, chosen] = 1.0
            gates[kind].requires_grad_()
        side.weight_opt.zero_grad()
        side.arch_opt.zero_grad()
        side.ce(gates, _batches(i).val).backward()
        old = {kind: side.arch[kind].detach().clone() for kind in CELL_TYPES}
        for kind in CELL_TYPES:
            side.arch[kind].grad = torch.zeros_like(old[kind])
            for e in range(2):
                among = involved[kind, e]
                p = torch.softmax(old[kind][e, among], 0)
                for x, one in enumerate(among):
                    for y, other in enumerate(among):
                        slope = gates[kind].grad[e, other] * p[y] * (float(x == y) - p[x])
                        side.arch[kind].grad[e, one] += slope
        side.arch_opt.step()
        if mode == "two":
            for (kind, e), among in involved.items():
                with torch.no_grad():
                    new = side.arch[kind][e, among]
                    side.arch[kind][e, among] -= torch.log(new.exp().sum() / old[kind][e, among].exp().sum())
    side.check(after)


@pytest.mark.slow
@pytest.mark.reference
def test_three_steps_of_bayesnas_and_its_groups_afterwards(_double: None) -> None:
    strategy = bayesnas(space=SPACE, lambda_edges=0.02, lambda_ops=0.03, warm_up=0.0, threshold=0.3)
    config = ArchConfig(optimizer="sgd", learning_rate=0.05, momentum=0.9, weight_decay=0.0)
    before, after = _ours(strategy, config, {"weight_learning_rate": WEIGHTS.learning_rate})
    side = _Torch(before, lambda arch: oracles.require_torch().optim.SGD(arch, 0.05, momentum=0.9))
    torch, squares = side.torch, {"edges": np.zeros((3, 2)), "ops": np.zeros((3, 2, len(OPS)))}
    rows = {kind: [i for i, other in enumerate(KINDS) if other == kind] for kind in CELL_TYPES}
    for i in range(STEPS):
        cells = _Cells([side.arch["edges"][c][:, None] * side.arch["ops"][c] for c in range(3)])
        ce = side.ce(cells, _batches(i).train)
        slopes = torch.autograd.grad(ce, [side.arch["edges"], side.arch["ops"]], retain_graph=True)
        for name, slope in zip(("edges", "ops"), slopes, strict=True):
            squares[name] += BATCH * slope.numpy() ** 2
        lasso = 0.0
        for kind in CELL_TYPES:
            for e in range(2):
                lasso += 0.02 * 0.5 * side.arch["edges"][rows[kind], e].norm()
                for o in range(len(OPS)):
                    if SPACE.allowed[kind][e, o]:
                        lasso += 0.03 * 0.5 * side.arch["ops"][rows[kind], e, o].norm()
        side.move(ce + lasso, side.weight_opt, side.arch_opt)
    side.check(after)
    for name, table in squares.items():
        np.testing.assert_allclose(after.memory["squares"][name], table, rtol=1e-9, atol=1e-20)
    assert float(after.memory["steps"]) == STEPS

    view = View(0, 2, jax.device_get(after.arch), jax.device_get(after.memory), {}, {}, None, None)
    event = strategy.at_epoch(view)
    assert isinstance(event, Continue) and float(event.memory["steps"]) == 0
    wanted: dict[str, Any] = {kind: {} for kind in CELL_TYPES}
    for kind in CELL_TYPES:
        gamma_edge = np.zeros(2)
        for e in range(2):
            omega, gamma_edge[e] = _group(squares["edges"][rows[kind], e], side.arch["edges"][rows[kind], e], 0.02)
            assert float(event.memory["omega"][kind]["edges"][e]) == pytest.approx(omega, rel=1e-6)
            for o in np.flatnonzero(SPACE.allowed[kind][e]):
                h, switch = squares["ops"][rows[kind], e, o], side.arch["ops"][rows[kind], e, o]
                if h.max() == 0:  # `none` gives nothing: no gradient, and no group to prune
                    continue
                omega, own = _group(h, switch, 0.03)
                assert float(event.memory["omega"][kind]["ops"][e, o]) == pytest.approx(omega, rel=1e-6)
                wanted[kind][e, int(o)] = 1 / (1 / own + 1 / gamma_edge[e])
                found = float(event.memory["gamma"][kind]["ops"][e, o])
                assert found == pytest.approx(wanted[kind][e, int(o)], rel=1e-5)
    for threshold in (0.0, *np.quantile([g for table in wanted.values() for g in table.values()], [0.3, 0.7])):
        for pairs in (0, 2):
            other = bayesnas(space=SPACE, lambda_edges=0.02, lambda_ops=0.03, threshold=float(threshold), pairs=pairs)
            stop = other.at_epoch(view._replace(epoch=1))
            assert isinstance(stop, Stop)
            for kind, node in (("normal", stop.genotype.normal), ("reduce", stop.genotype.reduce)):
                left = sorted((-g, e, o) for (e, o), g in wanted[kind].items() if g >= threshold)
                names = [(OPS[o], e) for _, e, o in left]
                if pairs:
                    names = [pair for i, pair in enumerate(names) if pair[1] not in [e for _, e in names[:i]]][:2]
                assert sorted(node[0]) == sorted(names)


def _group(squares: np.ndarray, switch: Any, coefficient: float) -> tuple[float, float]:
    """(omega, gamma) of a group after an epoch: H, C and omega as the program writes them, from gamma = 1/2."""
    hessian = squares / STEPS / coefficient
    c = 1 / (1 / 0.5 + hessian)
    omega = math.sqrt(np.sum(np.abs(-c / 0.5**2 + 1 / 0.5)))
    return omega, float(switch.detach().norm()) / omega


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
