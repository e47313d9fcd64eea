"""The step of a training against closed forms and torch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prdarts_jax import optimizers
from prdarts_jax.config.train import SgdConfig, TrainConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.devices import sharding
from prdarts_jax.ops.losses import smoothed_cross_entropy
from prdarts_jax.training import program as train_program
from prdarts_jax.training.program import TrainProblem, TrainState, Variables


@dataclasses.dataclass(frozen=True)
class Linear:
    """A network of two linear heads, whose gradients are closed forms; it notes what it is called with."""

    auxiliary: bool = True
    dtype: str = "float32"

    def clone(self, **_):
        return self

    def apply(self, variables, images, *, train, drop_path, positions, rngs, mutable):
        assert train and mutable == ["batch_stats"] and set(rngs) == {"drop_path"}
        x, p = images.reshape(len(images), -1), variables["params"]
        new = {"seen": variables["batch_stats"]["seen"] + (0.0 if drop_path is None else drop_path)}
        return (x @ p["main"], x @ p["side"] if self.auxiliary else None), {"batch_stats": new}


def _problem(tx, **changes):
    fields = {
        "network": Linear(),
        "tx": tx,
        "data": TrainConfig().data,
        "mean": (0.0,),
        "std": (1.0,),
        "drop_path": True,
        "auxiliary_weight": 0.4,
        "label_smoothing": 0.1,
        "ema": 0.0,
    }
    return TrainProblem(**{**fields, **changes})


def _start(problem):
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(12, 5)), jnp.float32) for name in ("main", "side")}
    variables = Variables(params, {"seen": jnp.zeros(())})
    batch = Batch(jnp.asarray(rng.normal(size=(6, 2, 2, 3)), jnp.float32), jnp.asarray([0, 1, 2, 3, 4, 4]))
    return TrainState(jnp.int32(0), variables, problem.tx.init(params), variables if problem.ema else None), batch


def _softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _by_hand(params, batch, smoothing):
    """{head: (loss, gradient)} of the smoothed cross-entropy: x^T (p - t) / B."""
    x, labels = np.asarray(batch.images, float).reshape(6, 12), np.asarray(batch.labels)
    target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    found = {}
    for name, w in params.items():
        p = _softmax(x @ np.asarray(w, float))
        found[name] = (-(target * np.log(p)).sum(axis=1).mean(), x.T @ (p - target) / 6)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_both_heads_with_smoothed_targets(smoothing):
    problem = _problem(optax.sgd(1.0), label_smoothing=smoothing)
    state, batch = _start(problem)
    expected = _by_hand(state.variables.params, batch, smoothing)
    progress = {"learning_rate": jnp.float32(9.0), "drop_path": jnp.float32(0.25)}
    after, found = train_program.make_step(problem)(state, batch, jnp.arange(6), jax.random.key(0), progress)
    assert float(found["train_loss"]) == pytest.approx(expected["main"][0], rel=1e-5)
    assert float(found["train_auxiliary_loss"]) == pytest.approx(expected["side"][0], rel=1e-5)
    for name, weight in (("main", 1.0), ("side", 0.4)):
        moved = np.asarray(state.variables.params[name] - after.variables.params[name])
        np.testing.assert_allclose(moved, weight * expected[name][1], atol=1e-5)
    both = np.concatenate([expected["main"][1], 0.4 * expected["side"][1]])
    assert float(found["gradient_norm/weights"]) == pytest.approx(np.linalg.norm(both), rel=1e-5)
    assert float(after.variables.batch_stats["seen"]) == 0.25  # the rate is an argument, not a constant of the program
    assert int(after.step) == 1
    assert set(found) == set(train_program.metric_names(problem))


def test_without_an_auxiliary_head_or_drop_path():
    problem = _problem(optax.sgd(1.0), network=Linear(auxiliary=False), drop_path=False)
    state, batch = _start(problem)
    progress = {"learning_rate": jnp.float32(1.0), "drop_path": jnp.float32(0.25)}
    after, found = train_program.make_step(problem)(state, batch, jnp.arange(6), jax.random.key(0), progress)
    assert "train_auxiliary_loss" not in found and set(found) == set(train_program.metric_names(problem))
    assert float(after.variables.batch_stats["seen"]) == 0
    np.testing.assert_array_equal(after.variables.params["side"], state.variables.params["side"])


def test_the_average_is_the_sum_of_its_closed_form():
    decay = 0.7
    problem = _problem(optax.sgd(0.1), ema=decay)
    state, batch = _start(problem)
    step, history = train_program.make_step(problem), [state.variables]
    progress = {"learning_rate": jnp.float32(1.0), "drop_path": jnp.float32(0.5)}
    for _ in range(4):
        state, _ = step(state, batch, jnp.arange(6), jax.random.key(0), progress)
        history.append(state.variables)
    shares = [decay**4, *((1 - decay) * decay ** (4 - k) for k in range(1, 5))]
    expected = jax.tree.map(lambda *w: sum(s * np.asarray(x, float) for s, x in zip(shares, w, strict=True)), *history)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, expected)


def test_every_step_draws_with_keys_of_its_own(monkeypatch):
    """For augmentation and for drop-path; they are those of the step, wherever its dispatch began."""
    seen, make_step = set(), train_program.make_step

    def note(key):
        jax.debug.callback(lambda data: seen.add(data.tobytes()), jax.random.key_data(key))

    def spying_step(*arguments):
        step = make_step(*arguments)

        def spying(state, batch, positions, key, progress):
            note(key)
            return step(state, batch, positions, key, progress)

        return spying

    def spying_load(key, images, positions, **_):
        note(key)
        return images.astype(jnp.float32)

    monkeypatch.setattr(train_program, "make_step", spying_step)
    monkeypatch.setattr(train_program, "load_images", spying_load)
    problem = _problem(optax.sgd(1.0))
    program = train_program.make_dispatch(problem, sharding.make_mesh(jax.devices()[:1]))
    data = train_program.Images(np.zeros((6, 2, 2, 3), np.uint8), np.zeros(6, np.int32))
    progress = {"learning_rate": np.float32(1.0), "drop_path": np.float32(0.25)}
    order, positions = np.zeros((4, 6), np.int32), np.arange(6, dtype=np.int32)

    def keys(first, count):
        seen.clear()
        state = dataclasses.replace(_start(problem)[0], step=jnp.int32(first))
        carry = train_program.TrainCarry(state, {"train_loss": jnp.zeros(())})
        jax.block_until_ready(program(carry, count, True, order, positions, jax.random.key(0), progress, data))
        jax.effects_barrier()
        return set(seen)

    whole = keys(0, 4)
    assert len(whole) == 2 * 4  # no draw shares a key with another
    assert keys(0, 1) | keys(1, 3) == whole


@pytest.mark.reference
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_optimizer_is_torchs(nesterov):
    """Clip, coupled L2, momentum, learning rate, over steps whose learning rate changes."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    start, rates = rng.normal(size=(4, 3)), (0.1, 0.1, 0.05, 0.01)
    gradients = [rng.normal(size=(4, 3)) * scale for scale in (0.1, 30.0, 1.0, 5.0)]  # the second one is clipped
    config = TrainConfig(weights=SgdConfig(learning_rate=0.1, nesterov=nesterov, weight_decay=0.01))

    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    with jax.enable_x64(True):
        tx, ours = optimizers.sgd(config), {"w": jnp.asarray(start)}
        state = tx.init(ours)
        for gradient, rate in zip(gradients, rates, strict=True):
            state = train_program.set_learning_rate(state, rate)
            updates, state = tx.update({"w": jnp.asarray(gradient)}, state, ours)
            ours = optax.apply_updates(ours, updates)
            optimizer.param_groups[0]["lr"] = rate
            theirs.grad = torch.tensor(gradient)
            torch.nn.utils.clip_grad_norm_([theirs], 5.0)
            optimizer.step()
            np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), rtol=1e-6)  # torch divides by norm + 1e-6


@pytest.mark.reference
def test_label_smoothing_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(8, 7)).astype(np.float32), rng.integers(0, 7, 8)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(torch.tensor(logits), torch.tensor(labels))
    found = smoothed_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    assert float(found) == pytest.approx(loss.item(), rel=1e-6)
