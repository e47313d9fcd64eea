"""The contract between a search method and everything else: one NamedTuple of pure functions.

A method is a factory `(*, space, **options) -> Strategy`. The loop, the bilevel step, checkpoints, plots and reports
know methods through this contract alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from prdarts_jax.gates import Gates
from prdarts_jax.space.genotype import Genotype

Arch = Any  # the architecture parameters, a pytree
Numbers = Mapping[str, Any]  # numbers that change between epochs, as scalars: they enter the compiled step as arrays


class Traits(NamedTuple):
    """Static facts of a method that shape the compiled step."""

    order: str = "weights_first"  # "weights_first" | "arch_first": who moves first in a step


class Stop(NamedTuple):
    """Event of `end_epoch`: the search ends with this genotype."""

    genotype: Genotype
    reason: str


class Strategy(NamedTuple):
    """A search method.

    Attributes:
      init: key -> arch.
      schedule: (epoch, epochs) -> {name: float}: the progress of an epoch (temperature, ramps, coefficients).
      sample: (key, arch, numbers) -> Gates; differentiable in arch.
      expected: (arch, numbers) -> Gates: the deterministic stand-in of a sample, for evaluation.
      penalty: (arch, gates, numbers) -> (scalar, {name: scalar}): the scalar is added to the validation loss; the
        named terms (its summands, as a rule) and the norm of the gradient of each are logged.
      probabilities: (arch, numbers) -> {"normal", "reduce"} -> float32[E,O]: what reports call P.
      derive: arch -> Genotype.
      end_epoch: (arch, metrics of the epoch, epoch) -> None to go on, or Stop.
      traits: static.
    """

    init: Callable[[jax.Array], Arch]
    schedule: Callable[[int, int], dict[str, float]]
    sample: Callable[[jax.Array, Arch, Numbers], Gates]
    expected: Callable[[Arch, Numbers], Gates]
    penalty: Callable[[Arch, Gates, Numbers], tuple[jax.Array, dict[str, jax.Array]]]
    probabilities: Callable[[Arch, Numbers], dict[str, jax.Array]]
    derive: Callable[[Arch], Genotype]
    end_epoch: Callable[[Arch, Mapping[str, float], int], Stop | None] = lambda arch, metrics, epoch: None
    traits: Traits = Traits()
