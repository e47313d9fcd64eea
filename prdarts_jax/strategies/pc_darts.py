"""PC-DARTS: a mixture of a quarter of the channels, and edges with weights of their own.

    node_n = sum over j of softmax(b)_(j->n) shuffle([sum over o of softmax(alpha)_o op_o(x_j[:C/K]), x_j[C/K:]])

`edge_weights(frozen(darts))` on a space with `partial` = K. Xu, Xie, Zhang, Chen, Qi, Tian, Xiong: PC-DARTS: Partial
Channel Connections for Memory-Efficient Architecture Search, ICLR 2020.
"""

from __future__ import annotations

from prdarts_jax.space.spec import Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategies.transforms import edge_weights, frozen
from prdarts_jax.strategy import Strategy


def pc_darts(*, space: Space, frozen_epochs: int | None = None, order: int = 1, init_scale: float = 1e-3) -> Strategy:
    """The PC-DARTS strategy; K is `space.partial`.

    Args:
      space: the search space.
      frozen_epochs: first epochs in which alpha and b rest; None: 15 of 50, in proportion.
      order: of DARTS, 1 or 2; published with 1.
      init_scale: alpha and b start at init_scale * N(0,1).

    Raises:
      UserError: a value that is not possible.

    >>> strategy = pc_darts(space=Space(partial=4))
    >>> [strategy.schedule(epoch, 50)["arch_on"] for epoch in (14, 15)]
    [0.0, 1.0]
    """
    base = darts(space=space, order=order, init_scale=init_scale)
    return edge_weights(frozen(base, epochs=frozen_epochs, share=0.3), init_scale=init_scale)
