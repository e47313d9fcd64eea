"""RobustDARTS: DARTS of second order that is stopped, or regularised more, where its validation loss becomes sharp.

    hessian_stop(darts), or hessian_rollback(darts);   drop_path in epoch e of E: p e/(E-1)

Zela, Elsken, Saikia, Marrakchi, Brox, Hutter: Understanding and Robustifying Differentiable Architecture Search,
ICLR 2020.
"""

from __future__ import annotations

from typing import Any

from prdarts_jax.config.schema import require
from prdarts_jax.errors import unknown
from prdarts_jax.space.noise import DROP_PATH
from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategies.stability import hessian_rollback, hessian_stop
from prdarts_jax.strategy import Strategy

ALARMS = ("stop", "rollback", "none")


def robust_darts(
    *,
    space: Space,
    alarm: str = "stop",
    drop_path: float = 0.0,
    factor: float = 10.0,
    most: float = 0.03,
    threshold: float = 1.3,
    every: int | None = None,
    from_epoch: int | None = None,
    iterations: int = 10,
    radius: float = 3e-4,
    order: int = 2,
    init_scale: float = 1e-3,
) -> Strategy:
    """The RobustDARTS strategy.

    Args:
      space: the search space.
      alarm: what a sharp loss does: "stop" ends the search with an earlier cell (DARTS-ES), "rollback" goes back with a
        stronger weight decay (DARTS-ADA), "none" is not measured (R-DARTS: one of several drop_path or weight decays).
      drop_path: p of the last epoch, for each image and edge (R-DARTS(DP): 0, 0.2, 0.4 and 0.6).
      factor, most: of the weight decay, see `hessian_rollback`.
      threshold, every, from_epoch, iterations, radius: of the alarm, see `hessian_stop`.
      order: of DARTS, 1 or 2.
      init_scale: alpha starts at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = robust_darts(space=Space(nodes=1), drop_path=0.6, alarm="none")
    >>> [round(strategy.schedule(epoch, 4)["drop_path"], 3) for epoch in range(4)]
    [0.0, 0.2, 0.4, 0.6]
    """
    if alarm not in ALARMS:
        raise unknown("method.options.alarm", alarm, ALARMS)
    require(0 <= drop_path < 1, "method.options.drop_path", drop_path, "in [0, 1)")
    strategy = darts(space=space, order=order, init_scale=init_scale)
    if drop_path:
        strategy = strategy._replace(schedule=lambda epoch, of: {DROP_PATH: drop_path * epoch / max(of - 1, 1)})
    measuring: dict[str, Any] = {
        "threshold": threshold,
        "every": every,
        "from_epoch": from_epoch,
        "iterations": iterations,
        "radius": radius,
    }
    if alarm == "rollback":
        return hessian_rollback(strategy, factor=factor, most=most, **measuring)
    return hessian_stop(strategy, **measuring) if alarm == "stop" else strategy
