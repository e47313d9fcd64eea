"""A step with noise in the network: one program for all rates, other masks in other steps, the same on two devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from prdarts_jax.bilevel import Batch, Batches
from prdarts_jax.searching import step as search_step
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.composition import transformed
from prdarts_jax.strategies.darts import darts

SPACE = Space(
    nodes=1, cells=3, channels=4, classes=3, in_channels=1, partial=2, ops=("none", "skip_connect", "dil_conv_3x3")
)
NAMES = ("drop_path", "dropout/skip_connect")
KEY = jax.random.key(7)


def _numbers(*rates: float) -> dict[str, jax.Array]:
    return dict(zip(NAMES, map(jnp.float32, rates), strict=True))


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    strategy = transformed(darts(space=SPACE, init_scale=0.5), ["edge_weights:init_scale=1"])
    return {"space": SPACE, "strategy": strategy, "weight_tx": optax.sgd(0.1), "arch_tx": optax.sgd(1.0)}


@pytest.fixture(scope="module")
def state(parts: dict[str, Any]) -> Any:
    return jax.jit(lambda key: search_step.init_state(key, **parts))(jax.random.key(0))


@pytest.fixture(scope="module")
def batches() -> Batches:
    rng = np.random.default_rng(0)

    def batch() -> Batch:
        images = rng.normal(size=(8, 6, 5, 1)).astype(np.float32)
        return Batch(jnp.asarray(images), jnp.asarray(rng.integers(0, 3, 8), jnp.int32))

    return Batches(batch(), batch())


@pytest.fixture(scope="module")
def step(parts: dict[str, Any]) -> Any:
    return oracles.quick_jit(search_step.make_search_step(**parts))


def _moved(state: Any, result: Any) -> list[np.ndarray]:
    """How far both groups went."""
    after = result[0]
    pairs = zip(*(jax.tree.leaves((s.weights, s.arch)) for s in (after, state)), strict=True)
    return [np.asarray(a) - np.asarray(b) for a, b in pairs]


def test_rates_of_zero_are_no_noise_in_the_program_of_all_rates(
    step: Any, parts: dict[str, Any], state: Any, batches: Batches
) -> None:
    plain = oracles.quick_jit(search_step.make_search_step(**parts))(state, batches, KEY, {})
    still = step(state, batches, KEY, _numbers(0, 0))
    for a, b in zip(_moved(state, still), _moved(state, plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    losses = [float(step(state, batches, KEY, _numbers(*rates))[1]["train_loss"]) for rates in ((0.5, 0), (0, 0.5))]
    assert len({*losses, float(still[1]["train_loss"])}) == 3 and step._cache_size() == 1


def test_another_step_has_other_masks(step: Any, state: Any, batches: Batches) -> None:
    """The gates of DARTS do not depend on the key: what differs is the noise, between the halves of a step too."""
    one, again, other = (
        float(step(state, batches, key, _numbers(0.5, 0.3))[1]["train_loss"]) for key in (KEY, KEY, jax.random.key(8))
    )
    assert one == again != other
    same = Batches(batches.train, batches.train)
    halves = step(state, same, KEY, _numbers(0.5, 0.3))[1]
    assert abs(float(halves["train_loss"]) - float(halves["val_loss"])) > 1e-4


@pytest.mark.multidevice
def test_two_devices_draw_the_masks_of_one(step: Any, parts: dict[str, Any], state: Any, batches: Batches) -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    mapped = search_step.make_search_step(**parts, axis_name="data")
    specs = (P(), P("data"), P(), P())
    sharded = oracles.quick_jit(jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False))
    numbers = _numbers(0.5, 0.3)
    one = jax.block_until_ready(step(state, batches, KEY, numbers))
    two = jax.block_until_ready(sharded(state, batches, KEY, numbers))
    for a, b in zip(_moved(state, two), _moved(state, one), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-4)
    assert float(two[1]["train_loss"]) == pytest.approx(float(one[1]["train_loss"]), rel=1e-4)
