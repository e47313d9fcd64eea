"""A user's own method and optimizers in a population: what enters as an array is swept, what is frozen is refused."""

from __future__ import annotations

import jax
import pytest
import search_cases

from prdarts_jax.errors import UserError
from prdarts_jax.searching.population import search_population


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


FACTORY = """
import functools
from prdarts_jax.strategies.prdarts import prdarts

def mine(*, space, pull=1.0):
    base = prdarts(space=space, executed_ops=1)
    {body}

mine.arrays = ("pull",)
"""
THROUGH_SCHEDULE = """schedule = lambda epoch, epochs: base.schedule(epoch, epochs) | {"pull": pull}
    def objective(ce, arch, gates, memory, progress):
        total, terms = base.objective(ce, arch, gates, memory, progress)
        return ce + progress["pull"] * (total - ce), {name: progress["pull"] * term for name, term in terms.items()}
    return base._replace(schedule=schedule, objective=objective)"""
FROZEN = """def objective(ce, arch, gates, memory, progress):
        total, terms = base.objective(ce, arch, gates, memory, progress)
        return ce + pull * (total - ce), terms
    return base._replace(objective=objective)"""

IN_THE_RULE = """import numpy as np
    from prdarts_jax.bilevel import mixed_level
    return base._replace(FIELD)"""


def _users_config(tmp_path, body):
    from prdarts_jax import presets

    (tmp_path / "mine.py").write_text(FACTORY.replace("{body}", body))
    flags = {name: value for name, value in search_cases.FLAGS.items() if not name.startswith("method.")}
    return presets.resolve("digits", f"{tmp_path / 'mine.py'}:mine", {**flags, "epochs": 1}).config


@pytest.mark.slow
def test_a_number_of_the_users_own_method(tmp_path):
    config, data = _users_config(tmp_path, THROUGH_SCHEDULE), search_cases.digits()
    result = search_population(config, tmp_path / "w", {"pull": [1.0, 0.0]}, data=data)
    assert result.status == "finished"
    strong, weak = (search_cases.rows(tmp_path / "w" / f"pull={pull}", "step") for pull in ("1.0", "0.0"))
    assert strong[0]["penalty/total"] < 0 or strong[0]["penalty/total"] > 0
    assert all(row["penalty/total"] == 0 for row in weak)


def test_a_number_that_the_users_method_has_frozen_is_refused(tmp_path):
    config, data = _users_config(tmp_path, FROZEN), search_cases.digits()
    with pytest.raises(UserError, match=r"sweep: pull=0\.0 makes another program of method\.strategy"):
        search_population(config, tmp_path / "w", {"pull": [1.0, 0.0]}, data=data)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("field", ["rule=mixed_level(pull)", "memory=np.float32(pull)"])
def test_a_number_frozen_in_the_rule_or_the_first_memory_is_refused(tmp_path, field):
    """The program of the first member would compute all of them with its own number."""
    config, data = _users_config(tmp_path, IN_THE_RULE.replace("FIELD", field)), search_cases.digits()
    with pytest.raises(UserError, match=r"sweep: pull=0\.0 makes another program of method\.strategy"):
        search_population(config, tmp_path / "w", {"pull": [1.0, 0.0]}, data=data)


def test_a_users_optimizer_that_has_frozen_the_seed_is_refused(tmp_path):
    import optax

    def noisy(config):
        return optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(config.seed)), optax.sgd(0.1))

    config, data = search_cases.config(), search_cases.digits()
    with pytest.raises(UserError, match=r"sweep: seed=1 makes another program of weights\.transform"):
        search_population(config, tmp_path / "w", {"seed": [0, 1]}, data=data, weight_tx=noisy)
    with pytest.raises(UserError, match=r"'weights.weight_decay' needs a compilation of its own"):
        search_population(config, tmp_path / "w", {"weights.weight_decay": [0.1]}, data=data, weight_tx=noisy)
    assert not (tmp_path / "w").exists()
