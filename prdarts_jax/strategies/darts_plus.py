"""DARTS+: DARTS that ends when its normal cell has two skip connections.

    stop_at_skips(darts)

Liang, Zhang, Sun, He, Huang, Zhuang, Li: DARTS+: Improved Differentiable Architecture Search with Early Stopping,
arXiv 1909.06035. The criterion is that which others report; the paper itself was not at hand.
"""

from __future__ import annotations

from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategies.transforms import stop_at_skips
from prdarts_jax.strategy import Strategy


def darts_plus(
    *, space: Space, skips: int = 2, share: float = 0.2, order: int = 1, init_scale: float = 1e-3
) -> Strategy:
    """The DARTS+ strategy.

    Args:
      space: the search space.
      skips: skip connections of the derived normal cell that end the search.
      share: of the epochs, before which nothing ends it: a cell derived from nearly equal parameters has two skip
        connections by chance. Ours.
      order: of DARTS, 1 or 2.
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> darts_plus(space=Space(), skips=0)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: method.transforms.stop_at_skips.skips: 0 is not possible; allowed: >= 1
    """
    return stop_at_skips(darts(space=space, order=order, init_scale=init_scale), skips=skips, share=share)
