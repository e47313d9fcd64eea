"""Digests of the caller's objects: equal for the same construction in any process, different for another number."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prdarts_jax import runs
from prdarts_jax.source_digest import source_digest, uncomparable
from prdarts_jax.space import Space
from prdarts_jax.strategies.prdarts import prdarts

SPACE = Space(nodes=1)


def closure(number):
    def inner(x):
        return x * number

    return inner


PAIRS = {
    "learning rate": (lambda: optax.adam(1e-3), lambda: optax.adam(1e-1)),
    "optimizer": (lambda: optax.adam(1e-1), lambda: optax.sgd(1e-1)),
    "strategy": (lambda: prdarts(space=SPACE, lambda1=0.01), lambda: prdarts(space=SPACE, lambda1=10.0)),
    "partial": (lambda: functools.partial(prdarts, lambda1=0.1), lambda: functools.partial(prdarts, lambda1=10.0)),
    "closure": (lambda: closure(1), lambda: closure(2)),
    "array": (lambda: closure(jnp.ones(2)), lambda: closure(jnp.zeros(2))),
    "code": (lambda: (lambda x: x + 1), lambda: (lambda x: x - 1)),
    "table": (lambda: {"a": 1, "b": 2}, lambda: {"a": 1, "b": 3}),
    "dtype": (lambda: np.zeros(2, np.float32), lambda: np.zeros(2, np.int32)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_another_number_is_another_digest_and_the_same_is_the_same(name):
    one, other = PAIRS[name]
    assert source_digest(one()) != source_digest(other())
    assert source_digest(one()) == source_digest(one())
    assert not uncomparable(source_digest(one()))


def test_the_digest_is_the_same_in_another_process():
    code = (
        "import optax; from prdarts_jax.source_digest import source_digest as d; "
        "from prdarts_jax.space import Space; from prdarts_jax.strategies.prdarts import prdarts; "
        "print(d(optax.adam(1e-3)), d(prdarts(space=Space(nodes=1), lambda1=0.5)), d({'b', 'a', 'c'}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = (optax.adam(1e-3), prdarts(space=SPACE, lambda1=0.5), {"c", "a", "b"})
    assert said == [source_digest(value) for value in here]


def test_what_cannot_be_seen_into_is_said_and_ends_the_claim_of_equal_bits():
    digest = source_digest(closure(threading.Lock()))
    assert "lock" in uncomparable(digest)
    (said,) = runs.tolerance({}, {"digests": {"weights.transform": digest}})
    assert said.startswith("uncomparable: ") and said.endswith("lock in weights.transform")
    assert runs.tolerance({}, {"digests": {"weights.transform": source_digest(closure(1))}}) == []
