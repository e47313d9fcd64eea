"""The precision that products are lowered with: all of them, forward and backward, in a search and in a training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
import search_cases
import train_cases

from prdarts_jax.accelerators import check
from prdarts_jax.config import schema
from prdarts_jax.config.search import PRECISIONS, SearchConfig
from prdarts_jax.devices import sharding
from prdarts_jax.ops.lowering import Lowering
from prdarts_jax.ops.precision import at_precision
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import program as search_program
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    with search_cases.standard_promotion():
        yield


MESH = sharding.make_mesh(jax.devices()[:1])
OF_XLA = {"default": "DEFAULT", "bf16": "DEFAULT", "tf32": "HIGH", "highest": "HIGHEST"}


def _precisions(lowered: Any) -> set[str]:
    """Of every matrix product and convolution of a lowered program."""
    lines = [line for line in lowered.as_text().splitlines() if "dot_general" in line or ".convolution" in line]
    found = [re.findall(r"\b(DEFAULT|HIGHEST|HIGH)\b", line) for line in lines]
    assert len(lines) > 10 and all(len(pair) == 2 for pair in found)
    return {name for pair in found for name in pair}


@pytest.mark.parametrize(("kind", "precision"), [("search", "highest"), ("train", "highest"), ("train", "tf32")])
def test_every_product_of_a_dispatch_is_lowered_with_it(kind: str, precision: str) -> None:
    """For a GPU, where depthwise convolutions are convolutions; of the CPU's kernels nothing can be asked."""
    gpu = Lowering("cuda")
    if kind == "search":
        config: Any = search_cases.config(precision=precision)
        problem: Any = search_inputs.prepare(config, data=search_cases.digits()).problem
        arguments = check.search_dispatch(config, MESH, search_cases.digits()).arguments
        program: Any = search_program.make_dispatch(problem, MESH, gpu)
    else:
        config = train_cases.config(precision=precision)
        genotype, data = train_cases.GENOTYPE, train_cases.digits()
        problem = train_inputs.prepare(config, genotype, data=data).problem
        arguments = check.train_dispatch(config, genotype, MESH, data).arguments
        program = train_program.make_dispatch(problem, MESH, lowering=gpu)
    lowered = program.trace(*arguments).lower(lowering_platforms=("cuda",))
    assert _precisions(lowered) == {OF_XLA[precision]}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_reaches_gradients_and_leaves_the_numbers_of_a_cpu(precision: str) -> None:
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 5, 8), (3, 3, 8, 4)))

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return (jax.lax.conv(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME") ** 2).sum()

    gradients = jax.jit(at_precision(precision, jax.grad(loss, argnums=(0, 1))))
    names = re.findall(r"\b(DEFAULT|HIGHEST|HIGH)\b", gradients.lower(x, kernel).as_text())
    assert len(names) == 6 and set(names) == {OF_XLA[precision]}
    for found, plain in zip(gradients(x, kernel), jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel), strict=True):
        np.testing.assert_array_equal(found, plain)


def test_jax_as_it_is_set_is_the_default() -> None:
    x = np.ones((2, 2), np.float32)
    with jax.default_matmul_precision("highest"):
        texts = {name: jax.jit(at_precision(name, jax.numpy.dot)).lower(x, x).as_text() for name in PRECISIONS}
    assert "HIGHEST" in texts["default"] and "HIGHEST" not in texts["bf16"] + texts["tf32"]


def test_a_config_without_it_is_one_of_the_default() -> None:
    document = schema.to_dict(SearchConfig())
    assert document.pop("precision") == "default"
    assert schema.from_dict(SearchConfig, document) == SearchConfig()
