"""Random problems, random architectures and measured rates for the experiments on Theorems 1, 2 and 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax import theory
from prdarts_jax.theory import CellWeights

FLOOR = 1e-22  # of the first loss: below it rounding of float64 is what is left
Unit = Mapping[str, Any]


def samples(rng: np.random.Generator, number: int, unit: Unit) -> jax.Array:
    """X [n, mbar, p] of Frobenius norm 1, as the theorems assume, of independent directions."""
    x = rng.normal(size=(number, unit["channels"], unit["positions"]))
    return jnp.asarray(x / np.linalg.norm(x, axis=(1, 2), keepdims=True))


def weights(unit: Unit, roots: tuple[int, ...] = (0,)) -> CellWeights:
    """The Gaussian start of a unit's seed."""
    names = ("nodes", "width", "channels", "positions", "kernel")
    return theory.init(jax.random.key(unit["seed"]), **{name: unit[name] for name in names}, roots=roots)


def simplex_gates(rng: np.random.Generator, number: int, nodes: int) -> np.ndarray:
    """[number, E, 3]: the three weights of an edge sum to 1, as a softmax has them; uniform on the simplex."""
    return rng.dirichlet(np.ones(3), size=(number, len(theory.edges(nodes))))


def independent_gates(rng: np.random.Generator, number: int, nodes: int) -> np.ndarray:
    """[number, E, 3]: each gate uniform on (0, 1) by itself."""
    return rng.uniform(size=(number, len(theory.edges(nodes)), 3))


class Rates(NamedTuple):
    """How fast the residual of each architecture shrank: 1 - |u_{k+1} - y| / |u_k - y|, as a mean over steps.

    Attributes:
      middle, late: over the third and the last quarter of the steps before the floor of rounding.
      worst: 1 - max F_{k+1} / F_k over the single steps: the rate in the sense of Theorem 1.
    """

    middle: np.ndarray
    late: np.ndarray
    worst: np.ndarray


def rates(losses: np.ndarray) -> Rates:
    """Rates of losses [architectures, steps]: the residual is the square root of the loss.

    >>> found = rates(0.9 ** (2 * np.arange(41.0))[None])
    >>> [round(float(v[0]), 6) for v in found]
    [0.1, 0.1, 0.19]
    """
    found = []
    for f in np.asarray(losses, dtype=float):
        below = np.flatnonzero(~(f > FLOOR * f[0]))
        end = int(below[0]) - 1 if below.size else len(f) - 1
        half, three, end = max(end // 2, 0), max(3 * end // 4, 1), max(end, 2)
        per_step = [1 - (f[b] / f[a]) ** (0.5 / (b - a)) for a, b in ((half, three), (three, end))]
        found.append((*per_step, 1 - np.max(f[1 : end + 1] / f[:end])))
    return Rates(*np.array(found).T)


@cache
def mapped(f: Callable[..., Any], sigma: theory.Sigma, roots: tuple[int, ...], **static: Any) -> Callable[..., Any]:
    """`f(weights, gates, *data, **numbers)` of theory.py over many architectures that start from the same weights.

    Compiled once for all units of equal shapes.
    """
    one = partial(f, sigma=sigma, roots=roots, **static)
    return jax.jit(
        lambda weights, gates, *data, **numbers: jax.vmap(lambda g: one(weights, g, *data, **numbers))(gates)
    )
