"""MiLeNAS: the architecture of DARTS descends both losses, which is one level and a half.

    alpha - opt [grad_alpha L_val(w, alpha) + scale grad_alpha L_train(w, alpha)], then w - opt grad_w L_train(w, alpha)

He, Ye, Shen, Zhang: MiLeNAS: Efficient Neural Architecture Search via Mixed-Level Reformulation, CVPR 2020.
"""

from __future__ import annotations

import math

from prdarts_jax.bilevel import mixed_level
from prdarts_jax.config.schema import require
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategy import Strategy


def milenas(*, space: Space, scale: float = 1.0, init_scale: float = 1e-3) -> Strategy:
    """The MiLeNAS strategy, first order.

    Args:
      space: the search space.
      scale: of the gradient of the train loss.
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> milenas(space=Space()).schedule(0, 50)
    {}
    """
    require(math.isfinite(scale) and scale >= 0, "method.options.scale", scale, "a finite number >= 0")
    return darts(space=space, init_scale=init_scale)._replace(rule=mixed_level(scale))
