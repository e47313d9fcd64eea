"""The penalty terms against loops in numpy: sections 4.1 and 4.2, and the released program's variants to the letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.test_util import check_grads

from prdarts_jax import regularizers
from prdarts_jax.config.search import OPS
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates, activation_probability
from prdarts_jax.presets import PRESETS
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.prdarts import prdarts

FULL = Space()
SKIP, POOL, CONV = (np.array([part in op for op in OPS]) for part in ("skip", "pool", "conv"))


def _restricted() -> Space:
    """Every edge may use another half of the operations; the third path edge has no convolution."""
    rng = np.random.default_rng(0)
    lists = []
    for e in range(14):
        names = tuple(op for op in OPS if rng.random() < 0.5) or ("skip_connect",)
        lists.append(("none", "skip_connect") if e == 8 else names)
    return Space(edge_ops=(tuple(lists), tuple(lists[::-1])))


SPACES = {"full": FULL, "restricted": _restricted()}


def _random(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((14, 8)).astype(np.float32), rng.random((14, 8)) < 0.3


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_terms_equal_loops(space: Space, kind: str, masked: bool) -> None:
    p, executed = _random(1)
    counted = space.allowed[kind] & (executed if masked else True)
    mask = jnp.asarray(executed) if masked else None
    found = {
        "skip": regularizers.skip_term(jnp.asarray(p), space, mask, kind=kind),
        "nonskip": regularizers.nonskip_term(jnp.asarray(p), space, mask, kind=kind),
        "pool": regularizers.group_term(jnp.asarray(p), POOL, space, kind, mask),
        "sum": regularizers.path_depth_term(jnp.asarray(p), space, mask, kind=kind),
        "mean": regularizers.path_depth_term(jnp.asarray(p), space, mask, kind=kind, reduction="mean"),
    }
    expected = {
        "skip": oracles.group_mean(p, counted & SKIP),
        "nonskip": oracles.group_mean(p, counted & ~SKIP),
        "pool": oracles.group_mean(p, counted & POOL),
        "sum": oracles.path_product(p, counted & CONV, 4, "sum", masked=masked),
        "mean": oracles.path_product(p, counted & CONV, 4, "mean", masked=masked),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    if space is not FULL and kind == "normal" and not masked:
        assert not (counted & CONV)[8].any() and expected["sum"] == 0  # an edge of the path without a convolution


@pytest.mark.parametrize(("h", "factor"), [(7, 1.5), (6, 15 / 14)])
def test_the_mean_over_edges_against_the_literal_zeta(h: int, factor: float) -> None:
    """zeta sum over the edges and, of all but the skip connection, over 1/(O-1) of the operations."""
    p, _ = _random(2)
    zeta = 2 / (h * (h - 1))
    literal = zeta * p[:, SKIP].sum(), zeta * p[:, ~SKIP].sum() / 7
    found = regularizers.skip_term(jnp.asarray(p), FULL), regularizers.nonskip_term(jnp.asarray(p), FULL)
    assert [float(a) / b for a, b in zip(found, literal, strict=True)] == pytest.approx([factor] * 2, rel=1e-5)


def test_path_is_the_chain_from_the_previous_cell() -> None:
    assert [FULL.edges[e] for e in FULL.path_edges] == [(1, 2), (2, 3), (3, 4), (4, 5)]
    p = jnp.zeros((14, 8)).at[np.asarray(FULL.path_edges), 4:].set(1.0)
    assert float(regularizers.path_depth_term(p, FULL)) == 256.0  # 4 convolutions on each of 4 edges
    assert float(regularizers.path_depth_term(p, FULL, reduction="mean")) == 1.0
    assert float(regularizers.path_depth_term(1.0 - p, FULL)) == 0.0


def test_nothing_executed_is_zero_with_finite_gradients() -> None:
    p, nothing = jnp.full((14, 8), 0.5), jnp.zeros((14, 8), bool)
    for term in (regularizers.skip_term, regularizers.nonskip_term, regularizers.path_depth_term):
        value, grad = jax.value_and_grad(lambda p, term=term: term(p, FULL, nothing))(p)
        assert float(value) == 0.0 and bool((grad == 0).all())


def test_gradient_of_the_path_term_is_the_product_of_the_other_edges() -> None:
    p, _ = _random(2)
    grad = np.asarray(jax.grad(lambda p: regularizers.path_depth_term(p, FULL))(jnp.asarray(p)))
    sums = {e: p[e, 4:].sum() for e in FULL.path_edges}
    expected = np.zeros((14, 8))
    for e in FULL.path_edges:
        expected[e, 4:] = np.prod([value for other, value in sums.items() if other != e])
    np.testing.assert_allclose(grad, expected, rtol=1e-5)


def test_derivatives_by_finite_differences() -> None:
    def total(beta: jax.Array) -> jax.Array:
        p = activation_probability(beta, tau=0.5)
        skip, nonskip = regularizers.skip_term(p, FULL), regularizers.nonskip_term(p, FULL)
        return skip + nonskip - 0.1 * regularizers.path_depth_term(p, FULL)

    with jax.enable_x64(True):
        check_grads(jax.jit(total), (jnp.asarray(np.random.default_rng(0).normal(size=(14, 8))),), order=2)


def test_unknown_reduction_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"path_reduction: unknown value 'man'; did you mean 'mean'\?"):
        regularizers.path_depth_term(jnp.ones((14, 8)), FULL, reduction="man")


# --- the whole penalty of the strategy --------------------------------------------------------------------------------


def _by_hand(
    space: Space, beta: Mapping[str, np.ndarray], executed: Mapping[str, np.ndarray], tau: float, o: Mapping[str, Any]
) -> dict[str, float]:
    """Section 4 written out: per cell type and group a mean, the mean of both cell types, then the hinge."""
    p = {k: oracles.sigmoid(beta[k] - tau * np.log(0.1 / 1.1)) for k in CELL_TYPES}
    counted = {k: space.allowed[k] & (executed[k] if o["executed_mask"] else True) for k in CELL_TYPES}

    def group(columns: np.ndarray) -> float:
        mean = 0.5 * sum(oracles.group_mean(p[k], counted[k] & columns) for k in CELL_TYPES)
        return max(0.0, mean - o["hinge"])

    rest = group(~SKIP & ~POOL) + group(POOL) if o["pool_group"] else group(~SKIP)
    path = 0.5 * sum(
        oracles.path_product(p[k], counted[k] & CONV, 4, o["path_reduction"], masked=o["executed_mask"])
        for k in CELL_TYPES
    )
    return {"skip": 0.01 * group(SKIP), "nonskip": 0.005 * rest, "path": -0.005 * path}


_PAPER = {"executed_mask": False, "hinge": 0.0, "pool_group": False, "path_reduction": "sum"}


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_penalty_of_the_presets_by_hand(preset: str, space: Space, tau: float) -> None:
    options = PRESETS[preset].options
    strategy = prdarts(space=space, **options)
    rng = np.random.default_rng(7)
    beta = {k: rng.normal(scale=2.0, size=(14, 8)).astype(np.float32) - 1.0 for k in CELL_TYPES}
    arch = {k: jnp.asarray(v) for k, v in beta.items()}
    progress = {**strategy.schedule(0, 2), "tau": tau}
    gates = strategy.sample(jax.random.key(0), arch, (), progress, "arch")
    executed = {k: np.asarray(gates.stats["mask"][k]) for k in CELL_TYPES}
    total, terms = strategy.objective(jnp.zeros(()), arch, gates, (), progress)
    expected = _by_hand(space, beta, executed, tau, {**_PAPER, **{k: options[k] for k in _PAPER if k in options}})
    assert set(terms) == set(expected)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=2e-5, abs=1e-8), name
    assert float(total) == pytest.approx(sum(expected.values()), rel=1e-4, abs=1e-8)


def test_masks_are_those_of_the_choice_even_where_a_gate_is_zero() -> None:
    """An executed gate clipped to 0 still counts in the penalty: its P is what the penalty pushes."""
    strategy = prdarts(space=FULL, executed_mask=True)
    arch = {kind: jnp.full((14, 8), -50.0) for kind in CELL_TYPES}
    gates = strategy.sample(jax.random.key(0), arch, (), {"tau": 0.1, "gate_dropout": 0.0}, "arch")
    assert all(bool((gates.ops[kind] == 0).all()) for kind in CELL_TYPES)
    assert all(gates.stats["mask"][kind].sum(axis=1).tolist() == [2] * 14 for kind in CELL_TYPES)


def test_hinge_stops_the_pull_below_its_level() -> None:
    strategy = prdarts(space=FULL, hinge=0.2, lambda3=0.0)
    progress = strategy.schedule(1, 2)
    for logit, moves in ((-3.0, False), (3.0, True)):
        arch = {kind: jnp.full((14, 8), logit) for kind in CELL_TYPES}
        grads = jax.grad(lambda arch: strategy.objective(jnp.zeros(()), arch, Gates({}, {}), (), progress)[0])(arch)
        assert all(bool((grads[kind] != 0).all()) is moves for kind in CELL_TYPES)
