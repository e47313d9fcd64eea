"""What searches without gradients share: weights trained on drawn cells, and whole cells judged on validation images.

    w - opt grad_w L_train(w, c),  c drawn anew for each step            the shared weights, one compiled program
    worth(c) = validation accuracy of the search network at the gates of c
    after an epoch: the method proposes cells; the champion gives way to a cell that is worth more at the weights of now

The architecture is {"best": the champion's gates, "p": shares of operations} -> {"normal", "reduce"} -> float32[E,O];
no gradient moves it. What a method keeps beside it (a population, a policy) is its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.bilevel import weights_alone
from prdarts_jax.config.schema import require
from prdarts_jax.gates import Gates
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies import cells
from prdarts_jax.strategy import Arch, Continue, Event, Memory, Numbers, Strategy, View


class Round(NamedTuple):
    """What a method proposes cells from, after an epoch.

    Attributes:
      rng: numpy's, seeded by search and epoch.
      memory: of the method.
      worth: (choice, batches=None, first=0) -> accuracy on validation images, on all or so many batches of them.
      number, rounds: of this round, from 0, and of all.
    """

    rng: np.random.Generator
    memory: Memory
    worth: Callable[..., float]
    number: int
    rounds: int


class Proposed(NamedTuple):
    """What a method makes of a round.

    Attributes:
      memory: from now on.
      rated: (worth, choice) of whole cells, judged on all images that the method's options name.
      p: {"normal", "reduce"} -> float32[E,O]: what reports call P.
    """

    memory: Memory
    rated: Sequence[tuple[float, np.ndarray]]
    p: Mapping[str, np.ndarray]


def gradient_free(
    *,
    space: Space,
    propose: Callable[[Round], Proposed],
    memory: Memory,
    warm_up: float,
    batches: int,
    sample: Callable[[jax.Array, Memory], jax.Array] | None = None,
) -> Strategy:
    """A strategy of a function that proposes and judges cells.

    Args:
      space: the search space.
      propose: see `Round` and `Proposed`; the same round must give the same.
      memory: of the method, at the start.
      warm_up: share of the epochs of which no cell is judged; the last epoch always has a round.
      batches: of validation images in a worth; 0: all.
      sample: (key, memory) -> choice that a step trains the weights on; None: drawn uniformly.

    Raises:
      UserError: a value that is not possible.
    """
    require(0 <= warm_up < 1, "method.options.warm_up", warm_up, "in [0, 1)")
    require(batches >= 0, "method.options.batches", batches, ">= 0 (0: all)")
    drawn = sample or (lambda key, memory: cells.uniform(key, space))

    def scores(arch: Arch) -> dict[str, Any]:
        """The champion's pairs first, then what is used most."""
        return {kind: arch["best"][kind] + 0.5 * arch["p"][kind] for kind in CELL_TYPES}

    def gates(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        del numbers
        if role != "eval":
            return cells.gates(drawn(key, memory), space)
        table = jnp.stack([jnp.asarray(scores(arch)[kind]) for kind in CELL_TYPES])
        leading = jnp.max(jnp.where(cells.usable(space), table, -jnp.inf), axis=2)
        return cells.gates(cells.best(leading, table, space), space)

    def at_epoch(view: View) -> Event | None:
        rest = int(warm_up * view.epochs)
        if view.epoch < rest:
            return None

        def worth(choice: np.ndarray, batches: int | None = batches or None, first: int = 0) -> float:
            return view.probe.gates_accuracy(cells.gates(choice, space), batches=batches, first=first)

        rng, before = np.random.default_rng(view.seed), cells.of_table(view.arch["best"])
        found = propose(Round(rng, view.memory, worth, view.epoch - rest, view.epochs - rest))
        rated = list(found.rated)
        if (before < space.num_ops).any():  # judged again: the weights have moved
            rated.insert(0, (worth(before), before))
        champion = max(rated, key=lambda each: each[0])[1] if rated else before
        return Continue(found.memory, {"best": cells.gates(champion, space).ops, "p": dict(found.p)})

    nothing = np.zeros((space.num_edges, space.num_ops), np.float32)
    first = {"best": dict.fromkeys(CELL_TYPES, nothing), "p": cells.even(space)}
    return Strategy(
        space=space,
        init=lambda key: jax.tree.map(jnp.asarray, first),
        schedule=lambda epoch, epochs: {},
        sample=gates,
        probabilities=lambda arch, numbers: dict(arch["p"]),
        scores=scores,
        rule=weights_alone,
        memory=memory,
        at_epoch=at_epoch,
    )


def check_counts(**options: int) -> None:
    """Refuses options that are less than 1."""
    for name, value in options.items():
        require(value >= 1, f"method.options.{name}", value, ">= 1")
