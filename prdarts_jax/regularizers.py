"""Penalty terms on activation probabilities (never on samples), one cell type at a time   (section 4.1 and 4.2).

    L_skip    = mean over edges of P(skip)
    L_nonskip = mean over edges and the other operations of P
    L_path    = prod over the path edges (1->2), (2->3), ... of sum over the convolutions of P              (eq. 8)

A mask restricts a term to the executed operations, as the program of the authors does. Operations that an edge may not
use never count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.errors import unknown
from prdarts_jax.gates import AnyArray
from prdarts_jax.space.spec import Space

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

PATH_REDUCTIONS = ("sum", "mean")


def group_term(
    probabilities: Float[AnyArray, "E O"],
    columns: Bool[AnyArray, "#O"],
    space: Space,
    kind: str = "normal",
    mask: Bool[AnyArray, "E O"] | None = None,
) -> Float[jax.Array, ""]:
    """Mean P over the edges and the operations of a group; 0 if the mask leaves none.

    Args:
      probabilities: float32[E,O].
      columns: bool[O], the group.
      space, kind: say which operations an edge may use.
      mask: bool[E,O] of executed operations, or None for all.

    Returns:
      float32 scalar.
    """
    counted = jnp.asarray(space.allowed[kind] & columns[None, :])
    if mask is not None:
        counted = counted & mask
    number = jnp.sum(counted.astype(probabilities.dtype))
    return jnp.sum(jnp.where(counted, probabilities, 0.0)) / jnp.maximum(number, 1.0)


def skip_term(
    probabilities: Float[AnyArray, "E O"],
    space: Space,
    mask: Bool[AnyArray, "E O"] | None = None,
    *,
    kind: str = "normal",
) -> Float[jax.Array, ""]:
    """L_skip = (1/E) sum_e P(skip on e), a float32 scalar; arguments as in `group_term`.

    >>> round(float(skip_term(jnp.full((14, 8), 0.25), Space())), 6)
    0.25
    """
    return group_term(probabilities, space.group("skip"), space, kind, mask)


def nonskip_term(
    probabilities: Float[AnyArray, "E O"],
    space: Space,
    mask: Bool[AnyArray, "E O"] | None = None,
    *,
    kind: str = "normal",
) -> Float[jax.Array, ""]:
    """L_nonskip = 1/(E (O-1)) sum_e sum_{o != skip} P, a float32 scalar; arguments as in `group_term`.

    >>> round(float(nonskip_term(jnp.full((14, 8), 0.5), Space())), 6)
    0.5
    """
    return group_term(probabilities, ~space.group("skip"), space, kind, mask)


def path_depth_term(
    probabilities: Float[AnyArray, "E O"],
    space: Space,
    mask: Bool[AnyArray, "E O"] | None = None,
    *,
    kind: str = "normal",
    reduction: str = "sum",
) -> Float[jax.Array, ""]:
    """L_path = prod over the path edges of the sum (or mean) over their convolutions of P   (eq. 8), float32 scalar.

    A path edge that allows no convolution makes the product 0, as the empty sum of eq. 8 does. With a mask, as in the
    released program, path edges without an executed convolution are left out of the product; 0 if none is left.

    Args:
      probabilities, space, mask, kind: as in `group_term`.
      reduction: "sum" (eq. 8) or "mean".

    >>> float(path_depth_term(jnp.ones((14, 8)), Space()))
    256.0
    """
    if reduction not in PATH_REDUCTIONS:
        raise unknown("method.options.path_reduction", reduction, PATH_REDUCTIONS)
    rows = np.asarray(space.path_edges)
    counted = jnp.asarray((space.allowed[kind] & space.group("conv")[None, :])[rows])
    if mask is not None:
        counted = counted & mask[rows]
    number = jnp.sum(counted.astype(probabilities.dtype), axis=1)
    factor = jnp.sum(jnp.where(counted, probabilities[rows], 0.0), axis=1)
    if reduction == "mean":
        factor = factor / jnp.maximum(number, 1.0)
    if mask is None:
        return jnp.prod(factor)
    present = number > 0
    return jnp.where(jnp.any(present), jnp.prod(jnp.where(present, factor, 1.0)), 0.0)
