"""The restricted spaces of the experiments: files that become spaces, and networks that run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax import presets, strategies
from prdarts_jax.config import userfile
from prdarts_jax.gates import Gates
from prdarts_jax.space import Space
from prdarts_jax.space.cell import declare_edges, mixed_nodes

FOLDER = Path(__file__).parents[2] / "experiments" / "spaces"


def space_of(name: str, **flags: object) -> Space:
    given = {"space.ops": str(FOLDER / f"{name}.json"), "method.options.executed_ops": 1, **flags}
    user = None
    if name == "s4":
        given["space.primitives"] = str(FOLDER / "noise.py")
        user = userfile.load_module(str(FOLDER / "noise.py"), "space.primitives").value.PRIMITIVES
    config = presets.resolve("digits", flags=given).config
    return Space.create(config.space, classes=10, in_channels=1, user=user)


@pytest.mark.parametrize("name", ["s1", "s2", "s3", "s4"])
def test_only_the_operations_of_the_file_are_sampled_and_derived(name: str) -> None:
    space = space_of(name)
    lists = json.loads((FOLDER / f"{name}.json").read_text())
    method = strategies.get("prdarts", space=space, executed_ops=1)
    arch = method.init(jax.random.key(0))
    sampled: dict[str, set[tuple[int, str]]] = {"normal": set(), "reduce": set()}
    for seed in range(20):
        gates: Gates = method.sample(jax.random.key(seed), arch, (), {"tau": 1.0, "gate_dropout": 0.0}, "weights")
        for kind in sampled:
            for edge, op in enumerate(np.asarray(gates.executed[kind])[:, 0]):
                if op < space.num_ops:
                    sampled[kind].add((edge, space.ops[op]))
    for kind, seen in sampled.items():
        assert seen <= {(edge, op) for edge, ops in enumerate(lists[kind]) for op in ops}
        assert len(seen) > 14  # more than one operation is met somewhere
    genotype = method.derive(arch)
    for kind in sampled:
        for node, pairs in enumerate(genotype.cell(kind)[0], start=2):
            for op, source in pairs:
                assert op in lists[kind][space.edges.index((source, node))] and op != "none"


def test_noise_is_standard_normal_differs_between_inputs_and_repeats_in_the_backward_pass() -> None:
    space = space_of("s4")
    weights = oracles.drawn(declare_edges(space, "normal", 4))
    executed = jnp.full((14, 1), space.ops.index("noise"), jnp.int32)
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 4))

    def nodes(values: jax.Array, x: jax.Array) -> jax.Array:
        return mixed_nodes(weights, values, executed, x, x + 1.0, space=space, kind="normal")

    one = np.asarray(nodes(jnp.ones((14, 1)), x))
    assert abs(one[0].mean()) < 0.1 and abs(one[0].std() - 2**0.5) < 0.1  # the sum of two edges
    assert not np.allclose(one, nodes(jnp.ones((14, 1)), x[::-1] * 1.5))
    # d/dg sum(node 0 * c) = sum(noise * c): the noise of the backward pass is that of the forward pass.
    c = jax.random.normal(jax.random.key(2), one[0].shape)
    gradient = jax.grad(lambda g: jnp.sum(nodes(g, x)[0] * c))(jnp.ones((14, 1)))
    np.testing.assert_allclose(gradient[:2].sum(), np.sum(one[0] * np.asarray(c)), rtol=1e-4)
