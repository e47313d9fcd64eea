"""The bilevel step: numbers by hand, groups apart, no recompilation, the same on one and on four devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prdarts_jax import optimizers
from prdarts_jax.bilevel import Batches, SearchState, alternating
from prdarts_jax.config.search import ArchConfig, WeightsConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.gates import Gates
from prdarts_jax.searching.step import init_state, make_search_step
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.prdarts import prdarts
from prdarts_jax.strategy import Strategy

SPACE = Space(nodes=1, cells=3, channels=2, classes=3, in_channels=1, ops=("skip_connect", "dil_conv_3x3", "none"))
STRATEGY = prdarts(space=SPACE, init_scale=0.5)
WEIGHTS = WeightsConfig(clip_norm=0.5, weight_decay=5e-3, learning_rate=0.3, momentum=0.9, nesterov=True)
ARCH = ArchConfig(learning_rate=0.05, beta1=0.5, beta2=0.999, eps=1e-8, weight_decay=1e-1)
PROGRESS = {
    "tau": jnp.float32(1.0),
    "lambda1": jnp.float32(0.3),
    "lambda2": jnp.float32(0.2),
    "lambda3": jnp.float32(0.1),
    "gate_dropout": jnp.float32(0.0),
    "weight_learning_rate": jnp.float32(0.2),
    "arch_learning_rate": jnp.float32(0.04),
}
KEY = jax.random.key(7)


def _lenient(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax's Adam does not trace under the strict promotion of these tests (float ** int32)."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, state, params)

    return optax.GradientTransformation(tx.init, update)


def _stub(weights: Any, gates: Gates, images: jax.Array, *, space: Space, axis_name: str | None = None) -> Any:
    """A network that compiles in no time, for what does not depend on the network."""
    scale = sum(jnp.sum(jnp.sin(w)) for w in jax.tree.leaves(weights)) / 100
    scale = scale + sum(jnp.sum(jnp.where(gates.ops[kind] > 0, gates.ops[kind], 0.0)) for kind in CELL_TYPES)
    return images.reshape(images.shape[0], -1)[:, :3] * scale, {}


def _made(**changes: Any) -> dict[str, Any]:
    made = {
        "space": SPACE,
        "strategy": STRATEGY,
        "weight_tx": optimizers.weight_transform(WEIGHTS),
        "arch_tx": _lenient(optimizers.arch_transform(ARCH)),
    }
    return made | changes


@cache
def _state() -> SearchState:
    return jax.jit(lambda key: init_state(key, **_made()))(jax.random.key(0))


def _stub_state(**changes: Any) -> SearchState:
    """Of a network that is a stub: few arrays, since an optimizer is compiled for each."""
    made, rng = _made(**changes), np.random.default_rng(0)
    weights = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in (("a", (30, 30)), ("b", (50,)))}
    arch = made["strategy"].init(jax.random.key(1))
    return SearchState(jnp.int32(0), weights, arch, made["weight_tx"].init(weights), made["arch_tx"].init(arch))


def _batches(seed: int, size: int = 8) -> Batches:
    rng = np.random.default_rng(seed)

    def batch() -> Batch:
        images = rng.normal(size=(size, 5, 4, 1)).astype(np.float32)
        return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 3, size), jnp.int32))

    return Batches(batch(), batch())


@pytest.fixture(scope="module")
def batches() -> Batches:
    return _batches(0)


@pytest.fixture(scope="module")
def step() -> Callable[..., Any]:
    """The step with the published optimizers, compiled once for the whole file."""
    return oracles.quick_jit(make_search_step(**_made()))


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _close(a: Any, b: Any, **tolerance: float) -> None:
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.shape[0]), labels])


@cache
def _weight_gradient(apply: Callable[..., Any] = supernet.apply_reference) -> Callable[..., Any]:
    def loss(weights: Any, gates: Gates, batch: Batch) -> jax.Array:
        return _cross_entropy(apply(weights, gates, batch.images, space=SPACE)[0], batch.labels)

    return oracles.quick_jit(jax.value_and_grad(loss))


@cache
def _arch_gradient(apply: Callable[..., Any] = supernet.apply_reference) -> Callable[..., Any]:
    def loss(arch: Any, weights: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        gates = STRATEGY.sample(key, arch, (), PROGRESS, "arch")
        logits, _ = apply(weights, gates, batch.images, space=SPACE)
        value = _cross_entropy(logits, batch.labels)
        return STRATEGY.objective(value, arch, gates, (), PROGRESS)[0], value

    return oracles.quick_jit(jax.value_and_grad(loss, has_aux=True))


def test_two_steps_by_hand(step: Callable[..., Any]) -> None:
    """Torch's SGD and Adam in numpy, on gradients of the plain-autodiff network; the second step has a momentum."""
    state = _state()
    weights, arch = (jax.tree.map(np.asarray, t) for t in (state.weights, state.arch))
    leaves, tree = jax.tree.flatten(weights)
    buffers = [np.zeros_like(w) for w in leaves]
    moments = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in arch.items()}
    clipped = False
    for t in (1, 2):
        key, batches = jax.random.fold_in(KEY, t), _batches(t)
        weight_key, arch_key = jax.random.split(key)
        state, metrics = step(state, batches, key, PROGRESS)

        gates = STRATEGY.sample(weight_key, arch, (), PROGRESS, "weights")
        loss, grads = _weight_gradient()(weights, gates, batches.train)
        assert float(metrics["train_loss"]) == pytest.approx(float(loss), rel=1e-4)
        grads = [np.asarray(g) for g in jax.tree.leaves(grads)]
        clipped |= np.sqrt(sum(np.sum(g**2) for g in grads)) > 0.5
        moved = [
            oracles.sgd_nesterov(w, g, b, lr=0.2, mu=0.9, wd=5e-3)
            for w, g, b in zip(leaves, oracles.clip_by_global_norm(grads, 0.5), buffers, strict=True)
        ]
        leaves, buffers = [w for w, _ in moved], [b for _, b in moved]
        weights = jax.tree.unflatten(tree, leaves)
        _close(state.weights, weights, rtol=2e-3, atol=2e-5)

        # The architecture moves on the updated weights and on gates of its own.
        (_, value), grads = _arch_gradient()(arch, weights, arch_key, batches.val)
        assert float(metrics["val_loss"]) == pytest.approx(float(value), rel=1e-3)
        for kind in CELL_TYPES:
            arch[kind], *moments[kind] = oracles.adam_coupled(
                arch[kind], np.asarray(grads[kind]), *moments[kind], t, lr=0.04, b1=0.5, b2=0.999, eps=1e-8, wd=1e-1
            )
        _close(state.arch, arch, rtol=1e-3, atol=2e-4)
    assert clipped, "the clipping was put to the test"
    assert int(state.step) == 2


def test_metrics_are_the_losses_and_the_penalty(step: Callable[..., Any], batches: Batches) -> None:
    state = _state()
    new, metrics = step(state, batches, KEY, PROGRESS)
    _, arch_key = jax.random.split(KEY)
    gates = STRATEGY.sample(arch_key, state.arch, (), PROGRESS, "arch")
    zero = jnp.zeros(())
    total, terms = STRATEGY.objective(zero, state.arch, gates, (), PROGRESS)
    assert float(metrics["penalty/total"]) == pytest.approx(float(total), rel=1e-5)
    for name, value in terms.items():
        assert float(metrics[f"penalty/{name}"]) == pytest.approx(float(value), rel=1e-5)
        grads = jax.grad(lambda arch, name=name: STRATEGY.objective(zero, arch, gates, (), PROGRESS)[1][name])(
            state.arch
        )
        norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in grads.values()))
        assert float(metrics[f"gradient_norm/{name}"]) == pytest.approx(norm, rel=1e-4)
    apply = oracles.quick_jit(lambda weights, gates, x: supernet.apply_reference(weights, gates, x, space=SPACE)[0])
    logits = apply(new.weights, gates, batches.val.images)
    share = np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(batches.val.labels))
    assert float(metrics["val_accuracy"]) == pytest.approx(share)
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


# --- the two groups are apart -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["weights", "arch"])
@pytest.mark.parametrize("frozen", ["weights", "arch"])
def test_a_frozen_group_does_not_move_nor_does_its_state(batches: Batches, first: str, frozen: str) -> None:
    """The other group's update is that of its own gradient and optimizer, whichever moves first."""
    strategy = STRATEGY._replace(rule=alternating(first=first))
    frozen_tx = optax.chain(optax.trace(0.9), optax.scale(0.0)) if frozen == "weights" else optax.set_to_zero()
    changes: dict[str, Any] = {"strategy": strategy, f"{'weight' if frozen == 'weights' else 'arch'}_tx": frozen_tx}
    state = _stub_state(**changes)
    new, _ = oracles.quick_jit(make_search_step(**_made(**changes), apply=_stub))(state, batches, KEY, PROGRESS)
    moving = "arch" if frozen == "weights" else "weights"
    assert _bits(getattr(new, frozen)) == _bits(getattr(state, frozen))
    assert _bits(getattr(new, moving)) != _bits(getattr(state, moving))

    weight_key, arch_key = jax.random.split(KEY)
    gates = strategy.sample(weight_key, state.arch, (), PROGRESS, "weights")
    if moving == "weights":  # the momentum after one step from zero is the clipped gradient and the decay
        _, grads = _weight_gradient(_stub)(state.weights, gates, batches.train)
        clipped = oracles.clip_by_global_norm([np.asarray(g) for g in jax.tree.leaves(grads)], 0.5)
        for w, new_w, g in zip(*map(jax.tree.leaves, (state.weights, new.weights, clipped)), strict=True):
            expected, _ = oracles.sgd_nesterov(np.asarray(w), g, np.zeros_like(g), lr=0.2, mu=0.9, wd=5e-3)
            np.testing.assert_allclose(new_w, expected, rtol=2e-3, atol=2e-5)
    else:  # the state of the weight optimizer saw the gradient of the training loss, and nothing of the architecture's
        _, grads = _weight_gradient(_stub)(state.weights, gates, batches.train)
        if first == "weights":
            _close(new.weight_opt[0].trace, grads, rtol=2e-3, atol=1e-5)
        (_, _), arch_grads = _arch_gradient(_stub)(state.arch, state.weights, arch_key, batches.val)
        for kind in CELL_TYPES:
            zero = np.zeros_like(arch_grads[kind])
            args = np.asarray(state.arch[kind]), np.asarray(arch_grads[kind]), zero, zero, 1
            expected, *_ = oracles.adam_coupled(*args, lr=0.04, b1=0.5, b2=0.999, eps=1e-8, wd=1e-1)
            np.testing.assert_allclose(new.arch[kind], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("first", ["weights", "arch"])
def test_the_second_group_sees_the_first_one_moved(batches: Batches, first: str) -> None:
    """Steps so long that the order matters: with the other one the same numbers do not come out."""
    strategy = STRATEGY._replace(rule=alternating(first=first))
    rates = {"weights": 30.0, "arch": 3.0}
    changes = {"strategy": strategy, "weight_tx": optax.sgd(rates["weights"]), "arch_tx": optax.sgd(rates["arch"])}
    state = _stub_state(**changes)
    new, _ = oracles.quick_jit(make_search_step(**_made(**changes), apply=_stub))(state, batches, KEY, PROGRESS)
    weight_key, arch_key = jax.random.split(KEY)

    def expected(first: str) -> dict[str, Any]:
        seen_arch, seen_weights = (state.arch, new.weights) if first == "weights" else (new.arch, state.weights)
        gates = strategy.sample(weight_key, seen_arch, (), PROGRESS, "weights")
        _, weight_grads = _weight_gradient(_stub)(state.weights, gates, batches.train)
        _, arch_grads = _arch_gradient(_stub)(state.arch, seen_weights, arch_key, batches.val)
        both = (("weights", state.weights, weight_grads), ("arch", state.arch, arch_grads))
        return {
            name: jax.tree.map(lambda w, g, rate=rates[name]: np.asarray(w) - rate * np.asarray(g), before, grads)
            for name, before, grads in both
        }

    (other,) = {"weights", "arch"} - {first}
    for group in rates:
        _close(getattr(new, group), expected(first)[group], rtol=2e-4, atol=2e-5)
        with pytest.raises(AssertionError):
            _close(getattr(new, group), expected(other)[group], rtol=2e-4, atol=2e-5)


def test_each_optimizer_advances_once_a_step(step: Callable[..., Any], batches: Batches) -> None:
    state = _state()
    for i in range(3):
        state, _ = step(state, batches, jax.random.fold_in(KEY, i), PROGRESS)
    assert int(state.weight_opt.count) == int(state.arch_opt.count) == int(state.step) == 3
    adam = next(s for s in jax.tree.leaves(state.arch_opt, is_leaf=_is_adam) if _is_adam(s))
    assert int(adam.count) == 3


def _entangled(ce: jax.Array, arch: Any, gates: Gates, memory: Any, numbers: Any) -> tuple[jax.Array, Any]:
    """An objective of everything it is given, and of no sum of them."""
    size = sum(jnp.sum(gates.ops[kind] ** 2) for kind in CELL_TYPES)
    terms = {
        "size": ce * size * memory["scale"],
        "pull": numbers["tau"] * sum(jnp.sum(jnp.sin(a)) for a in arch.values()),
    }
    return ce**2 + terms["size"] + terms["pull"], terms


@pytest.mark.parametrize("group", ["weights", "arch"])
def test_an_objective_of_loss_gates_arch_and_memory(batches: Batches, group: str) -> None:
    """The step of plain descent is the derivative of the whole composition, and so is the norm of each term's."""
    field = "objective" if group == "arch" else "weight_objective"
    memory = {"scale": jnp.float32(0.25)}
    strategy = STRATEGY._replace(memory=memory, **{field: _entangled})
    still = {"weight_tx": optax.set_to_zero(), "arch_tx": optax.set_to_zero()}
    changes = {"strategy": strategy, **still, f"{group.removesuffix('s')}_tx": optax.sgd(1e-2)}
    state = _stub_state(**changes).replace(memory=memory)
    new, metrics = oracles.quick_jit(make_search_step(**_made(**changes), apply=_stub))(state, batches, KEY, PROGRESS)
    key = jax.random.split(KEY)[1 if group == "arch" else 0]
    batch = batches.val if group == "arch" else batches.train

    def composed(moving: Any) -> Any:
        weights, arch = (state.weights, moving) if group == "arch" else (moving, state.arch)
        gates = STRATEGY.sample(key, arch, memory, PROGRESS, group)
        ce = _cross_entropy(_stub(weights, gates, batch.images, space=SPACE)[0], batch.labels)
        return _entangled(ce, arch, gates, memory, PROGRESS)

    before = getattr(state, group)
    expected = jax.tree.map(lambda a, g: a - jnp.float32(1e-2) * g, before, jax.grad(lambda a: composed(a)[0])(before))
    _close(getattr(new, group), expected, rtol=1e-5, atol=1e-6)
    assert _bits(new.memory) == _bits(memory)
    if group == "arch":
        for name, value in composed(state.arch)[1].items():
            assert float(metrics[f"penalty/{name}"]) == pytest.approx(float(value), rel=1e-4)
            slope = jax.grad(lambda arch, name=name: composed(arch)[1][name])(state.arch)
            norm = float(optax.global_norm(slope))
            assert norm > 0 and float(metrics[f"gradient_norm/{name}"]) == pytest.approx(norm, rel=1e-4)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _spy(seen: list[Any]) -> Strategy:
    def sample(key: jax.Array, arch: Any, memory: Any, progress: Any, role: str) -> Gates:
        jax.debug.callback(lambda data: seen.append((role, *data.tolist())), jax.random.key_data(key))
        return STRATEGY.sample(key, arch, memory, progress, role)

    return STRATEGY._replace(sample=sample)


def test_the_two_half_steps_draw_gates_from_different_keys(batches: Batches) -> None:
    seen: list[Any] = []
    changes = {"strategy": _spy(seen), "weight_tx": optax.set_to_zero(), "arch_tx": optax.set_to_zero()}
    step = oracles.quick_jit(make_search_step(**_made(**changes), apply=_stub))
    state = _stub_state(**changes)
    for key in jax.random.split(KEY, 2):
        jax.block_until_ready(step(state, batches, key, PROGRESS))
    jax.effects_barrier()
    # The norms of the terms' gradients take the sample of their half once more.
    drawn = set(seen)
    assert len(drawn) == len({tuple(key) for _, *key in drawn}) == 4
    assert sorted(role for role, *_ in drawn) == ["arch", "arch", "weights", "weights"]


# --- randomness and compilation ---------------------------------------------------------------------------------------


def test_same_key_same_bits(step: Callable[..., Any], batches: Batches) -> None:
    state = _state()
    first, again, other = (step(state, batches, key, PROGRESS) for key in (KEY, KEY, jax.random.key(8)))
    assert _bits(first) == _bits(again) != _bits(other)


def test_numbers_of_the_epoch_do_not_recompile(step: Any, batches: Batches) -> None:
    state = _state()
    reference, _ = step(state, batches, KEY, PROGRESS)
    compiled = step._cache_size()
    for name in PROGRESS:
        other = jnp.float32(0.5) if name == "gate_dropout" else PROGRESS[name] * 0.5
        changed, _ = step(state, batches, KEY, {**PROGRESS, name: other})
        assert _bits((changed.weights, changed.arch)) != _bits((reference.weights, reference.arch)), name
    assert step._cache_size() == compiled == 1


def test_transformations_of_the_user_without_a_learning_rate(batches: Batches) -> None:
    """Any optax transformation serves; one that has no learning rate to set keeps its own."""
    changes = {"weight_tx": optax.sign_sgd(0.01), "arch_tx": optax.inject_hyperparams(optax.scale)(step_size=-0.5)}
    state = _stub_state(**changes)
    new, _ = oracles.quick_jit(make_search_step(**_made(**changes), apply=_stub))(state, batches, KEY, PROGRESS)
    for w, moved in zip(jax.tree.leaves(state.weights), jax.tree.leaves(new.weights), strict=True):
        size = np.abs(np.asarray(moved) - np.asarray(w))
        assert np.all((size < 1e-8) | (np.abs(size - 0.01) < 1e-6)) and float(size.max()) < 0.0101
    assert any(not bool((a == b).all()) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True))
    _, arch_key = jax.random.split(KEY)
    _, grads = _arch_gradient(_stub)(state.arch, new.weights, arch_key, batches.val)
    for kind in CELL_TYPES:
        expected = np.asarray(state.arch[kind]) - 0.5 * np.asarray(grads[kind])
        np.testing.assert_allclose(new.arch[kind], expected, rtol=1e-3, atol=1e-4)


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.multidevice
def test_four_devices_take_the_step_of_one(step: Callable[..., Any], batches: Batches) -> None:
    """Gradients, BN statistics and metrics are those of the whole batch."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices (forced host devices)")
    state = _state()
    mapped = make_search_step(**_made(), axis_name="data")
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    specs = (P(), P("data"), P(), P())
    sharded = oracles.quick_jit(jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False))
    # One after the other: two programs at once would wait for each other's devices.
    results = [jax.block_until_ready(call(state, batches, KEY, PROGRESS)) for call in (step, sharded)]
    one, four = (jax.tree.map(np.asarray, (s.weights, s.arch, s.weight_opt, m)) for s, m in results)
    _close(four, one, rtol=2e-3, atol=1e-4)
