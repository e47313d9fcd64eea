"""Whole searches with transforms: a budget is met, and every transform is resumed to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import search_cases
from search_cases import config_of, rows, search

from prdarts_jax.network.counts import pair_costs
from prdarts_jax.searching import loop as search_loop
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import composition, registry

METHODS = [row.name for row in registry.rows()]
TEXTS = {name: name for name in composition.TRANSFORMS} | {
    "frozen": "frozen:epochs=1",
    "stop_at_skips": "stop_at_skips:skips=1",
    "at_most_skips": "at_most_skips:skips=0",
    "cost": "cost:macs=300K,cells=3,channels=4,image=8",
    "hessian_stop": "hessian_stop:window=1,delta=1,every=1,from_epoch=0,iterations=2,threshold=2",
    "hessian_rollback": (
        "hessian_rollback:window=1,delta=1,every=1,from_epoch=0,iterations=2,threshold=1e-9,weight_decay=1000"
    ),
    "perturbed": "perturbed:mode=adversarial,steps=2",
}


@pytest.fixture
def real() -> Iterator[None]:
    with search_cases.shared_programs():
        yield


@pytest.fixture
def stub() -> Iterator[None]:
    """What a transform does to gates, losses, memory and events does not depend on the network."""
    with search_cases.shared_programs(stub=True):
        yield


def _macs(workdir: Path, space: Space) -> float:
    costs = pair_costs(space, "macs", cells=5, channels=8, image=8, in_channels=1)
    return costs.of(Genotype.load(workdir), space)


def test_a_budget_is_met_with_the_transform_and_exceeded_without(real: None, tmp_path: Path) -> None:
    """DARTS on digits, an architecture that moves fast: the derived network's multiply-adds against the target."""
    flags = {
        "space__nodes": 2,
        "space__ops": "skip_connect,max_pool_3x3,sep_conv_3x3,sep_conv_5x5",
        "arch__learning_rate": 0.05,
        "epochs": 4,
        "run__steps_per_dispatch": 7,
    }
    plain = config_of("darts", **flags)
    space = Space.create(plain.space, classes=10, in_channels=1)
    search_loop.search(plain, tmp_path / "plain", data=search_cases.digits())
    free = _macs(tmp_path / "plain", space)
    target = 0.75 * free
    text = f"cost:macs={target},cells=5,channels=8,image=8,scale=5"
    search_loop.search(config_of("darts", text, **flags), tmp_path / "bound", data=search_cases.digits())
    assert _macs(tmp_path / "bound", space) <= target < free
    terms = [row["penalty/cost"] for row in rows(tmp_path / "bound", "epoch")]
    assert terms[0] == 0 and max(terms) > 0, "the multiplier grows after the first epoch"


def _resumes(method: str, texts: list[str], tmp_path: Path) -> None:
    epochs = {"epochs": 6} if method == "p-darts" else {}  # of three stages, in each of which a transform begins anew
    workdir = search_cases.assert_resumes(config_of(method, *texts, **epochs), tmp_path)
    document = json.loads((workdir / "config.json").read_text())
    assert document["config"]["method"]["transforms"] == texts
    assert np.isfinite(rows(workdir, "epoch")[-1]["train_loss"])


def test_a_memory_and_a_larger_architecture_resume_to_the_bit(stub: None, tmp_path: Path) -> None:
    _resumes("darts", [TEXTS["cost"], "edge_weights"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prdarts", "darts"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_transform_resumes_to_the_bit(method: str, name: str, real: None, tmp_path: Path) -> None:
    _resumes(method, [TEXTS[name]], tmp_path)


def _is_refused(method: str, name: str) -> bool:
    return method in search_cases.WITHOUT_GRADIENTS and name not in ("stop_at_skips", "at_most_skips")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(n, m) for n in TEXTS for m in METHODS if not _is_refused(m, n)])
def test_every_transform_of_every_method_resumes_to_the_bit(method: str, name: str, stub: None, tmp_path: Path) -> None:
    _resumes(method, [TEXTS[name]], tmp_path)


@pytest.mark.slow
def test_a_sharp_loss_goes_back_with_a_stronger_weight_decay_until_it_is_the_largest(
    real: None, tmp_path: Path
) -> None:
    workdir = search_cases.assert_resumes(config_of("darts", TEXTS["hessian_rollback"]), tmp_path)
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert [(event["epoch"], event["goes_on_from_epoch"]) for event in events] == [(1, 1), (2, 2)], (
        "two measurements at the new decay"
    )
    decays = [event["hyperparameters"]["weights.weight_decay"] for event in events]
    np.testing.assert_allclose(decays, [3e-3, 3e-2], rtol=1e-6)
    assert [row["epoch"] for row in rows(workdir, "epoch")] == [0, 1, 2]


def test_another_transform_is_another_search(stub: None, tmp_path: Path) -> None:
    from prdarts_jax.errors import UserError

    search(tmp_path / "w", run__time_limit=1e-9, method__transforms=["at_most_skips:skips=0"])
    with pytest.raises(UserError, match=r"method\.transforms"):
        search(tmp_path / "w", method__transforms=["at_most_skips:skips=1"])
