"""One, two and four devices compute the same search, and `jax.pmap` of the step what `shard_map` of it does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import search_cases
from jax.sharding import PartitionSpec
from search_cases import BATCH, final_state, rows, search

from prdarts_jax.bilevel import Batches, SearchState
from prdarts_jax.data.batches import Batch
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.run.metrics import comparable
from prdarts_jax.searching.step import make_search_step
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import registry

pytestmark = pytest.mark.multidevice


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(autouse=True)
def _four_devices():
    if jax.device_count() < 4:
        pytest.skip(f"{jax.device_count()} devices of 4")


def _search(folder, devices):
    workdir = folder / devices
    if not workdir.exists():
        # The smaller of the convolutions: it is one program for each number of devices.
        ops = "none,skip_connect,dil_conv_3x3"
        assert search(workdir, run__devices=devices, epochs=2, space__ops=ops).status == "finished"
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param("2", marks=pytest.mark.slow), "4"])
def test_devices_agree(folder, devices):
    """Same batches, same augmentation, same gates, batch statistics of the global batch: the same numbers."""
    one, several = _search(folder, "1"), _search(folder, devices)
    steps = list(zip(rows(one, "step"), rows(several, "step"), strict=True))
    assert len(steps) >= 10
    for expected, found in steps:
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"kind"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (expected["step"], name)
    expected, found = ({**comparable(rows(w, "epoch")[0]), "kind": 0} for w in (one, several))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4),
        final_state(one).state.weights,
        final_state(several).state.weights,
    )
    assert (one / "genotype.json").read_text() == (several / "genotype.json").read_text()


def test_the_state_is_on_all_devices_and_the_same(folder):
    state = final_state(_search(folder, "4"))
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 4
        assert leaf.is_fully_replicated
        copies = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert len(set(copies)) == 1


def _linear(weights, gates, images, *, space, axis_name):
    """A small network in place of the real one, which takes half a minute to compile: batch statistics and gates."""
    x = images.reshape(len(images), -1)
    mean = x.mean(axis=0) if axis_name is None else jax.lax.pmean(x.mean(axis=0), axis_name)
    return (x - mean[None]) @ weights["w"] * jnp.sum(gates.ops["normal"] + gates.ops["reduce"]), {}


def _problem():
    space = Space(nodes=1, ops=("skip_connect", "max_pool_3x3"), cells=3, channels=4, in_channels=1)
    strategy = registry.factory("prdarts")(space=space)
    weight_tx, arch_tx = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(64, 10)).astype(np.float32)}
    arch = jax.device_get(strategy.init(jax.random.key(1)))
    state = SearchState(np.int32(0), weights, arch, weight_tx.init(weights), arch_tx.init(arch))
    drawn = Batches(
        *(
            Batch(rng.normal(size=(BATCH, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, BATCH).astype(np.int32))
            for _ in range(2)
        )
    )
    progress = {name: np.float32(value) for name, value in {**strategy.schedule(0, 2), "tau": 1.0}.items()}

    def step(axis_name):
        return make_search_step(
            space=space,
            strategy=strategy,
            weight_tx=weight_tx,
            arch_tx=arch_tx,
            axis_name=axis_name,
            apply=_linear,
        )

    return step, state, drawn, jax.random.key(0), progress


def _close(found, expected, rtol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-6), found, expected
    )


def test_pmap_of_the_step_gives_the_same_numbers():
    """The step is written for one device of an axis, whichever maps it, bit for bit; one device needs none."""
    step, state, drawn, key, progress = _problem()
    mesh = sharding.make_mesh(jax.devices()[:4])
    whole, split = PartitionSpec(), PartitionSpec(sharding.AXIS)
    mapped = jax.jit(sharding.map_over(mesh, step(sharding.AXIS), (whole, split, whole, whole), (whole, whole)))
    shards = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), drawn)
    pmapped = jax.pmap(
        step(sharding.AXIS),
        axis_name=sharding.AXIS,
        in_axes=(None, 0, None, None),
        out_axes=None,
        devices=jax.devices()[:4],
    )
    by_shard_map, by_pmap = mapped(state, drawn, key, progress), pmapped(state, shards, key, progress)
    assert by_shard_map[1].keys() == by_pmap[1].keys()
    for a, b in zip(jax.tree.leaves(by_shard_map), jax.tree.leaves(by_pmap), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    _close(by_shard_map, jax.jit(step(None))(state, drawn, key, progress), rtol=1e-4)
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), by_pmap[0].arch, state.arch)
    assert all(jax.tree.leaves(moved))


def test_gradients_are_means_over_the_devices_not_sums():
    """What the default of jax.shard_map would get wrong by the number of devices."""
    mesh = sharding.make_mesh(jax.devices()[:4])
    x = jnp.arange(8.0)

    def program(w, x):
        return jax.lax.pmean(jax.grad(lambda w: jnp.mean(w * x))(w), sharding.axis_of(mesh))

    whole, split = PartitionSpec(), PartitionSpec(sharding.AXIS)
    found = jax.jit(sharding.map_over(mesh, program, (whole, split), whole))(jnp.float32(1.0), x)
    assert float(found) == float(jnp.mean(x))


def test_choosing_devices():
    assert sharding.choose_devices("all") == jax.devices()
    assert sharding.choose_devices("2") == jax.devices()[:2]
    with pytest.raises(UserError, match=r"run\.devices: 5 is more than there are; allowed: 1\.\.4"):
        sharding.choose_devices("5")
    one = sharding.make_mesh(jax.devices()[:1])
    assert sharding.axis_of(one) is None
    assert sharding.map_over(one, search_cases.digits, None, None) is search_cases.digits
