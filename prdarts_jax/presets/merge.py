"""How values from several places become one config, and which place decided each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prdarts_jax.config.search import SearchConfig


@dataclass(frozen=True)
class Preset:
    """Data and scale by dotted config path, and a method with options; what is not named keeps its earlier value.

    `method_settings` are fields outside `method.*` that are part of the preset's method, and go with it when another
    strategy takes its place.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: str = "prdarts"
    options: Mapping[str, Any] = field(default_factory=dict)
    method_settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """A complete config, and per dotted path what decided the value (in words, for people)."""

    config: SearchConfig
    sources: Mapping[str, str]
