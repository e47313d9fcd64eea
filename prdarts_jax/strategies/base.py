"""The path of version 0.1.0 for `prdarts_jax.strategy` and `prdarts_jax.strategies.derive`."""

from prdarts_jax.strategies.derive import derive_pairs, init_normal
from prdarts_jax.strategy import Arch, Numbers, Stop, Strategy, Traits

Progress = Numbers

__all__ = ["Arch", "Numbers", "Progress", "Stop", "Strategy", "Traits", "derive_pairs", "init_normal"]
