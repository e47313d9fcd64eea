"""On this CPU: programs lowered for GPUs and TPUs have no CPU kernel, and can be kept; those of the CPU have them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import search_cases
import train_cases
from cells import SPACES, cell_data, random_terms

from prdarts_jax.accelerators import check, kept
from prdarts_jax.devices import sharding
from prdarts_jax.gates import Gates
from prdarts_jax.ops.lowering import ANYWHERE, Lowering
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import program as search_program
from prdarts_jax.space.cell import mixed_nodes
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    with search_cases.standard_promotion():
        yield


MESH = sharding.make_mesh(jax.devices()[:1])


@functools.cache
def _arguments(kind: str) -> tuple[Any, Any]:
    """The problem of the tiny search or training, and the abstract arguments of its dispatch on this CPU."""
    if kind == "search":
        config: Any = search_cases.config()
        problem: Any = search_inputs.prepare(config, data=search_cases.digits()).problem
        return problem, check.search_dispatch(config, MESH, search_cases.digits()).arguments
    config = train_cases.config()
    problem = train_inputs.prepare(config, train_cases.GENOTYPE, data=train_cases.digits()).problem
    return problem, check.train_dispatch(config, train_cases.GENOTYPE, MESH, train_cases.digits()).arguments


def _dispatch(kind: str, lowering: Lowering | None = None) -> Any:
    make: Any = {"search": search_program.make_dispatch, "train": train_program.make_dispatch}[kind]
    return make(_arguments(kind)[0], MESH, lowering=lowering)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("kind", ["search", "train"])
def test_a_dispatch_is_exported_for_another_platform(kind: str, platform: str) -> None:
    """jax.export refuses calls that another process may not know; the file has the shapes of the arguments."""
    oracles.require_kernels()
    _, arguments = _arguments(kind)
    exported = kept.exported(_dispatch(kind, Lowering(platform)), arguments, platform)
    assert "@prdarts_" not in exported.mlir_module() and exported.platforms == (platform,)
    back = jax.export.deserialize(exported.serialize())
    assert back.in_tree == jax.tree.structure((arguments, {}))
    assert [(a.shape, a.dtype) for a in back.in_avals] == [(a.shape, a.dtype) for a in jax.tree.leaves(arguments)]
    assert back.mlir_module_serialized == exported.mlir_module_serialized


@pytest.mark.parametrize("kind", ["search", "train"])
def test_a_dispatch_for_a_cpu_has_the_kernels(kind: str) -> None:
    oracles.require_kernels()
    _, arguments = _arguments(kind)
    name = {"search": "prdarts_term_backward", "train": "prdarts_separable_backward"}[kind]
    assert name in _dispatch(kind).lower(*arguments).as_text()


@pytest.mark.parametrize("kind", ["normal", "reduce"])
def test_a_cell_of_no_known_platform_follows_the_one_it_is_lowered_for(kind: str) -> None:
    """One traced program: with kernels where it is lowered for a CPU, without them elsewhere; the same numbers."""
    oracles.require_kernels()
    space = SPACES["two-nodes"]
    weights, s0, s1, ops, ct = cell_data(space, kind, (6, 7), np.float32)
    executed = jnp.asarray(random_terms(space, kind, 2, 0))

    def gradients(lowering: Lowering) -> Any:
        def loss(weights: Any, ops: jax.Array) -> jax.Array:
            values, terms = Gates({kind: ops}, {kind: executed}).terms(kind)
            return jnp.vdot(mixed_nodes(weights, values, terms, s0, s1, space=space, kind=kind, lowering=lowering), ct)

        return oracles.quick_jit(jax.grad(loss, argnums=(0, 1)))

    traced = gradients(ANYWHERE).trace(weights, ops)
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("prdarts_term_backward" in text) == (platform == "cpu")
        assert ("prdarts_" in text) == (platform == "cpu")
    anywhere, known, other = (gradients(one)(weights, ops) for one in (ANYWHERE, Lowering("cpu"), Lowering("tpu")))
    for a, b, c in zip(*map(jax.tree.leaves, (anywhere, known, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(b, c, rtol=1e-4, atol=1e-4 * float(np.abs(c).max()))


def test_the_rows_of_a_search_on_this_cpu() -> None:
    """The kernels are seen where they are; nothing is exchanged on one device; what is counted is there."""
    oracles.require_kernels()
    config = search_cases.config(space__ops="skip_connect,sep_conv_3x3")
    row = check.compiled_row(check.search_dispatch(config, MESH, search_cases.digits()), "cpu")
    assert row["cpu_kernels"] > 0 and row["all_reduces_per_step"] == 0 and row["cycles_per_step"] is None
    assert row["launches_per_step"] > row["cpu_kernels"] and row["memory_mib"] > row["temp_mib"] > 0
    assert row["compile_s"] > 0 and row["bytes_per_step"] > 0


def test_black_images_in_the_place_of_cifar_have_its_shape_and_no_memory() -> None:
    data = check.stand_in("tfds:cifar100")
    assert (data.train_size, data.test_size, data.image, data.num_classes) == (50_000, 10_000, (32, 32, 3), 100)
    assert data.train_images.base is not None and data.train_images.strides == (0, 0, 0, 0)
    assert check.stand_in("digits").train_size == 1437
