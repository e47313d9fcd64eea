"""`local_batch_norm`: each device normalises by its own part of the batch, and the rest stays a mean over devices."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import search_cases
import train_cases
from jax.sharding import PartitionSpec

from prdarts_jax.bilevel import Batches, SearchState
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.devices import sharding
from prdarts_jax.ops.batch_norm import batch_norm
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching.step import make_search_step
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import registry
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program

pytestmark = pytest.mark.multidevice

DEVICES, BATCH = 2, 8
WHOLE, SPLIT = PartitionSpec(), PartitionSpec(sharding.AXIS)


@pytest.fixture(autouse=True)
def _two_devices():
    if jax.device_count() < DEVICES:
        pytest.skip(f"{jax.device_count()} devices of {DEVICES}")


def _mesh():
    return sharding.make_mesh(jax.devices()[:DEVICES])


def _close(found: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=1e-6), found, expected
    )


def _part(tree: Any, device: int) -> Any:
    return jax.tree.map(lambda x: x[device * BATCH // DEVICES : (device + 1) * BATCH // DEVICES], tree)


def _mean(*trees: Any) -> Any:
    return jax.tree.map(lambda *xs: np.mean([np.asarray(x, np.float64) for x in xs], axis=0), *trees)


# Search


def _normed(weights, gates, images, *, space, axis_name):
    """BN of the search network between two products: small, and wrong wherever its statistics are."""
    x = batch_norm(jnp.einsum("bhwc,cd->bhwd", images, weights["first"]), axis_name)
    scale = jnp.sum(gates.ops["normal"] + gates.ops["reduce"])
    return jax.nn.relu(x).mean(axis=(1, 2)) @ weights["last"] * scale, {}


class _Problem(NamedTuple):
    """Compiled steps of both groups, whose learning rates are numbers of the epoch; 0 holds a group where it is."""

    local: Any  # mapped, statistics of each part
    by_default: Any  # mapped, statistics of the whole batch
    single: Any  # on one device
    state: SearchState
    batches: Batches
    progress: dict[str, Any]


@pytest.fixture(scope="module")
def problem() -> _Problem:
    space = Space(nodes=1, ops=("skip_connect", "max_pool_3x3"), cells=3, channels=4, in_channels=1)
    strategy = registry.factory("prdarts")(space=space, lambda1=0.0, lambda2=0.0, lambda3=0.0)
    rng = np.random.default_rng(0)
    weights = {"first": rng.normal(size=(2, 5)).astype(np.float32), "last": rng.normal(size=(5, 3)).astype(np.float32)}
    arch = jax.device_get(strategy.init(jax.random.key(1)))
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    state = SearchState(np.int32(0), weights, arch, tx.init(weights), tx.init(arch))
    # The two halves of the batch have different means: local and global statistics have nothing in common.
    shift = np.repeat([0.0, 5.0], BATCH // DEVICES)[:, None, None, None]

    def drawn():
        images = rng.normal(size=(BATCH, 4, 4, 2)) + shift
        return Batch(images.astype(np.float32), rng.integers(0, 3, BATCH).astype(np.int32))

    progress = {name: np.float32(value) for name, value in {**strategy.schedule(0, 2), "tau": 1.0}.items()}

    def step(axis_name, local):
        return make_search_step(
            space=space,
            strategy=strategy,
            weight_tx=tx,
            arch_tx=tx,
            axis_name=axis_name,
            local_batch_norm=local,
            apply=_normed,
        )

    def mapped(local: bool) -> Any:
        specs = (WHOLE, Batches(Batch(SPLIT, SPLIT), Batch(SPLIT, SPLIT)), WHOLE, WHOLE)
        return oracles.quick_jit(sharding.map_over(_mesh(), step(sharding.AXIS, local), specs, (WHOLE, WHOLE)))

    single = oracles.quick_jit(step(None, False))
    return _Problem(mapped(True), mapped(False), single, state, Batches(drawn(), drawn()), progress)


@pytest.mark.parametrize("moved", ["weights", "arch"])
def test_the_search_step_is_the_mean_of_the_steps_on_each_part(problem, moved):
    """With plain gradient descent of one group, the mean of the gradients moves it to the mean of the places."""
    state, batches, key = problem.state, problem.batches, jax.random.key(3)
    rates = {f"{name}_learning_rate": np.float32(0.5 if name in moved else 0.0) for name in ("weight", "arch")}
    progress = problem.progress | rates
    found, metrics = problem.local(state, batches, key, progress)
    alone = [problem.single(state, _part(batches, i), key, progress) for i in range(DEVICES)]
    _close(getattr(found, moved), _mean(*(getattr(one, moved) for one, _ in alone)))
    # Validation comes after the weights have moved, and alone they move elsewhere.
    for name in ("train_loss", "train_accuracy") + (("val_loss", "val_accuracy") if moved == "arch" else ()):
        _close(metrics[name], _mean(*(m[name] for _, m in alone)))
    for name in ("weights", "arch"):
        before, after = (jax.tree.leaves(jax.device_get(getattr(one, name))) for one in (state, found))
        assert any(np.any(a != b) for a, b in zip(before, after, strict=True)) == (name == moved)
    # The statistics of the whole batch are another computation, and the default.
    _, whole_metrics = problem.single(state, batches, key, progress)
    _, by_default = problem.by_default(state, batches, key, progress)
    for name in ("train_loss", "val_loss"):
        _close(by_default[name], whole_metrics[name])
    assert abs(float(metrics["train_loss"]) - float(whole_metrics["train_loss"])) > 1e-2


# Training


def test_the_training_step_is_the_mean_of_the_steps_on_each_part():
    """Gradients, metrics and running statistics; one set of running statistics is left, the same on both devices."""
    config = train_cases.config(batch_size=BATCH, ema=0, drop_path=0.3)
    inputs = train_inputs.prepare(config, train_cases.GENOTYPE, data=train_cases.digits())
    problem = inputs.problem._replace(tx=optax.sgd(0.5))
    data = train_cases.digits()
    image = data.train_images.shape[1:]
    state = train_program.initial_carry(problem, sharding.make_mesh(jax.devices()[:1]), jax.random.key(0), image).state
    rng = np.random.default_rng(0)
    shift = np.repeat([0.0, 3.0], BATCH // DEVICES)[:, None, None, None]
    batch = Batch((rng.normal(size=(BATCH, *image)) + shift).astype(np.float32), data.train_labels[:BATCH])
    positions, key = np.arange(BATCH, dtype=np.int32), jax.random.key(2)
    progress = {"learning_rate": np.float32(0.5), "drop_path": np.float32(0.3)}

    local = problem._replace(local_batch_norm=True)
    program = train_program.make_step(local, sharding.AXIS)
    specs = (WHOLE, Batch(SPLIT, SPLIT), SPLIT, WHOLE, WHOLE)
    mapped = oracles.quick_jit(sharding.map_over(_mesh(), program, specs, (WHOLE, WHOLE)))
    found, metrics = mapped(jax.device_get(state), batch, positions, key, progress)

    single = oracles.quick_jit(train_program.make_step(problem))
    alone = [single(state, _part(batch, i), _part(positions, i), key, progress) for i in range(DEVICES)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5),
        found.variables,
        _mean(*(one.variables for one, _ in alone)),
    )
    for name in ("train_loss", "train_accuracy"):
        _close(metrics[name], _mean(*(m[name] for _, m in alone)))
    for leaf in jax.tree.leaves(found.variables):
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == DEVICES and len(copies) == 1
    _, whole = single(state, batch, positions, key, progress)
    assert abs(float(metrics["train_loss"]) - float(whole["train_loss"])) > 1e-2


# Config


def test_off_by_default_and_part_of_what_is_computed():
    assert not SearchConfig().local_batch_norm and not TrainConfig().local_batch_norm
    data, given = search_cases.digits(), {"run__devices": "2"}
    documents = {}
    for local in (False, True):
        config = search_cases.config(local_batch_norm=local, **given)
        inputs = search_inputs.prepare(config, data=data)
        assert inputs.problem.local_batch_norm is local
        documents[local] = search_inputs.document(config, inputs, None)
    same = schema.differences(search_inputs.compared(documents[False]), search_inputs.compared(documents[True]))
    assert any(line.startswith("local_batch_norm: False") for line in same)


@pytest.mark.parametrize("local", [False, True])
def test_the_number_of_devices_then_decides_what_is_computed(local):
    """Otherwise it changes the last bits alone, and a run may go on with another number."""
    config = search_cases.config(local_batch_norm=local, run__devices="2")
    two = search_inputs.document(config, search_inputs.prepare(config, data=search_cases.digits()), None)
    four = {**two, "platform": {**two["platform"], "devices": 4}}
    found = schema.differences(search_inputs.compared(two), search_inputs.compared(four))
    assert found == (["devices of local_batch_norm: 2 in the workdir, 4 now"] if local else [])
