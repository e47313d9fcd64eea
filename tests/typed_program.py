"""A user's small program, held against the types of the library by `mypy --strict` (tests/test_typed.py)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

import prdarts_jax
from prdarts_jax import gates, regularizers
from prdarts_jax.network import DerivedNetwork, profile
from prdarts_jax.space import Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategies.transforms import at_most_skips
from prdarts_jax.strategy import Strategy


def few_skips(*, space: Space) -> Strategy:
    """DARTS with at most one skip connection."""
    return at_most_skips(darts(space=space), skips=1)


def main(workdir: Path) -> float:
    """A search, its cell, and what that costs."""
    resolved = prdarts_jax.resolve("digits", flags={"epochs": 1})
    result = prdarts_jax.search(resolved.config, workdir, strategy=few_skips, sources=resolved.sources)
    genotype: prdarts_jax.Genotype | None = result.genotype
    if genotype is None:
        raise SystemExit(result.status)
    skips: int = genotype.skips("normal")
    cost: int = profile(genotype, "cifar10").macs
    network = DerivedNetwork(genotype, channels=16, cells=8)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    drawn: jax.Array = gates.hard_concrete(jax.random.key(1), jnp.zeros((14, 8)), tau=0.5)
    depth: jax.Array = regularizers.path_depth_term(drawn, Space())
    del variables
    return skips + cost + float(depth)
