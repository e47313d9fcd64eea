"""How values from several places become one config, and which place decided each. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from prdarts_jax.config import schema

Config = TypeVar("Config")
# Where a value comes from that nobody chose: stated or meant in the paper; not there, or otherwise, but in its authors'
# program; the convention the paper says it follows; none of these.
PAPER, RELEASED, DARTS, OURS = "paper", "released program", "DARTS", "ours"
TRANSFORMS = "method.transforms"  # of a search: what `--with` appends to
OPTIONS = "method.options."  # of a search: in front of the name of an option of its strategy


@dataclass(frozen=True)
class Preset:
    """Data and scale by dotted config path, and a method with options; what is not named keeps its earlier value.

    `method_settings` are fields outside `method.*` that are part of the preset's method, and go with it when another
    strategy takes its place. `provenance` says by path where a value comes from that a training has from the preset.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: str = "prdarts"
    options: Mapping[str, Any] = field(default_factory=dict)
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """A complete config, and per dotted path what decided the value (in words, for people)."""

    config: Config
    sources: Mapping[str, str]


def combine(kind: type, layers: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of several places by dotted path, a later place winning, and the place that decided each field.

    Args:
      kind: the config class; a field that no place names has the source "default".
      layers: place -> dotted path -> value.

    >>> from prdarts_jax.config.train import TrainConfig
    >>> values, sources = combine(TrainConfig, {"preset digits": {"epochs": 40}, "flag": {"epochs": "3"}})
    >>> values, sources["epochs"], sources["seed"]
    ({'epochs': '3'}, 'flag', 'default')
    """
    values: dict[str, Any] = {}
    sources = {path: "default" for path, _, _ in schema.fields(kind) if path != "method.options"}
    for place, named in layers.items():
        values |= named
        sources |= dict.fromkeys(named, place)
    return values, sources


def table(resolved: Resolved[Any]) -> list[tuple[str, Any, str]]:
    """Every (dotted path, value, source), in the order of the config's fields, the strategy's options in their place.

    >>> from prdarts_jax.presets.train import resolve
    >>> table(resolve("digits"))[0]
    ('network.channels', 8, 'preset digits (ours)')
    """
    paths: list[str] = []
    for path, _, _ in schema.fields(type(resolved.config)):
        is_options = f"{path}.".endswith(OPTIONS)
        paths += [f"{path}.{name}" for name in schema.get(resolved.config, path)] if is_options else [path]
    return [(path, schema.get(resolved.config, path), resolved.sources[path]) for path in paths]
