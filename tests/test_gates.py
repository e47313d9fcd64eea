"""The gates against the closed forms of section 4.1 and Theorem 3."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads

from prdarts_jax import gates
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.prdarts import prdarts

BETAS = np.linspace(-4.0, 4.0, 9)
TAUS = (10.0, 2.0, 1.0, 0.5, 0.1)
SAMPLES = 200_000
SIGMAS = 4.5  # two-sided: seven in a million for each comparison


@pytest.fixture(scope="module")
def draws() -> dict[float, np.ndarray]:
    """tau -> [SAMPLES, betas] sampled gates."""
    beta = jnp.broadcast_to(jnp.asarray(BETAS, jnp.float32), (SAMPLES, len(BETAS)))
    sample = jax.jit(lambda key, tau: gates.hard_concrete(key, beta, tau=tau))
    return {tau: np.asarray(sample(jax.random.key(i), jnp.float32(tau))) for i, tau in enumerate(TAUS)}


def _assert_frequency(hits: np.ndarray, probability: np.ndarray) -> None:
    error = np.sqrt(probability * (1 - probability) / hits.shape[0])
    assert np.all(np.abs(hits.mean(axis=0) - probability) <= SIGMAS * error + 2 / hits.shape[0])


@pytest.mark.parametrize("tau", TAUS)
def test_theorem_3_by_monte_carlo(draws: dict[float, np.ndarray], tau: float) -> None:
    formula = oracles.sigmoid(BETAS - tau * np.log(0.1 / 1.1))
    _assert_frequency(draws[tau] != 0, formula)
    np.testing.assert_allclose(gates.activation_probability(jnp.asarray(BETAS, jnp.float32), tau=tau), formula, 2e-6)


@pytest.mark.parametrize("tau", TAUS)
def test_distribution_of_the_gates(draws: dict[float, np.ndarray], tau: float) -> None:
    for x in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 1e-6):
        _assert_frequency(draws[tau] <= x, oracles.gate_cdf(x, BETAS, tau))
    assert draws[tau].min() >= 0 and draws[tau].max() <= 1


def test_theorem_3_of_another_interval() -> None:
    beta = jnp.full((SAMPLES, 1), 0.3)
    g = gates.hard_concrete(jax.random.key(5), beta, tau=0.7, a=-0.3, b=1.2)
    formula = oracles.sigmoid([0.3 - 0.7 * np.log(0.3 / 1.2)])
    _assert_frequency(np.asarray(g != 0), formula)
    np.testing.assert_allclose(gates.activation_probability(beta[0], tau=0.7, a=-0.3, b=1.2), formula, 1e-6)


@pytest.mark.parametrize(
    ("tau", "value", "slope"), [(1.0, 0.9167, 0.0764), (0.1, 0.5597, 0.2464), (10.0, 1.0, 3.856e-11)]
)
def test_figures_of_the_activation_probability_at_beta_zero(tau: float, value: float, slope: float) -> None:
    with jax.enable_x64(True):
        p, dp = jax.value_and_grad(lambda beta: gates.activation_probability(beta, tau=tau))(jnp.zeros(()))
    assert float(p) == pytest.approx(value, abs=5e-5)
    assert float(dp) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("tau", [2.0, 0.5])
def test_gradient_is_the_closed_form_and_zero_where_clipped(tau: float) -> None:
    key, beta = jax.random.key(1), jax.random.normal(jax.random.key(2), (4000,))
    g, pull = jax.vjp(lambda beta: gates.hard_concrete(key, beta, tau=tau), beta)
    (slope,) = pull(jnp.ones_like(g))
    clipped = (g == 0) | (g == 1)
    assert 0.02 < float(clipped.mean()) < 0.98
    assert bool((slope[clipped] == 0).all())
    bar = (np.asarray(g, np.float64) + 0.1) / 1.2
    np.testing.assert_allclose(slope[~clipped], (1.2 * bar * (1 - bar) / tau)[~clipped], rtol=2e-4)


def test_gradient_at_the_ends_of_the_interval_is_zero() -> None:
    slope = jax.vmap(jax.grad(gates._clip01))(jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0]))
    assert slope.tolist() == [0, 0, 1, 0, 0]


def test_derivatives_to_second_order_where_smooth() -> None:
    with jax.enable_x64(True):
        u, beta = jnp.linspace(0.3, 0.7, 6), jnp.linspace(-0.5, 0.5, 6)
        check_grads(jax.jit(lambda beta: gates.stretched(u, beta, tau=1.0, a=-0.1, b=1.1)), (beta,), order=2)
        check_grads(jax.jit(lambda beta: gates.activation_probability(beta, tau=0.7)), (beta,), order=2)


def test_uniform_open_never_returns_an_end() -> None:
    shape = (2**22,)
    keys = (key for i in range(40) if bool((jax.random.uniform(key := jax.random.key(i), shape) == 0).any()))
    key = next(keys)  # jax.random.uniform returns 0 with this key, so the exclusion is put to the test
    u = gates.uniform_open(key, shape)
    assert float(u.min()) > 0 and float(u.max()) < 1
    g = gates.hard_concrete(key, jnp.zeros(shape), tau=0.1)
    assert bool(jnp.isfinite(g).all())


def test_same_key_same_gates_other_key_other_gates() -> None:
    beta = jnp.zeros((14, 8))
    first, again, other = (gates.hard_concrete(jax.random.key(i), beta, tau=1.0) for i in (0, 0, 1))
    assert bool((first == again).all()) and not bool((first == other).all())


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.1), (0.1, 1.1), (-0.1, 1.0), (-0.1, 0.9), (float("nan"), 1.1)])
def test_interval_must_reach_beyond_zero_and_one(a: float, b: float) -> None:
    for call in (
        lambda: gates.hard_concrete(jax.random.key(0), jnp.zeros(2), tau=1.0, a=a, b=b),
        lambda: gates.activation_probability(jnp.zeros(2), tau=1.0, a=a, b=b),
    ):
        with pytest.raises(UserError, match=r"method\.options\.[ab]: .* allowed: [<>] [01]"):
            call()


@pytest.mark.parametrize("tau", TAUS)
def test_expected_gate_is_the_mean(draws: dict[float, np.ndarray], tau: float) -> None:
    mean = np.asarray(gates.expected_gate(jnp.asarray(BETAS, jnp.float32), tau=tau))
    # The midpoint rule with n points is off by at most 1/(2n) for a monotone integrand in [0,1].
    np.testing.assert_allclose(mean, [oracles.gate_mean(beta, tau) for beta in BETAS], atol=1 / 512)
    error = draws[tau].std(axis=0) / np.sqrt(SAMPLES)
    assert np.all(np.abs(draws[tau].mean(axis=0) - mean) <= SIGMAS * error + 1 / 512)


# --- the choice of the executed operations ----------------------------------------------------------------------------


def _many(scores: np.ndarray, allowed: np.ndarray, k: int, count: int = 6000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(3), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: gates.top_k(key, jnp.asarray(scores), allowed, k)))(keys))


def test_top_k_is_argsort_without_ties() -> None:
    scores = jax.random.normal(jax.random.key(0), (14, 8))
    best = np.argsort(-np.asarray(scores), axis=1)
    for k in (1, 2, 8):
        np.testing.assert_array_equal(gates.top_k(jax.random.key(1), scores, np.ones((14, 8), bool), k), best[:, :k])


def test_ties_are_broken_uniformly() -> None:
    """All ordered pairs of four equal operations are equally frequent (chi-square, 11 degrees of freedom)."""
    chosen = _many(np.zeros((1, 4), np.float32), np.ones((1, 4), bool), 2)[:, 0]
    assert np.all(chosen[:, 0] != chosen[:, 1])
    counts = np.bincount(chosen[:, 0] * 4 + chosen[:, 1], minlength=16)[[1, 2, 3, 4, 6, 7, 8, 9, 11, 12, 13, 14]]
    expected = len(chosen) / 12
    assert counts.sum() == len(chosen)
    assert np.sum((counts - expected) ** 2 / expected) < 37.4  # the 99.99 % quantile


def test_ties_of_edges_are_independent() -> None:
    chosen = _many(np.zeros((2, 2), np.float32), np.ones((2, 2), bool), 1)[:, :, 0]
    together = np.mean(chosen[:, 0] == chosen[:, 1])
    assert abs(together - 0.5) < SIGMAS * 0.5 / np.sqrt(len(chosen))


def test_ties_behind_a_clear_winner() -> None:
    chosen = _many(np.array([[1.0, 0.5, 0.5, 0.0]], np.float32), np.ones((1, 4), bool), 2)[:, 0]
    assert np.all(chosen[:, 0] == 0) and set(chosen[:, 1]) == {1, 2}
    assert abs(np.mean(chosen[:, 1] == 1) - 0.5) < SIGMAS * 0.5 / np.sqrt(len(chosen))


def test_top_k_never_takes_what_is_not_allowed() -> None:
    allowed = np.array([[True, False, True], [False, True, False]])
    chosen = gates.top_k(jax.random.key(0), jnp.array([[0.1, 9.0, 0.2], [0.0, -5.0, 9.0]]), allowed, 2)
    assert chosen.tolist() == [[2, 0], [1, 3]]  # 3: one past the last, executes nothing
    assert chosen.dtype == jnp.int32
    assert gates.all_ops(allowed).tolist() == [[0, 3, 2], [3, 1, 3]]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gate_dropout_changes_the_choice_with_its_probability(dropout: float) -> None:
    """Gates (1, 0, 0): the 1 wins unless dropped; dropped (probability p) it ties with those zeros that are not.

    P(chosen) = (1-p) + p E[1/(1+Bin(2, 1-p))], and E[1/(1+Bin(m, q))] = (1 - (1-q)^(m+1)) / ((m+1) q).
    """
    space = Space(nodes=1, ops=("skip_connect", "sep_conv_3x3", "max_pool_3x3"))
    strategy = prdarts(space=space, executed_ops=1, gate_dropout=dropout, op_subsample="topk_gate")
    arch = {kind: jnp.full((2, 3), -40.0).at[:, 0].set(40.0) for kind in CELL_TYPES}
    numbers = {"tau": 0.1, "gate_dropout": dropout}
    sample = jax.vmap(lambda key: strategy.sample(key, arch, (), numbers, "arch").stats["mask"])
    masks = jax.jit(sample)(jax.random.split(jax.random.key(0), 4000))
    won = np.concatenate([np.asarray(masks[kind][:, :, 0]).reshape(-1) for kind in CELL_TYPES])
    keep = 1 - dropout
    expected = keep + dropout * (1 - (1 - keep) ** 3) / (3 * keep)
    assert abs(won.mean() - expected) <= SIGMAS * np.sqrt(expected * (1 - expected) / won.size)


def test_void_zeros_voids_exact_zeros_only() -> None:
    ops = jnp.array([[0.0, 0.5, 1.0], [0.0, 0.0, 1e-30]])
    executed = jnp.array([[0, 1], [3, 2]], jnp.int32)
    assert gates.void_zeros(executed, ops).tolist() == [[3, 1], [3, 2]]


def test_straight_through_is_one_forward_and_the_identity_backward() -> None:
    value, slope = jax.value_and_grad(lambda g: 3.0 * gates.straight_through(g))(jnp.float32(0.25))
    assert float(value) == 3.0 and float(slope) == 3.0


def test_saturated_share_counts_allowed_gates_only() -> None:
    allowed = np.array([[True, True, False], [True, True, True]])
    assert float(gates.saturated_share(jnp.array([[0.0, 0.5, 1.0], [1.0, 0.2, 0.3]]), allowed)) == pytest.approx(2 / 5)


# --- the container ----------------------------------------------------------------------------------------------------


def test_slots_and_dense_are_the_same_multipliers() -> None:
    ops = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    executed = jnp.array([[2, 3], [0, 1]], jnp.int32)
    for edges, factor in ((None, [1.0, 1.0]), ({"normal": jnp.array([2.0, 10.0])}, [2.0, 10.0])):
        g = Gates({"normal": ops}, {"normal": executed}, edges)
        values, found = g.terms("normal")
        np.testing.assert_allclose(values, np.array([[0.3, 0.0], [0.4, 0.5]]) * np.array(factor)[:, None], rtol=1e-6)
        np.testing.assert_array_equal(found, executed)
        dense = np.array([[0.0, 0.0, 0.3], [0.4, 0.5, 0.0]]) * np.array(factor)[:, None]
        np.testing.assert_allclose(g.dense("normal"), dense, rtol=1e-6)


def test_gates_of_a_cell_pick_its_row_where_there_is_one() -> None:
    ops = jnp.arange(24.0).reshape(2, 3, 4)
    executed = jnp.zeros((3, 1), jnp.int32)
    edges = jnp.arange(6.0).reshape(2, 3)
    cell = Gates({"reduce": ops}, {"reduce": executed}, {"reduce": edges}).of_cell("reduce", 1)
    np.testing.assert_array_equal(cell.ops["reduce"], ops[1])
    np.testing.assert_array_equal(cell.executed["reduce"], executed)
    assert cell.edges is not None
    np.testing.assert_array_equal(cell.edges["reduce"], edges[1])


# --- the mean of what is executed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "k", "dropout"), [(10.0, 2, 0.0), (1.0, 2, 0.0), (0.1, 2, 0.0), (1.0, 1, 0.4), (0.1, 3, 0.4)]
)
def test_the_mean_of_an_executed_gate_by_monte_carlo(tau: float, k: int, dropout: float) -> None:
    """Gates drawn in numpy, the K largest of an edge taken with ties broken at random, and averaged where taken."""
    rng = np.random.default_rng(0)
    beta = np.array([[0.0] * 8, [1.0, -1.0, 0.5, 0.0, 2.0, -2.0, 0.3, -0.3]])
    allowed = np.array([[True] * 8, [True] * 6 + [False] * 2])
    u = rng.uniform(1e-9, 1 - 1e-9, (100_000, 2, 8))
    g = np.clip(-0.1 + 1.2 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + beta) / tau)), 0, 1)
    scores = np.where(allowed, g - (rng.uniform(size=g.shape) < dropout), -9.0)
    order = np.lexsort((rng.uniform(size=g.shape), -scores), axis=2)
    taken = np.argsort(order, axis=2) < k
    mean = (g * taken).sum(axis=0) / np.maximum(taken.sum(axis=0), 1)
    found = gates.expected_executed(jnp.asarray(beta, jnp.float32), allowed, k, tau=tau, dropout=dropout)
    error = 5 * np.sqrt(0.25 / np.maximum(taken.sum(axis=0), 1)) + 3e-3
    assert (np.abs(np.asarray(found) - mean) < error)[allowed].all(), (found, mean)
    assert (np.asarray(found)[~allowed] == 0).all()


def test_the_mean_of_an_executed_gate_has_its_limits() -> None:
    """All executed: E[g]. Measured at beta 0, two of eight: .56, .88 and .98 at temperatures 10, 1 and .1."""
    beta, everything = jnp.zeros((1, 8)), np.ones((1, 8), bool)
    for tau, expected in ((10.0, 0.56), (1.0, 0.88), (0.1, 0.98)):
        two = float(gates.expected_executed(beta, everything, 2, tau=tau)[0, 0])
        assert two == pytest.approx(expected, abs=0.01)
        assert float(gates.expected_executed(beta, everything, 8, tau=tau)[0, 0]) == pytest.approx(0.5, abs=2e-3)


def test_edges_without_a_gradient_by_hand() -> None:
    g = jnp.array([[0.0, 0.3, 1.0], [0.2, 1.0, 0.0], [0.0, 0.0, 1.0]])
    executed = jnp.array([[True, False, True], [True, True, False], [True, True, True]])
    assert float(gates.share_without_gradient(g, executed)) == pytest.approx(2 / 3)
    assert float(gates.saturated_share(g, executed)) == pytest.approx(6 / 7)


@pytest.mark.parametrize("tau", TAUS)
def test_regimes_by_monte_carlo(draws: dict[float, np.ndarray], tau: float) -> None:
    found = gates.regimes(jnp.asarray(BETAS, jnp.float32), tau=tau)
    hits = (draws[tau] == 0, (draws[tau] > 0) & (draws[tau] < 1), draws[tau] == 1)
    for counted, probability in zip(hits, found, strict=True):
        _assert_frequency(counted, np.clip(np.asarray(probability, np.float64), 0, 1))


@pytest.mark.parametrize(
    ("k", "beta"), [(1, [0.0] * 8), (2, [0.0] * 8), (2, [1.0, -1.0, 0.5, 0.0, 2.0]), (3, [0.0] * 3)]
)
def test_shares_without_gradient_by_monte_carlo(k: int, beta: list[float]) -> None:
    """Gates drawn in numpy, sorted, and the K largest looked at."""
    rng = np.random.default_rng(k)
    u = rng.uniform(1e-9, 1 - 1e-9, (SAMPLES, len(beta)))
    for tau in (1.0, 0.5, 0.1):
        g = np.clip(-0.1 + 1.2 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + np.array(beta)) / tau)), 0, 1)
        executed = np.sort(g, axis=1)[:, -k:]
        inside = ((executed > 0) & (executed < 1)).sum(axis=1)
        share, edge = gates.shares_without_gradient(jnp.asarray(beta), k, tau=tau)
        _assert_frequency(inside == 0, np.asarray(edge, np.float64))
        spread = 5 * (inside / k).std() / np.sqrt(SAMPLES) + 1e-6
        assert abs(float(share) - (1 - inside.mean() / k)) < spread


def test_shares_without_gradient_at_beta_zero() -> None:
    """Two of eight: what a user of the paper's settings meets at temperatures 10, 1, .5 and .1."""
    found = [[float(s) for s in gates.shares_without_gradient(jnp.zeros(8), 2, tau=t)] for t in (10.0, 1.0, 0.5, 0.1)]
    np.testing.assert_allclose(found, [[0, 0], [0.320, 0.139], [0.732, 0.586], [0.969, 0.943]], atol=1e-3)
