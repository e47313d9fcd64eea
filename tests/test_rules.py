"""The update rules against closed forms: quadratic losses whose hypergradient is known, and finite differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from prdarts_jax import bilevel
from prdarts_jax.bilevel import Batches, Loss, Losses, Optimizers, Rule, SearchState
from prdarts_jax.config.search import WeightsConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.gates import Gates
from prdarts_jax.optimizers import weight_transform

RNG = np.random.default_rng(0)
N, M = 5, 3  # weights, architecture parameters
ROOT = RNG.normal(size=(N, N))
H = ROOT @ ROOT.T / N + np.eye(N)
P, C, D = RNG.normal(size=(N, M)), RNG.normal(size=N), RNG.normal(size=M)
W, A, V = RNG.normal(size=N), RNG.normal(size=M), RNG.normal(size=N)
ETA, MU, DECAY, RHO = 0.07, 0.9, 0.03, 0.4
KEY = jax.random.key(3)


def _network(weights: Any, gates: Gates, batch: Batch, key: jax.Array, numbers: Any) -> tuple[jax.Array, jax.Array]:
    """1/2 (w - P a)' H (w - P a) on the train batch, 1/2 |w - c|^2 + 1/2 |a - d|^2 on the other."""
    w, a = weights["w"], gates.ops["normal"][0]
    apart = w - P @ a
    train, val = 0.5 * apart @ H @ apart, 0.5 * jnp.sum((w - C) ** 2) + 0.5 * jnp.sum((a - D) ** 2)
    return jnp.where(batch.labels[0] == 0, train, val), jnp.zeros(())


def _gates(weights: Any, arch: Any, memory: Any, batch: Batch, key: jax.Array, numbers: Any) -> Gates:
    ops = {kind: arch["a"][None] for kind in ("normal", "reduce")}
    return Gates(ops, {kind: jnp.arange(M)[None] for kind in ops})


def _penalty(ce: Any, arch: Any, gates: Gates, memory: Any, numbers: Any) -> tuple[Any, dict[str, Any]]:
    """Three terms: of the architecture alone, of the gates, and one in proportion to the cross-entropy."""
    terms = {
        "square": RHO * jnp.sum(arch["a"] ** 2),
        "gates": jnp.sum(gates.ops["normal"] ** 3),
        "times": ce * jnp.sum(gates.ops["reduce"]),
    }
    return ce + sum(terms.values()), terms


def _losses(objective: Any = None, weight_objective: Any = None) -> Losses:
    plain, full, weight = (Loss(_gates, _network, one) for one in (None, objective, weight_objective))
    return Losses(plain, full, weight, weight)


def _batches() -> Batches:
    images = jnp.zeros((1, 1, 1, 1))
    return Batches(*(Batch(images, jnp.array([of], jnp.int32)) for of in (0, 1)))


def _after(
    rule: Rule, losses: Losses, *, numbers: dict[str, float] | None = None, steps: int = 1, **optimizers: Any
) -> tuple[SearchState, dict[str, Any]]:
    """The state after some steps from (W, A), and the metrics of the last one; gradients are taken at rate 1."""
    weight_tx = optimizers.get("weights", optax.inject_hyperparams(optax.sgd)(ETA))
    arch_tx = optimizers.get("arch", optax.sgd(1.0))
    weights, arch = {"w": jnp.asarray(W)}, {"a": jnp.asarray(A)}
    state = SearchState(jnp.int32(0), weights, arch, weight_tx.init(weights), arch_tx.init(arch))
    if "velocity" in optimizers:
        state = dataclasses.replace(state, weight_opt=optimizers["velocity"](state.weight_opt))
    step = rule(losses, Optimizers(*map(optax.with_extra_args_support, (weight_tx, arch_tx))))
    for i in range(steps):
        state, metrics = step(state, _batches(), jax.random.fold_in(KEY, i), numbers or {"weight_learning_rate": ETA})
    return state, metrics


@pytest.fixture(autouse=True)
def _double() -> Any:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _grad_train(w: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slope = H @ (w - P @ a)
    return slope, -P.T @ slope


def _with_velocity(opt: Any) -> Any:
    """The state of an optimizer whose momentum has the velocity V."""
    where = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
    return jax.tree.map(lambda n: n._replace(trace={"w": jnp.asarray(V)}) if where(n) else n, opt, is_leaf=where)


# --- hypergradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_unrolled_is_the_closed_form(exact: bool) -> None:
    """d/da L_val(w - eta (mu v + H (w - P a) + d w), a), with a clipping that the virtual step does not see."""
    config = WeightsConfig(learning_rate=ETA, momentum=MU, nesterov=False, weight_decay=DECAY, clip_norm=1e-3)
    state, metrics = _after(
        bilevel.unrolled(exact), _losses(), weights=weight_transform(config), velocity=_with_velocity
    )
    ahead = W - ETA * (MU * V + H @ (W - P @ A) + DECAY * W)
    hyper = (A - D) + ETA * P.T @ H @ (ahead - C)
    np.testing.assert_allclose(A - state.arch["a"], hyper, rtol=1e-9)
    # The weights then move with the optimizer's own step, which clips.
    slope = _grad_train(W, np.asarray(state.arch["a"]))[0]
    moved = ETA * (MU * V + 1e-3 * slope / np.linalg.norm(slope) + DECAY * W)
    np.testing.assert_allclose(W - state.weights["w"], moved, rtol=1e-9)
    assert float(metrics["val_loss"]) == pytest.approx(0.5 * np.sum((ahead - C) ** 2) + 0.5 * np.sum((A - D) ** 2))


@pytest.mark.parametrize("exact", [False, True])
def test_unrolled_with_an_objective_by_finite_differences(exact: bool) -> None:
    """The whole function a -> objective(L_val(w'(a), a), a), differentiated numerically."""
    state, _ = _after(bilevel.unrolled(exact), _losses(_penalty))

    def loss(a: np.ndarray) -> float:
        w = W - ETA * _grad_train(W, a)[0]
        ce = 0.5 * np.sum((w - C) ** 2) + 0.5 * np.sum((a - D) ** 2)
        return float(ce + RHO * np.sum(a**2) + np.sum(a**3) + ce * np.sum(a))

    np.testing.assert_allclose(A - state.arch["a"], _numerical(loss, A), rtol=1e-6)


def test_without_a_learning_rate_there_is_no_virtual_step() -> None:
    from prdarts_jax.errors import UserError

    with pytest.raises(UserError, match=r"weights.transform: the unrolled step needs its learning rate"):
        _after(bilevel.unrolled(), _losses(), weights=optax.sgd(ETA))  # the numbers have a rate that it does not take


def _numerical(f: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    steps = 1e-6 * np.eye(len(at))
    return np.array([(f(at + e) - f(at - e)) / 2e-6 for e in steps])


# --- the other rules --------------------------------------------------------------------------------------------------


def test_the_weights_alone_move_as_in_their_half() -> None:
    """w - eta H (w - P a), a at rest with the state of its optimizer; a penalty of the architecture has no say."""
    state, metrics = _after(bilevel.weights_alone, _losses(_penalty), arch=optax.sgd(1.0, momentum=0.9))
    np.testing.assert_allclose(state.weights["w"], W - ETA * H @ (W - P @ A), rtol=1e-5)
    np.testing.assert_array_equal(state.arch["a"], jnp.asarray(A))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.arch_opt)) and int(state.step) == 1
    assert metrics.keys() == {"train_loss", "train_accuracy", "gradient_norm/weights", "update_norm/weights"}


@pytest.mark.parametrize("first", ["weights", "arch"])
def test_alternating_by_hand(first: str) -> None:
    state, _ = _after(bilevel.alternating(first), _losses(_penalty))
    w, a = W, A
    for group in (first, "arch" if first == "weights" else "weights"):
        if group == "weights":
            w = w - ETA * _grad_train(w, a)[0]
        else:
            ce = 0.5 * np.sum((w - C) ** 2) + 0.5 * np.sum((a - D) ** 2)
            a = a - ((a - D) * (1 + np.sum(a)) + 2 * RHO * a + 3 * a**2 + ce)
    np.testing.assert_allclose(state.weights["w"], w, rtol=1e-12)
    np.testing.assert_allclose(state.arch["a"], a, rtol=1e-9)


def test_the_norms_of_the_terms_are_those_of_their_gradients() -> None:
    _, metrics = _after(bilevel.alternating("arch"), _losses(_penalty))
    ce = 0.5 * np.sum((W - C) ** 2) + 0.5 * np.sum((A - D) ** 2)
    expected = {
        "cross_entropy": A - D,
        "square": 2 * RHO * A,
        "gates": 3 * A**2,
        "times": (A - D) * np.sum(A) + ce,
    }
    for name, slope in expected.items():
        assert float(metrics[f"gradient_norm/{name}"]) == pytest.approx(np.linalg.norm(slope), rel=1e-9), name
    assert float(metrics["penalty/total"]) == pytest.approx(
        RHO * np.sum(A**2) + np.sum(A**3) + ce * np.sum(A), rel=1e-9
    )


def test_joint_is_both_gradients_of_one_loss_on_one_batch() -> None:
    state, metrics = _after(bilevel.joint(), _losses(_penalty))
    apart = W - P @ A
    ce = 0.5 * apart @ H @ apart
    w_slope, a_slope = _grad_train(W, A)
    factor = 1 + np.sum(A)  # of the cross-entropy in the objective
    np.testing.assert_allclose(state.weights["w"], W - ETA * factor * w_slope, rtol=1e-9)
    np.testing.assert_allclose(state.arch["a"], A - (factor * a_slope + 2 * RHO * A + 3 * A**2 + ce), rtol=1e-9)
    assert float(metrics["train_loss"]) == pytest.approx(ce) and "val_loss" not in metrics


def test_joint_leaves_an_architecture_that_is_off_alone() -> None:
    numbers = {"arch_on": 0.0, "weight_learning_rate": ETA}
    off, metrics = _after(bilevel.joint(), _losses(_penalty), numbers=numbers, arch=optax.adam(0.1))
    on, _ = _after(bilevel.joint(), _losses(_penalty), numbers=numbers | {"arch_on": 1.0}, arch=optax.adam(0.1))
    assert _bits(off.arch) == _bits({"a": A}) and _bits(off.weights) == _bits(on.weights)
    assert _bits(on.arch) != _bits(off.arch) and float(metrics["steps/arch"]) == 0.0


def test_joint_keeps_what_it_observes() -> None:
    """Of the state before the step, and with the gradients that both groups then move along."""

    def observe(state: SearchState, found: Any, batch: Batch) -> Any:
        return state.arch["a"] + 2 * found.arch["a"] + batch.labels[0]

    state, _ = _after(bilevel.joint(observe), _losses(), steps=1)
    np.testing.assert_allclose(state.memory, A + 2 * _grad_train(W, A)[1], rtol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_mixed_level_is_the_stated_sum(scale: float) -> None:
    state, _ = _after(bilevel.mixed_level(scale), _losses())
    np.testing.assert_allclose(state.arch["a"], A - ((A - D) + scale * _grad_train(W, A)[1]), rtol=1e-9)


def test_a_weight_objective_moves_the_weights() -> None:
    def twice(ce: Any, arch: Any, gates: Gates, memory: Any, numbers: Any) -> tuple[Any, dict[str, Any]]:
        return 2 * ce + jnp.sum(arch["a"]), {}

    state, _ = _after(bilevel.alternating(), _losses(None, twice))
    np.testing.assert_allclose(state.weights["w"], W - 2 * ETA * _grad_train(W, A)[0], rtol=1e-12)


# --- halves that are left out -----------------------------------------------------------------------------------------


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("off", "moving"), [("arch", "weights"), ("weights", "arch")])
@pytest.mark.parametrize("rule", [bilevel.alternating(), bilevel.unrolled(), bilevel.mixed_level(), bilevel.joint()])
def test_a_half_that_is_off_leaves_bits_and_state_alone(rule: Rule, off: str, moving: str) -> None:
    weight_tx = optax.inject_hyperparams(optax.sgd)(ETA, momentum=0.9)
    txs = {"weights": weight_tx, "arch": optax.adam(0.1)}
    on, metrics = _after(rule, _losses(), numbers={f"{off}_on": 0.0, "weight_learning_rate": ETA}, **txs)
    start = {"weights": {"w": W}, "arch": {"a": A}}
    names = {"weights": ("weights", "weight_opt"), "arch": ("arch", "arch_opt")}
    assert _bits(getattr(on, off)) == _bits(start[off])
    assert _bits(getattr(on, names[off][1])) == _bits(txs[off].init(jax.tree.map(jnp.asarray, start[off])))
    assert _bits(getattr(on, moving)) != _bits(start[moving])
    assert float(metrics[f"steps/{off}"]) == 0.0 and f"steps/{moving}" not in metrics


def test_weight_steps_between_steps_of_the_architecture() -> None:
    numbers = {"weight_learning_rate": ETA}
    seen = [_after(bilevel.alternating(weight_steps=3), _losses(), numbers=numbers, steps=n) for n in (1, 2, 3)]
    assert [bool((state.arch["a"] == A).all()) for state, _ in seen] == [True, True, False]
    assert [float(metrics["steps/arch"]) for _, metrics in seen] == [0.0, 0.0, 1.0]
    w = W
    for _ in range(3):
        w = w - ETA * _grad_train(w, A)[0]
    np.testing.assert_allclose(seen[2][0].weights["w"], w, rtol=1e-12)
    np.testing.assert_allclose(seen[2][0].arch["a"], A - (A - D), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"first": "arc"}, {"weight_steps": 0}])
def test_alternating_refuses_what_is_no_order(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="allowed: weights"):
        bilevel.alternating(**wrong)


# --- one pass through the network -------------------------------------------------------------------------------------


def _passes(rule: Rule, terms: int) -> tuple[int, int]:
    """How often a step goes through the network, forward and backward, counted in its jaxpr."""

    @jax.custom_vjp
    def marked(w: Any) -> Any:
        return jnp.sin(w)

    # A pass forward is a sine, one backward a tangent.
    marked.defvjp(lambda w: (jnp.sin(w), w), lambda w, slope: (slope * jnp.tan(w),))

    def network(weights: Any, gates: Gates, batch: Batch, key: jax.Array, numbers: Any) -> tuple[Any, Any]:
        return jnp.sum(marked(weights["w"] * jnp.sum(gates.ops["normal"][0]))), jnp.zeros(())

    def objective(ce: Any, arch: Any, gates: Gates, memory: Any, numbers: Any) -> tuple[Any, dict[str, Any]]:
        found = {f"term{i}": (i + 1.0) * jnp.sum(arch["a"] ** 2) * ce for i in range(terms)}
        return ce + sum(found.values()), found

    loss, full = Loss(_gates, network), Loss(_gates, network, objective)
    tx = optax.with_extra_args_support(optax.inject_hyperparams(optax.sgd)(0.1))
    step = rule(Losses(loss, full, loss, loss), Optimizers(tx, tx))
    weights, arch = {"w": jnp.asarray(W)}, {"a": jnp.asarray(A)}
    state = SearchState(jnp.int32(0), weights, arch, tx.init(weights), tx.init(arch))
    text = str(jax.make_jaxpr(step)(state, _batches(), KEY, {"weight_learning_rate": ETA}))
    return text.count(" sin "), text.count(" tan ")


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (bilevel.alternating(), 2),
        (bilevel.joint(), 1),
        (bilevel.mixed_level(), 3),
        (bilevel.unrolled(), 5),  # four for the architecture, one for the weights
    ],
)
def test_one_pass_a_gradient_whatever_is_logged(rule: Rule, passes: int) -> None:
    assert [_passes(rule, terms) for terms in (0, 1, 5)] == [(passes, passes)] * 3


def test_metrics_have_their_half() -> None:
    _, metrics = _after(bilevel.alternating(), _losses(_penalty))
    halves = {name: bilevel.half_of(name) for name in metrics}
    assert {name for name, half in halves.items() if half == "weights"} == {
        "train_loss",
        "train_accuracy",
        "gradient_norm/weights",
        "update_norm/weights",
    }


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "rule",
    [
        bilevel.alternating(),
        bilevel.joint(),
        bilevel.mixed_level(0.7),
        bilevel.unrolled(),
        bilevel.unrolled(exact=True),
    ],
)
def test_two_devices_take_the_step_of_one(rule: Rule) -> None:
    """Each sees half of a batch whose images pull in directions of their own; a loss is the mean over all of them."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices (forced host devices)")

    def network(weights: Any, gates: Gates, batch: Batch, key: jax.Array, numbers: Any) -> tuple[Any, Any]:
        pulls = batch.images[:, 0, 0, :] * weights["w"][None, :]
        return jnp.mean(jnp.tanh(jnp.sum(pulls, axis=1)) * jnp.sum(gates.ops["normal"] ** 2)), jnp.zeros(())

    def step(axis: str | None) -> Any:
        loss, full = Loss(_gates, network, None, axis), Loss(_gates, network, _penalty, axis)
        txs = (optax.inject_hyperparams(optax.sgd)(learning_rate=ETA), optax.sgd(1.0))
        return txs, rule(Losses(loss, full, loss, loss), Optimizers(*map(optax.with_extra_args_support, txs)))

    rng = np.random.default_rng(1)
    batches = Batches(*(Batch(jnp.asarray(rng.normal(size=(4, 1, 1, N))), jnp.zeros(4, jnp.int32)) for _ in range(2)))
    (weight_tx, arch_tx), alone = step(None)
    weights, arch = {"w": jnp.asarray(W)}, {"a": jnp.asarray(A)}
    state = SearchState(jnp.int32(0), weights, arch, weight_tx.init(weights), arch_tx.init(arch))
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    specs = (Spec(), Spec("data"), Spec(), Spec())
    both = jax.shard_map(step("data")[1], mesh=mesh, in_specs=specs, out_specs=(Spec(), Spec()), check_vma=False)
    one, two = (jax.jit(f)(state, batches, KEY, {"weight_learning_rate": ETA}) for f in (alone, both))
    for a, b in zip(*map(jax.tree.leaves, (two, one)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert np.abs(np.asarray(one[0].arch["a"]) - A).max() > 1e-3
