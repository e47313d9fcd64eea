"""Digests of the caller's objects: equal for the same construction in any process, different for another number."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prdarts_jax.config.source_digest import source_digest, uncomparable
from prdarts_jax.run import provenance
from prdarts_jax.space import Space
from prdarts_jax.strategies.prdarts import prdarts

SPACE = Space(nodes=1)


def closure(number):
    def inner(x):
        return x * number

    return inner


def default(number, keyword):
    def inner(x=number, *, y=keyword):
        return x + y

    return inner


def reads_global(number):
    names = {"NUMBER": number, "__name__": "mine"}
    exec("def f(x):\n    return (lambda: NUMBER * x)()\n", names)
    return names["f"]


def cycle(number):
    found = [number]
    found.append(found)
    return found


def custom_gradient(number):
    function = jax.custom_vjp(lambda x: x)
    function.defvjp(lambda x: (x, None), lambda _, g: (number * g,))
    return function


@dataclasses.dataclass(frozen=True)
class Data:
    x: float


class Plain:
    def __init__(self, x):
        self.x = x

    @functools.cached_property
    def twice(self):
        return 2 * self.x


MAKERS = {
    "schedule": lambda x: optax.sgd(optax.cosine_decay_schedule(x, 10)),
    "hyperparameters": lambda x: optax.inject_hyperparams(optax.sgd)(learning_rate=x),
    "chain": lambda x: optax.chain(optax.clip_by_global_norm(x), optax.adam(1e-3)),
    "init alone": lambda x: optax.GradientTransformation(closure(x), max),
    "temperature": lambda x: prdarts(space=SPACE, tau_max=x),
    "default": lambda x: default(x, 0),
    "keyword default": lambda x: default(0, x),
    "global": reads_global,
    "cached": lambda x: functools.cache(closure(x)),
    "jitted": lambda x: jax.jit(closure(x)),
    "custom gradient": custom_gradient,
    "dataclass": Data,
    "object": Plain,
    "method": lambda x: Plain(x).__init__,
    "partial": lambda x: functools.partial(prdarts, x),
    "set": lambda x: {x, "a"},
    "cycle": cycle,
    "scalar": np.float32,
}
PAIRS = {
    "learning rate": (lambda: optax.adam(1e-3), lambda: optax.adam(1e-1)),
    "optimizer": (lambda: optax.adam(1e-1), lambda: optax.sgd(1e-1)),
    "strategy": (lambda: prdarts(space=SPACE, lambda1=0.01), lambda: prdarts(space=SPACE, lambda1=10.0)),
    "partial": (lambda: functools.partial(prdarts, lambda1=0.1), lambda: functools.partial(prdarts, lambda1=10.0)),
    "closure": (lambda: closure(1), lambda: closure(2)),
    "array": (lambda: closure(jnp.ones(2)), lambda: closure(jnp.zeros(2))),
    "code": (lambda: lambda x: x + 1, lambda: lambda x: x - 1),
    "table": (lambda: {"a": 1, "b": 2}, lambda: {"a": 1, "b": 3}),
    **{name: (functools.partial(make, 0.5), functools.partial(make, 0.75)) for name, make in MAKERS.items()},
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
        "import optax; from prdarts_jax.config.source_digest import source_digest as d; "
        "from prdarts_jax.space import Space; from prdarts_jax.strategies.prdarts import prdarts; "
        "print(d(optax.adam(1e-3)), d(prdarts(space=Space(nodes=1), lambda1=0.5)), d({'b', 'a', 'c'}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = (optax.adam(1e-3), prdarts(space=SPACE, lambda1=0.5), {"c", "a", "b"})
    assert said == [source_digest(value) for value in here]


def test_what_cannot_be_seen_into_is_said_and_ends_the_claim_of_equal_bits():
    digest = source_digest(closure(threading.Lock()))
    assert "lock" in uncomparable(digest)
    (said,) = provenance.tolerance({}, {"digests": {"weights.transform": digest}})
    assert said.startswith("uncomparable: ") and said.endswith("lock in weights.transform")
    assert provenance.tolerance({}, {"digests": {"weights.transform": source_digest(closure(1))}}) == []


@pytest.mark.parametrize("field", prdarts(space=SPACE)._fields[:8])
def test_every_function_of_a_strategy_counts(field):
    made = prdarts(space=SPACE)
    one, other = (source_digest(made._replace(**{field: closure(number)})) for number in (1, 2))
    assert one != other


def test_kinds_do_not_run_into_each_other():
    functions = [lambda x: x, lambda x: 2 * x]  # one line of source
    values = [
        *(0, 0.0, -0.0, False, None, "0", b"0", 0j, 1, "", [], (), {}, set(), [0], (0,), {0}, [[0]], ["ab"]),
        *(np.float32(0), np.float64(0), np.zeros(1), np.zeros((1, 1)), np.zeros(2), range(2), int, float, np, jax),
        *(["a", "b"], np.add, np.multiply, len, max, Data(0), Plain(0), *functions),
        *(jax.random.key(0), jax.random.key(1)),
    ]
    assert len({source_digest(value) for value in values}) == len(values)


def test_what_was_cached_says_nothing():
    read = Plain(1)
    assert read.twice == 2
    assert source_digest(read) == source_digest(Plain(1))


def test_deep_objects_end():
    value: list = []
    for _ in range(10_000):
        value = [value]
    assert uncomparable(source_digest(value)) == "builtins.list"
