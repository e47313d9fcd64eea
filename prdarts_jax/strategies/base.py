"""The path of version 0.1.0 for `prdarts_jax.strategy` and `prdarts_jax.space.derive`."""

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
