"""Presets of the protocol: those of its search and its trainings, how many seeds, and how long a short training is.

Imports no jax until the options of a strategy are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prdarts_jax.config import schema
from prdarts_jax.config.pipeline import HOLDOUT, STAGES, PipelineConfig
from prdarts_jax.config.schema import parse_seeds
from prdarts_jax.errors import unknown
from prdarts_jax.presets import search as search_presets
from prdarts_jax.presets import train as train_presets
from prdarts_jax.presets.merge import Preset, Resolved

PRESETS: Mapping[str, Preset] = {
    "paper": Preset(
        "CIFAR-10: four searches, short trainings of 100 epochs (both as DARTS chooses), three full trainings",
        settings={"search_seeds": "0..3", "train_seeds": "0..2", "short.epochs": 100, "holdout": HOLDOUT},
    ),
    "released": Preset(
        "the same with the search and the training that the program of PR-DARTS' authors does",
        settings={"search_seeds": "0..3", "train_seeds": "0..2", "short.epochs": 100, "holdout": HOLDOUT},
    ),
    "digits": Preset(
        "the 8x8 digits inside scikit-learn: under ten minutes on two cores, nothing to download",
        settings={"search_seeds": "0..2", "train_seeds": "0..1", "short.epochs": 10, "holdout": 0.2},
    ),
    "cifar10-small": Preset(
        "CIFAR-10 at a scale for two cores",
        settings={"search_seeds": "0..2", "train_seeds": "0..1", "short.epochs": 5, "holdout": HOLDOUT},
    ),
}
# The presets of search and training that each consists of.
PARTS: Mapping[str, tuple[str, str]] = {
    "paper": ("paper", "cifar10"),
    "released": ("released", "released-cifar10"),
    "digits": ("digits", "digits"),
    "cifar10-small": ("cifar10-small", "cifar10-small"),
}
# What is said once for several stages: name -> the fields it sets.
SHARED: Mapping[str, tuple[str, ...]] = {
    "data": tuple(f"{stage}.data.source" for stage in STAGES),
    "holdout": ("search.data.holdout", "short.data.holdout"),
    "search.space.primitives": ("short.network.primitives", "full.network.primitives"),
}
_PIPELINE_ALONE = ("workdir", "overwrite", "time_limit")  # of `run`: what the stages do not have


def resolve(preset: str = "paper", flags: Mapping[str, Any] | None = None) -> Resolved[PipelineConfig]:
    """The config of a pipeline, and the source of each of its values.

    Each stage is resolved as a search or a training of its own. Fields of `run` are those of all stages, unless one
    has its own.

    Args:
      preset: a name of `PRESETS`.
      flags: dotted config path -> value or command-line string; `search.`, `short.` and `full.` are in front of what
        belongs to a stage; the names of `SHARED` set several at once.

    Raises:
      UserError: an unknown preset or path, or a value that is not possible.

    >>> made = resolve("digits", {"search.epochs": "3", "holdout": "0.25"})
    >>> made.config.search.epochs, made.config.short.data.holdout, made.config.full.data.holdout
    (3, 0.25, 0.0)
    >>> made.sources["search.epochs"], made.sources["full.epochs"]
    ('flag', 'preset digits (ours)')
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    own = PRESETS[preset].settings
    layers = {f"preset {preset}": _spread(own), "flag": _spread(flags or {})}
    parts: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for stage in STAGES:
        given = {place: _of(stage, values) for place, values in layers.items()}
        # A training says itself by what it is chosen, and the short one by no test image.
        always = {"evaluate_every": 0} if stage == "short" else {}
        merged = {**always, **given[f"preset {preset}"], **given["flag"]}
        part, training = PARTS[preset]
        made: Resolved[Any] = (
            search_presets.resolve(part, flags=merged) if stage == "search" else train_presets.resolve(training, merged)
        )
        parts[stage] = made.config
        here = {path: source for path, source in made.sources.items()}
        for place, values in {"pipeline": always, **given}.items():
            here |= {path: place for path in values if path in here}
        sources |= {f"{stage}.{path}": source for path, source in here.items()}
    rest = {
        path: (value, place)
        for place, values in layers.items()
        for path, value in values.items()
        if path.partition(".")[0] not in STAGES
    }
    values = {path: value for path, (value, _) in rest.items()}
    for path in ("search_seeds", "train_seeds"):
        if isinstance(values[path], str):
            values[path] = parse_seeds(values[path], path)
    sources |= {path: "default" for path, _, _ in schema.fields(PipelineConfig) if path.partition(".")[0] not in STAGES}
    sources |= {path: place for path, (_, place) in rest.items()}
    return Resolved(schema.replace(PipelineConfig(**parts), values), sources)


def _spread(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of fields, what is said once for several stages set in each; a stage's own wins."""
    fields = {name: value for name, value in flags.items() if name not in ("data", "holdout")}
    for name, paths in SHARED.items():
        if name in flags:
            fields = {**dict.fromkeys(paths, flags[name]), **fields}
    for path, value in flags.items():
        section, _, name = path.partition(".")
        if section == "run" and name not in _PIPELINE_ALONE:
            stages = STAGES[1:] if name == "workers" else STAGES
            fields = {**{f"{stage}.{path}": value for stage in stages}, **fields}
    return fields


def _of(stage: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stage, by their paths in its own config."""
    return {path.partition(".")[2]: value for path, value in flags.items() if path.startswith(f"{stage}.")}
