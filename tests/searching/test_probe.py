"""The probe against plain automatic differentiation of the reference network, on one and on two devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from search_cases import digits, standard_promotion

from prdarts_jax.config.search import DataConfig
from prdarts_jax.data.batches import Images
from prdarts_jax.devices import sharding
from prdarts_jax.gates import Gates
from prdarts_jax.searching.probe import NetworkProbe
from prdarts_jax.searching.program import SearchProblem, SearchPrograms
from prdarts_jax.searching.step import init_state
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.darts import darts

SPACE = Space(nodes=1, cells=3, channels=2, classes=10, in_channels=1, ops=("none", "skip_connect", "dil_conv_3x3"))
STRATEGY = darts(space=SPACE, init_scale=0.5)
BATCH = 8
INDICES = np.arange(20)  # two full batches and a rest


@pytest.fixture(scope="module")
def parts() -> Any:
    sgd = optax.sgd(0.1)
    problem = SearchProblem(SPACE, STRATEGY, sgd, sgd, DataConfig(source="digits"), (0.3,), (0.4,), "float32")
    with standard_promotion():
        make = jax.jit(lambda key: init_state(key, space=SPACE, strategy=STRATEGY, weight_tx=sgd, arch_tx=sgd))
        return problem, make(jax.random.key(0))


def _probe(parts: Any, devices: int = 1) -> NetworkProbe:
    problem, state = parts
    mesh = sharding.make_mesh(jax.devices()[:devices])
    programs = SearchPrograms(problem, mesh, digits().train_images.shape[1:])
    images = sharding.replicate(mesh, Images(digits().train_images, digits().train_labels))
    return NetworkProbe(programs, state, {}, INDICES, images, BATCH)


@pytest.fixture(scope="module")
def probe(parts: Any) -> NetworkProbe:
    return _probe(parts)


@pytest.fixture(scope="module")
def loss(parts: Any) -> Any:
    """(flat architecture, batches) -> mean cross-entropy, by the reference network, and the way back to a tree."""
    _, state = parts
    flat, back = ravel_pytree(state.arch)
    images = (digits().train_images[INDICES].astype(np.float32) / 255 - 0.3) / 0.4
    labels = digits().train_labels[INDICES]

    def at(flat: Any, batches: int) -> Any:
        gates = STRATEGY.sample(jax.random.key(0), back(flat), (), {}, "eval")
        total = 0.0
        for i in range(batches):
            rows = slice(i * BATCH, (i + 1) * BATCH)
            logits, _ = supernet.apply_reference(state.weights, gates, jnp.asarray(images[rows]), space=SPACE)
            total = total - jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels[rows]])
        return total / batches

    return flat, back, at


def test_loss_and_gradient_are_those_of_the_batches(probe: NetworkProbe, loss: Any) -> None:
    flat, back, at = loss
    for batches, asked in ((1, 1), (2, None)):
        value, slope = jax.jit(jax.value_and_grad(lambda a, n=batches: at(a, n)))(flat)
        assert probe.loss(back(flat), batches=asked) == pytest.approx(float(value), rel=1e-4)
        np.testing.assert_allclose(ravel_pytree(probe.grad(back(flat), batches=asked))[0], slope, rtol=2e-3, atol=1e-5)


def test_hvp_is_the_product_with_jax_hessian(probe: NetworkProbe, loss: Any) -> None:
    flat, back, at = loss
    hessian = np.asarray(jax.jit(jax.hessian(lambda a: at(a, 1)))(flat))
    vector = jnp.asarray(np.random.default_rng(0).normal(size=flat.size), jnp.float32)
    expected = hessian @ np.asarray(vector)
    exact = ravel_pytree(probe.hvp(back(flat), back(vector)))[0]
    np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-4)
    near = ravel_pytree(probe.hvp(back(flat), back(vector), radius=3e-4))[0]  # a switch of a ReLU lies at 1e-3
    assert np.linalg.norm(near - expected) < 0.02 * np.linalg.norm(expected)
    assert np.abs(expected).max() > 1e-2, "there is a curvature to be found"


def test_given_gates_are_evaluated_on_every_image(probe: NetworkProbe, parts: Any) -> None:
    """The rest of the images counts, in a batch whose statistics come from its filling too."""
    _, state = parts
    ops = {kind: jnp.asarray([[0.0, 0.25, 0.75]] * SPACE.num_edges, jnp.float32) for kind in CELL_TYPES}
    gates = Gates(ops, {kind: jnp.asarray([[1, 2, 3]] * SPACE.num_edges, jnp.int32) for kind in CELL_TYPES})
    images = (digits().train_images.astype(np.float32) / 255 - 0.3) / 0.4
    right, total = [], 0.0
    for start in range(0, len(INDICES), BATCH):
        rows = (
            np.resize(INDICES[start : start + BATCH], BATCH)
            if start + BATCH > len(INDICES)
            else INDICES[start : start + BATCH]
        )
        counted = min(BATCH, len(INDICES) - start)
        logits, _ = supernet.apply_reference(state.weights, gates, jnp.asarray(images[rows]), space=SPACE)
        labels = digits().train_labels[rows]
        total -= float(jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels][:counted]))
        right += [bool(a) for a in (jnp.argmax(logits, axis=1) == labels)[:counted]]
        if start == 0:
            assert probe.gates_accuracy(gates, batches=1) == pytest.approx(np.mean(right), abs=1e-6)
            assert probe.gates_loss(gates, batches=1) == pytest.approx(total / BATCH, rel=1e-4)
        assert probe.gates_accuracy(gates, batches=1, first=start // BATCH) == pytest.approx(
            np.mean(right[start : start + counted]), abs=1.1 / counted if counted < BATCH else 1e-6
        )
    number = -(-len(INDICES) // BATCH)
    assert probe.gates_accuracy(gates, batches=1, first=number) == probe.gates_accuracy(gates, batches=1)
    # The last batch is filled in another way than here, which its statistics show: within an image.
    assert probe.gates_accuracy(gates) == pytest.approx(np.mean(right), abs=1.1 / len(INDICES))


@pytest.mark.multidevice
def test_two_devices_probe_as_one(probe: NetworkProbe, parts: Any, loss: Any) -> None:
    flat, back, _ = loss
    vector, two = back(jnp.ones_like(flat)), _probe(parts, devices=2)
    gates = STRATEGY.sample(jax.random.key(0), back(flat), (), {}, "eval")
    assert two.loss(back(flat)) == pytest.approx(probe.loss(back(flat)), rel=1e-5)
    assert two.gates_loss(gates) == pytest.approx(probe.gates_loss(gates), rel=1e-5)
    for name, args in (("grad", ()), ("hvp", (vector,))):
        found, expected = (getattr(one, name)(back(flat), *args) for one in (two, probe))
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
