"""The path of version 0.1.0 for `prdarts_jax.strategy` and `prdarts_jax.space.derive`."""

from __future__ import annotations

from typing import Any

from prdarts_jax.space.derive import derive_pairs, init_normal
from prdarts_jax.strategy import Arch, Continue, Numbers, Restage, Rollback, Stop, Strategy, View

__all__ = [
    "Arch",
    "Continue",
    "Numbers",
    "Restage",
    "Rollback",
    "Stop",
    "Strategy",
    "View",
    "derive_pairs",
    "init_normal",
]


def __getattr__(name: str) -> Any:
    if name == "Traits":
        allowed = 'Strategy(rule=alternating(first="weights" | "arch")) of prdarts_jax.bilevel'
        raise ImportError(f"Traits(order=...) is of version 0.1.0; allowed: {allowed}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
