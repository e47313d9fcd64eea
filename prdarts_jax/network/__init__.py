"""The network of a genotype's cells: a flax.linen Module, its plan, its layers and its costs."""

from prdarts_jax.network.counts import Profile, profile
from prdarts_jax.network.module import DerivedNetwork

__all__ = ["DerivedNetwork", "Profile", "profile"]
