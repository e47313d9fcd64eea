"""Every method of the registry through one test, then the two methods against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from prdarts_jax.bilevel import Batches, Loss, Losses, Optimizers, SearchState
from prdarts_jax.config.search import OPS
from prdarts_jax.data.batches import Batch
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import registry
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategies.prdarts import prdarts
from prdarts_jax.strategy import Strategy

_LISTS = (("skip_connect",), ("none", "max_pool_3x3"), OPS, ("sep_conv_3x3", "skip_connect"), ("dil_conv_5x5",))
SPACES = {
    "full": Space(nodes=2),
    "restricted": Space(nodes=2, edge_ops=(_LISTS, _LISTS[::-1])),
    "two-ops": Space(nodes=2, ops=("skip_connect", "sep_conv_3x3")),
}
METHODS = [row.name for row in registry.rows()]
CE = jnp.float32(1.25)
STEP_SPACE = Space(nodes=1, cells=3, channels=2, classes=3, in_channels=1, ops=("skip_connect", "max_pool_3x3"))


def _make(name: str, space: Space) -> Strategy:
    return registry.factory(name)(space=space)


# --- PR-DARTS ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"executed_ops": 9}, r"method\.options\.executed_ops: 9 .* allowed: 1 to 8"),
        ({"executed_ops": 0}, r"method\.options\.executed_ops: 0"),
        ({"a": 0.0}, r"method\.options\.a: 0\.0 .* allowed: < 0"),
        ({"a": 0.2}, r"method\.options\.a: 0\.2"),
        ({"b": 1.0}, r"method\.options\.b: 1\.0 .* allowed: > 1"),
        ({"tau_min": 0.0}, r"method\.options\.tau_min: 0\.0 .* allowed: 0\.001 to 1e\+06$"),
        ({"tau_min": 1e-45}, r"method\.options\.tau_min: 1e-45 .* allowed: 0\.001 to 1e\+06$"),
        ({"tau_max": float("inf")}, r"method\.options\.tau_max: inf .* allowed: 0\.001 to 1e\+06$"),
        ({"lambda1": float("inf")}, r"method\.options\.lambda1: inf .* allowed: a finite number$"),
        ({"lambda2": float("nan")}, r"method\.options\.lambda2: nan .* allowed: a finite number$"),
        ({"lambda3": -float("inf")}, r"method\.options\.lambda3: -inf .* allowed: a finite number$"),
        ({"hinge": float("inf")}, r"method\.options\.hinge: inf .* allowed: a finite number$"),
        ({"init_scale": float("inf")}, r"method\.options\.init_scale: inf .* allowed: a finite number$"),
        ({"a": -float("inf")}, r"method\.options\.a: -inf .* allowed: a finite number$"),
        ({"tau_max": -1.0}, r"method\.options\.tau_max: -1\.0"),
        ({"tau_min": float("nan")}, r"method\.options\.tau_min: nan"),
        ({"gate_dropout": 1.0}, r"method\.options\.gate_dropout: 1\.0"),
        ({"init_scale": -1e-3}, r"method\.options\.init_scale"),
        ({"op_subsample": "unifrom"}, r"op_subsample: unknown value 'unifrom'; did you mean 'uniform'\?"),
        ({"path_reduction": "summ"}, r"path_reduction: unknown value 'summ'; did you mean 'sum'\?"),
        ({"derive_score": "softmx"}, r"derive_score: unknown value 'softmx'; did you mean 'softmax'\?"),
    ],
)
def test_impossible_options_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prdarts(space=Space(), **option)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tau", [1e-3, 1e6])
def test_gates_are_finite_at_the_ends_of_the_temperatures(tau):
    """Value, P and gradient, over logits far beyond what a search reaches."""
    space = Space()
    strategy = prdarts(space=space, tau_min=tau, tau_max=tau)
    progress = {name: np.float32(value) for name, value in strategy.schedule(0, 2).items()}
    arch = {kind: jnp.linspace(-30.0, 30.0, 112).reshape(14, 8) for kind in ("normal", "reduce")}

    def total(arch):
        gates = strategy.sample(jax.random.key(0), arch, (), progress, "arch")
        penalty, _ = strategy.objective(jnp.zeros(()), arch, gates, (), progress)
        p = strategy.probabilities(arch, progress)
        return sum(jnp.sum(gates.ops[kind]) + jnp.sum(p[kind]) for kind in p) + penalty

    assert all(
        bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(oracles.quick_jit(jax.value_and_grad(total))(arch))
    )


def test_temperature_is_linear_from_the_first_to_the_last_epoch() -> None:
    strategy = prdarts(space=Space(), tau_max=10.0, tau_min=0.1)
    taus = [strategy.schedule(e, 200)["tau"] for e in range(200)]
    np.testing.assert_allclose(taus, np.linspace(10.0, 0.1, 200), rtol=1e-12)
    assert strategy.schedule(0, 1)["tau"] == pytest.approx(0.1), "a search of one epoch ends as all do"


def _brute_force(beta: np.ndarray, space: Space, kind: str, score: str, distinct: bool) -> list[set[tuple[str, int]]]:
    """The pair of (operation, input) pairs with the largest sum of scores, over all pairs of pairs."""
    allowed = space.allowed[kind]
    table = np.where(allowed, np.exp(beta.astype(np.float64)), 0.0)
    if score == "softmax":
        table = table / table.sum(axis=1, keepdims=True)
    nodes = []
    for node in range(2, 2 + space.nodes):
        pairs = [
            (table[e, o], space.ops[o], j)
            for e, (j, n) in enumerate(space.edges)
            for o in range(space.num_ops)
            if n == node and allowed[e, o] and space.ops[o] != "none"
        ]
        teams = [team for team in itertools.combinations(pairs, 2) if not distinct or team[0][2] != team[1][2]]
        # Lexicographic: the best pair first, then the best of the rest, so sums of unlike scores cannot mislead.
        best = max(teams, key=lambda team: sorted((p[0] for p in team), reverse=True))
        nodes.append({(op, j) for _, op, j in best})
    return nodes


@pytest.mark.parametrize("score", ["probability", "softmax"])
@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("space", [Space(), SPACES["two-ops"]], ids=["full", "two-ops"])
def test_derivation_by_brute_force(score: str, distinct: bool, space: Space) -> None:
    strategy = prdarts(space=space, derive_score=score, distinct_inputs=distinct)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        arch = {k: rng.normal(size=(space.num_edges, space.num_ops)).astype(np.float32) for k in CELL_TYPES}
        genotype = strategy.derive(arch)
        for kind, cell in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            assert [set(pairs) for pairs in cell] == _brute_force(arch[kind], space, kind, score, distinct)


@pytest.mark.parametrize("distinct", [True, False])
def test_equal_scores_keep_the_order_of_edges_and_operations(distinct: bool) -> None:
    """Whatever a machine makes of them, equal scores give one genotype."""
    space = Space(nodes=2, ops=("none", "skip_connect", "sep_conv_3x3"))
    genotype = prdarts(space=space, distinct_inputs=distinct).derive({k: np.zeros((5, 3)) for k in CELL_TYPES})
    first = ("skip_connect", 0)
    second = ("skip_connect", 1) if distinct else ("sep_conv_3x3", 0)
    assert genotype.normal == genotype.reduce == ((first, second), (first, second))


def test_scores_of_the_two_kinds_differ() -> None:
    """Edge 0 has the larger beta, but its softmax is shared with another large one."""
    space = Space(nodes=1, ops=("none", "skip_connect", "sep_conv_3x3"))
    beta = np.array([[3.0, 2.0, 1.9], [0.0, 1.0, 0.5]], np.float32)
    arch = {kind: beta for kind in CELL_TYPES}
    pairs = {
        score: prdarts(space=space, derive_score=score, distinct_inputs=False).derive(arch).normal[0]
        for score in ("probability", "softmax")
    }
    assert pairs["probability"] == (("skip_connect", 0), ("sep_conv_3x3", 0))
    assert pairs["softmax"] == (("skip_connect", 1), ("sep_conv_3x3", 1))


@pytest.mark.parametrize("subsample", ["topk_gate", "uniform", "all"])
@pytest.mark.parametrize("straight_through", [False, True])
def test_samples_of_the_options(subsample: str, straight_through: bool) -> None:
    space = Space(nodes=2)
    strategy = prdarts(space=space, op_subsample=subsample, straight_through=straight_through)
    arch = {kind: jax.random.normal(jax.random.key(i), (5, 8)) for i, kind in enumerate(CELL_TYPES)}
    plain = prdarts(space=space, op_subsample="all").sample(jax.random.key(5), arch, (), {"tau": 0.5}, "arch")

    def total(arch: Any) -> Any:
        gates = strategy.sample(jax.random.key(5), arch, (), {"tau": 0.5, "gate_dropout": 0.0}, "arch")
        return sum(jnp.sum(gates.ops[kind] ** 2) for kind in CELL_TYPES), gates

    (_, gates), grads = oracles.quick_jit(jax.value_and_grad(total, has_aux=True))(arch)
    k = 8 if subsample == "all" else 2
    for kind in CELL_TYPES:
        every, mask = np.asarray(plain.ops[kind]), np.asarray(gates.stats["mask"][kind])
        assert (mask.sum(axis=1) == k).all()
        expected = np.where(mask, 1.0 if straight_through else every, 0.0)
        np.testing.assert_allclose(gates.ops[kind], expected, atol=1e-6)
        if subsample == "topk_gate":
            assert (np.where(mask, every, np.inf).min(axis=1) >= np.where(mask, -np.inf, every).max(axis=1)).all()
        bar = (every.astype(np.float64) + 0.1) / 1.2
        slope = np.where((every > 0) & (every < 1) & mask, 1.2 * bar * (1 - bar) / 0.5, 0.0)
        np.testing.assert_allclose(grads[kind], 2 * expected * slope, rtol=1e-3, atol=1e-5)


def test_uniform_choice_ignores_the_gates() -> None:
    space = Space(nodes=1, ops=("skip_connect", "sep_conv_3x3", "max_pool_3x3"))
    strategy = prdarts(space=space, op_subsample="uniform", executed_ops=1)
    arch = {kind: jnp.array([[9.0, 0.0, -9.0]] * 2) for kind in CELL_TYPES}
    sample = jax.jit(jax.vmap(lambda key: strategy.sample(key, arch, (), {"tau": 0.1}, "arch").stats["mask"]["normal"]))
    share = np.asarray(sample(jax.random.split(jax.random.key(0), 3000))).mean(axis=(0, 1))
    np.testing.assert_allclose(share, 1 / 3, atol=4.5 * np.sqrt(2 / 9 / 6000))


def test_expected_gates_execute_the_largest_beta() -> None:
    strategy = prdarts(space=Space(nodes=2))
    arch = {kind: jax.random.normal(jax.random.key(i), (5, 8)) for i, kind in enumerate(CELL_TYPES)}
    gates = strategy.sample(jax.random.key(0), arch, (), {"tau": 1.0}, "eval")
    every = prdarts(space=Space(nodes=2), op_subsample="all").sample(jax.random.key(0), arch, (), {"tau": 1.0}, "eval")
    drawn = jax.vmap(lambda key: strategy.sample(key, arch, (), {"tau": 1.0, "gate_dropout": 0.0}, "arch"))(
        jax.random.split(jax.random.key(1), 4000)
    )
    for kind in CELL_TYPES:
        np.testing.assert_array_equal(gates.executed[kind], np.argsort(-np.asarray(arch[kind]), axis=1)[:, :2])
        taken = np.asarray(drawn.stats["mask"][kind])
        mean = (np.asarray(drawn.ops[kind]) * taken).sum(axis=0) / np.maximum(taken.sum(axis=0), 1)
        for e, o in itertools.product(range(5), range(2)):
            op = int(gates.executed[kind][e, o])
            # The largest of an edge are larger than all: the mean of those that are executed.
            assert float(gates.ops[kind][e, op]) == pytest.approx(mean[e, op], abs=0.04)
            expected = oracles.gate_mean(float(arch[kind][e, op]), 1.0)
            assert float(every.ops[kind][e, op]) == pytest.approx(expected, abs=3e-3)


def test_cell_types_draw_different_noise() -> None:
    arch = {kind: jnp.zeros((5, 8)) for kind in CELL_TYPES}
    strategy = prdarts(space=Space(nodes=2), op_subsample="all")
    gates = strategy.sample(jax.random.key(0), arch, (), {"tau": 1.0}, "arch")
    assert not bool((gates.ops["normal"] == gates.ops["reduce"]).all())


# --- DARTS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_darts_refuses_an_impossible_scale(scale: float) -> None:
    with pytest.raises(UserError, match=r"init_scale: .* is not possible; allowed: a finite number >= 0"):
        darts(space=Space(), init_scale=scale)


def test_darts_is_a_softmax_over_the_allowed_operations() -> None:
    space = SPACES["restricted"]
    strategy = darts(space=space)
    arch = {kind: jax.random.normal(jax.random.key(i), (5, 8)) for i, kind in enumerate(CELL_TYPES)}
    gates = strategy.sample(jax.random.key(0), arch, (), {}, "arch")
    for kind in CELL_TYPES:
        e = np.where(space.allowed[kind], np.exp(np.asarray(arch[kind], np.float64)), 0.0)
        np.testing.assert_allclose(gates.ops[kind], e / e.sum(axis=1, keepdims=True), rtol=1e-5)
        expected = np.where(space.allowed[kind], np.arange(8), 8)
        np.testing.assert_array_equal(gates.executed[kind], expected)

    def squares(arch: Any) -> jax.Array:
        return jnp.sum(strategy.sample(jax.random.key(0), arch, (), {}, "arch").ops["normal"] ** 2)

    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(jax.grad(squares)(arch)))


def _loss_of_a_product() -> Loss:
    """L(w, a) = w a."""
    return Loss(
        gates=lambda weights, arch, *_: Gates({"normal": arch}, {}),
        network=lambda weights, gates, *_: (weights * gates.ops["normal"], jnp.zeros(())),
    )


@pytest.mark.parametrize(("name", "moved"), [("prdarts", (1.0, 0.0)), ("darts", (3.0, -1.0))])
def test_who_moves_first_in_the_two_methods(name: str, moved: tuple[float, float]) -> None:
    """From w = 2 and a = 1 at rate 1: w - a, then a - w; or a - w, then w - a."""
    sgd = optax.with_extra_args_support(optax.sgd(1.0))
    step = _make(name, Space()).rule(Losses(*[_loss_of_a_product()] * 4), Optimizers(sgd, sgd))
    w, a = jnp.float32(2.0), jnp.float32(1.0)
    state = SearchState(jnp.int32(0), w, a, sgd.init(w), sgd.init(a))
    batch = Batch(jnp.zeros(()), jnp.zeros(()))
    new, _ = step(state, Batches(batch, batch), jax.random.key(0), {})
    assert (float(new.weights), float(new.arch)) == moved
