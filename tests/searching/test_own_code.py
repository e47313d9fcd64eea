"""The caller's own strategies and optimizers: equal for the same construction, different for another number."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from search_cases import standard_promotion

from prdarts_jax.config.search import DataConfig
from prdarts_jax.devices import sharding
from prdarts_jax.searching import own_code
from prdarts_jax.searching.own_code import ARCH, METHOD, WEIGHTS, try_out
from prdarts_jax.searching.program import SearchProblem
from prdarts_jax.space import Space
from prdarts_jax.strategies.prdarts import prdarts
from prdarts_jax.strategy import Stop

SPACE = Space(nodes=1, cells=3, channels=2, ops=("none", "skip_connect"), classes=2, in_channels=1)
MESH = sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(autouse=True)
def _as_optax_expects(monkeypatch):
    """The step of all parts is tried last and says nothing of the digests: its errors have tests of their own."""
    monkeypatch.setattr(own_code, "abstract_carry", lambda *_: None)
    with standard_promotion():
        yield


def digests(strategy=None, weight_tx=None, arch_tx=None):
    own = {METHOD: strategy, WEIGHTS: weight_tx, ARCH: arch_tx}
    problem = SearchProblem(
        space=SPACE,
        strategy=strategy or prdarts(space=SPACE, executed_ops=1),
        weight_tx=weight_tx or optax.sgd(0.1),
        arch_tx=arch_tx or optax.sgd(0.1),
        data=DataConfig(source="digits", crop_padding=0),
        mean=(0.5,),
        std=(0.5,),
        dtype="float32",
    )
    return try_out(problem, MESH, (8, 8, 1), 3, {}, {field: value for field, value in own.items() if value is not None})


def method(**changes):
    """PR-DARTS with some of its functions replaced."""
    return prdarts(space=SPACE, executed_ops=1)._replace(**changes)


def penalised(weight):
    base = prdarts(space=SPACE, executed_ops=1)

    def penalty(arch, gates, numbers):
        total, terms = base.penalty(arch, gates, numbers)
        return weight * total, terms

    return base._replace(penalty=penalty)


def stopping(after):
    def end_epoch(arch, metrics, epoch):
        return Stop(BASE.derive(arch), "enough") if epoch >= after else None

    return method(end_epoch=end_epoch)


BASE = method()
METHODS = {
    "an option": lambda x: prdarts(space=SPACE, executed_ops=1, lambda1=x),
    "a schedule": lambda x: method(schedule=lambda epoch, epochs: BASE.schedule(epoch, epochs) | {"tau": 1.0 + x}),
    "a number in the penalty": penalised,
    "an array in the start": lambda x: method(init=lambda key: jax.tree.map(lambda a: x * a, BASE.init(key))),
    "when it ends": stopping,
}
OPTIMIZERS = {
    "a learning rate": lambda x: optax.sgd(x),
    "a schedule": lambda x: optax.sgd(optax.cosine_decay_schedule(x, 10)),
    "a hyperparameter of the state": lambda x: optax.inject_hyperparams(optax.sgd)(learning_rate=x),
    "a part of a chain": lambda x: optax.chain(optax.clip_by_global_norm(x), optax.adam(1e-3)),
    "an array": lambda x: optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * np.float32(x), updates)),
}


@pytest.mark.parametrize("name", METHODS)
def test_another_number_is_another_method(name):
    one, same, other = (digests(METHODS[name](x)) for x in (0.5, 0.5, 0.75))
    assert one == same != other
    assert list(one) == [METHOD]


@pytest.mark.parametrize("field", ["weight_tx", "arch_tx"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_number_is_another_optimizer(name, field):
    one, same, other = (digests(**{field: OPTIMIZERS[name](x)}) for x in (0.5, 0.5, 0.75))
    assert one == same != other


def test_other_code_is_another_optimizer():
    assert digests(weight_tx=optax.sgd(0.1)) != digests(weight_tx=optax.adam(0.1))
    halved = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u / 2, updates))
    negative = optax.stateless(lambda updates, _: jax.tree.map(jnp.negative, updates))
    assert digests(weight_tx=halved) != digests(weight_tx=negative)


def stopping_late(patience, *, of=None):
    """A method whose functions close over another Strategy, as one is wrapped from outside."""
    base = method()

    def end_epoch(arch, metrics, epoch):
        return Stop(base.derive(arch), "enough") if epoch >= patience else None

    return base._replace(end_epoch=end_epoch if of is None else of)


class Patience:
    def __init__(self, patience):
        self.patience = patience

    def __call__(self, arch, metrics, epoch):
        return None

    def method(self, arch, metrics, epoch):
        return None


def _stop(arch, metrics, epoch, patience):
    return None


HOST = {
    "a strategy closed over": stopping_late,
    "a partial": lambda x: stopping_late(1, of=functools.partial(_stop, patience=x)),
    "an object": lambda x: stopping_late(1, of=Patience(x)),
    "a bound method": lambda x: stopping_late(1, of=Patience(x).method),
    "an array": lambda x: stopping_late(
        1, of=(lambda table: lambda arch, metrics, epoch: table and None)(np.full(2, x))
    ),
    "a list": lambda x: stopping_late(1, of=Patience([1, {"a": x}])),
}


@pytest.mark.parametrize("name", HOST)
def test_what_is_not_compiled_counts_with_what_it_holds(name):
    one, same, other = (digests(HOST[name](x)) for x in (1, 1, 2))
    assert one == same != other


def test_how_a_cell_is_derived_counts():
    """Not compiled: seen by the cell it derives, or by its source."""
    assert digests(method(derive=lambda arch: BASE.derive(arch))) != digests(method(derive=BASE.derive))


def test_the_digests_are_those_of_another_process():
    code = "import test_own_code as t; print(*t.digests(t.stopping_late(3), t.optax.adam(1e-3)).values())"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command, settings = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
    assert said.stdout.split() == list(digests(stopping_late(3), optax.adam(1e-3)).values())


def test_nothing_is_lowered_where_nothing_is_the_callers():
    assert digests() == {}
