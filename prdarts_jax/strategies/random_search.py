"""Random search with shared weights: the baseline that every search owes.

    after an epoch: `cells` cells drawn uniformly are judged; the best of all, at the weights of now, is the result

Li, Talwalkar: Random Search and Reproducibility for Neural Architecture Search, UAI 2019.
"""

from __future__ import annotations

from prdarts_jax.space.spec import Space
from prdarts_jax.strategies import cells as choices
from prdarts_jax.strategies.gradient_free import Proposed, Round, check_counts, gradient_free
from prdarts_jax.strategy import Strategy


def random_search(*, space: Space, cells: int = 20, warm_up: float = 0.5, batches: int = 0) -> Strategy:
    """The weights are trained on cells drawn uniformly; so are the cells that are judged.

    (The published search judges its cells once, at the end, many on a part of the images and the best of them on all;
    here some are judged after every epoch, and the best so far is judged again each time.)

    Args:
      space: the search space.
      cells: judged after an epoch.
      warm_up: share of the epochs of which none is judged.
      batches: of validation images in a judgement; 0: all.

    Raises:
      UserError: a value that is not possible.

    >>> import jax
    >>> strategy = random_search(space=Space())
    >>> gates = strategy.sample(jax.random.key(0), strategy.init(jax.random.key(1)), (), {}, "weights")
    >>> float(gates.ops["normal"].sum()), gates.executed["normal"].shape  # two inputs for each of four nodes
    (8.0, (14, 1))
    """
    check_counts(cells=cells)

    def propose(now: Round) -> Proposed:
        drawn = [choices.random(now.rng, space) for _ in range(cells)]
        return Proposed((), [(now.worth(choice), choice) for choice in drawn], choices.even(space))

    return gradient_free(space=space, propose=propose, memory=(), warm_up=warm_up, batches=batches)
