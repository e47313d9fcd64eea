"""A budget for the derived network: multiply-adds or parameters are led to a target while the cell is searched.

    objective + l E[cost] / target;   after an epoch  l <- max(0, l + scale (cost of the derived network / target - 1))

E[cost] = fixed + sum over pairs of q cost, where q gives the two pairs of a node to all pairs into it in proportion to
P. The multiplier l is that of a Lagrangian: it grows while the network that would be derived is above the target, and
falls below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.config.schema import require
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.network.counts import PairCosts, pair_costs
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.nesting import remembering, with_memory
from prdarts_jax.strategy import Arch, Event, Memory, Numbers, Strategy, View

_PAIRS = 2  # of a node


def cost(
    strategy: Strategy,
    *,
    macs: str | float = "",
    params: str | float = "",
    scale: float = 1.0,
    cells: int = 20,
    channels: int = 36,
    image: int = 32,
    stem: str = "cifar",
) -> Strategy:
    """Leads the cost of the derived network to a target.

    Args:
      strategy: any.
      macs: the target in multiply-adds an image, as 600M (K, M, G).
      params: the target in parameters, as 4M; one of the two is given.
      scale: how fast the multiplier follows.
      cells, channels, image (pixels), stem ("cifar" | "imagenet"): of the derived network.

    Raises:
      UserError: no target, both, or one that no cell of the space can reach; a size that is not possible.

    >>> from prdarts_jax.space.spec import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = cost(get("darts", space=Space()), macs="600M")
    >>> float(strategy.memory[1])  # the multiplier
    0.0
    """
    field = "method.transforms.cost"
    if (macs == "") == (params == ""):
        raise UserError(f"{field}: macs {macs!r} and params {params!r}; allowed: exactly one of the two, as macs=600M")
    what = "params" if macs == "" else "macs"
    target = amount(params if macs == "" else macs, f"{field}.{what}")
    require(0 < scale < float("inf"), f"{field}.scale", scale, "> 0, finite")
    require(image >= 1, f"{field}.image", image, ">= 1")
    space = strategy.space
    costs = pair_costs(space, what, channels=channels, cells=cells, classes=space.classes, image=image, stem=stem)
    usable = _usable(space)
    into = np.array([target_node for _, target_node in space.edges])
    least = costs.fixed
    for kind in CELL_TYPES:
        for node in range(2, 2 + space.nodes):
            cheapest = np.where(usable[kind], costs.pairs[kind], np.inf)[into == node].min(axis=1)
            least += float(np.sort(cheapest)[:_PAIRS][np.isfinite(np.sort(cheapest)[:_PAIRS])].sum())
    require(target >= least, f"{field}.{what}", f"{target:.4g}", f">= {least:.4g}, the cheapest cell at this size")

    def expected(arch: Arch, numbers: Numbers) -> jax.Array:
        return expected_cost(strategy.probabilities(arch, numbers), costs, space, target)

    inner = with_memory(strategy, np.zeros((), np.float32))

    def objective(ce: jax.Array, arch: Arch, gates: Gates, memory: Memory, numbers: Numbers) -> tuple[jax.Array, Any]:
        value, terms = inner.objective(ce, arch, gates, memory, numbers)
        term = memory[1] * expected(arch, numbers)
        return value + term, {**terms, "cost": term}

    def at_epoch(view: View) -> Event | None:
        above = costs.of(view.genotype, space) / target - 1
        multiplier = np.float32(max(0.0, float(view.memory[1]) + scale * above))
        return remembering(inner.at_epoch(view), view, multiplier)

    return inner._replace(objective=objective, at_epoch=at_epoch)


def _usable(space: Space) -> dict[str, np.ndarray]:
    return {kind: space.allowed[kind] & ~space.group("none")[None, :] for kind in CELL_TYPES}


def expected_cost(p: Mapping[str, jax.Array], costs: PairCosts, space: Space, unit: float = 1.0) -> jax.Array:
    """(fixed + sum over pairs of q cost) / unit: q gives the two pairs of a node to all pairs into it as P is.

    Args:
      p: {"normal", "reduce"} -> P, float32[E,O].
      costs: of the pairs, in the derived network.
      space: the search space.
      unit: in which the cost is given, so that float32 holds it.

    >>> space = Space()
    >>> costs, p = pair_costs(space, "macs"), {kind: jnp.ones((14, 8)) for kind in CELL_TYPES}
    >>> 400 < float(expected_cost(p, costs, space, 1e6)) < 600  # millions of multiply-adds
    True
    """
    into = np.array([target for _, target in space.edges])
    same, total = into[:, None] == into[None, :], jnp.float32(costs.fixed / unit)
    for kind, usable in _usable(space).items():
        chance = jnp.where(jnp.asarray(usable), p[kind], 0.0)
        of_node = jnp.asarray(same, chance.dtype) @ jnp.sum(chance, axis=1)
        share = _PAIRS * chance / jnp.maximum(of_node, 1e-12)[:, None]
        total = total + jnp.sum(share * jnp.asarray(costs.pairs[kind] / unit, chance.dtype))
    return total


def amount(text: str | float, field: str) -> float:
    """A number with K, M or G, as `macs` and `params` take it.

    >>> amount("1.5M", "cost.macs")
    1500000.0
    """
    units = {"K": 1e3, "M": 1e6, "G": 1e9}
    digits = str(text).strip()
    unit = units.get(digits[-1:].upper(), 1.0)
    try:
        value = float(digits[:-1] if unit != 1.0 else digits) * unit
    except ValueError:
        value = float("nan")
    require(0 < value < float("inf"), field, text, "a number > 0, with K, M or G")
    return value
