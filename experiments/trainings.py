"""Trainings and searches as units of an experiment: one call, resumed if it was stopped, its last figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import prdarts_jax
from prdarts_jax.errors import RunError
from prdarts_jax.presets import train as train_presets
from prdarts_jax.run import metrics
from prdarts_jax.space.genotype import Genotype

RUNS = Path("runs") / "experiments"
FINISHED = ("finished", "already-finished")
_SMALL = {
    "space.cells": 3,
    "space.channels": 4,
    "space.nodes": 2,
    "space.ops": "none,skip_connect,sep_conv_3x3",
    "epochs": 2,
}
# scale -> (preset of the search, preset of the training, seeds, changes of the search, of the training)
_SCALES: dict[str, tuple[str, str, range, dict[str, Any], dict[str, Any]]] = {
    "smoke": ("digits", "digits", range(1), _SMALL, {"network.cells": 3, "network.channels": 4, "epochs": 1}),
    "cpu": ("digits", "digits", range(3), {}, {}),
    "paper": ("paper", "cifar10", range(3), {}, {}),
}


def units(scale: str, name: str, values: Iterable[str]) -> list[dict[str, Any]]:
    """The units of an experiment that searches, and trains what it finds: every seed of every value of `name`."""
    search, train, seeds, changes, train_changes = _SCALES[scale]
    same = {"search": search, "train": train, "changes": changes, "train_changes": train_changes}
    return [{name: value, "seed": seed, **same} for seed in seeds for value in values]


def folder(*parts: Any) -> str:
    """A name for the folder of a unit.

    >>> folder("fig1", "gates only", 0.5)
    'fig1-gates-only-0.5'
    """
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, parts)))


def trained(genotype: Genotype | str, preset: str, seed: int, flags: Mapping[str, Any], name: str) -> dict[str, float]:
    """Test error (percent) after the last epoch of a training from scratch, in runs/experiments/NAME.

    Raises:
      RunError: it was stopped before its end; the same call again goes on.
    """
    made = train_presets.resolve(preset, flags={**flags, "seed": seed})
    result = prdarts_jax.train(made.config, genotype, RUNS / name, sources=made.sources)
    if result.status not in FINISHED:
        raise RunError(f"{RUNS / name}: the training is not finished ({result.status}); start again to go on")
    return {"test_error": 100 * (1 - float(result.metrics["test_accuracy"]))}


def searched(preset: str, strategy: str | None, flags: Mapping[str, Any], name: str) -> Genotype:
    """The cell of a search in runs/experiments/NAME.

    Raises:
      RunError: it was stopped before its end; the same call again goes on.
    """
    made = prdarts_jax.resolve(preset, strategy, flags=flags)
    result = prdarts_jax.search(made.config, RUNS / name, sources=made.sources)
    if result.status not in FINISHED or result.genotype is None:
        raise RunError(f"{RUNS / name}: the search is not finished ({result.status}); start again to go on")
    return result.genotype


def found(
    search: str,
    train: str,
    seed: int,
    name: str,
    *,
    strategy: str | None = None,
    flags: Mapping[str, Any],
    train_flags: Mapping[str, Any],
) -> dict[str, Any]:
    """What a search finds and what that is worth: skips and depth of the normal cell, the cell, the error once trained.

    Args:
      search, train: presets.
      seed: of both.
      name: of the folder in runs/experiments.
      strategy: None: the preset's.
      flags, train_flags: changes by config path.
    """
    genotype = searched(search, strategy, {**flags, "seed": seed}, f"{name}/search")
    cell = [[[op, source] for op, source in node] for node in genotype.cell("normal")[0]]
    figures = trained(genotype, train, seed, train_flags, f"{name}/train")
    return {"skips": genotype.skips("normal"), "depth": genotype.depth("normal"), "normal": cell, **figures}


def epochs(name: str) -> list[dict[str, Any]]:
    """The rows of the epochs in runs/experiments/NAME."""
    return [row for row in metrics.read(RUNS / name / "metrics.jsonl") if row["kind"] == "epoch"]
