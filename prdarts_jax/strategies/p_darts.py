"""P-DARTS: three stages, each with a deeper network and fewer operations an edge.

    stage s: L_s cells, O_s operations an edge; of these the O_(s+1) of largest softmax(alpha) are in the next stage
    skip connections are dropped out elementwise at p0_s (E-e-1)/E while alpha rests, then at p0_s exp(-5 (e-F)/E)

`at_most_skips(frozen(darts))` in each stage, with new weights and a new alpha.
Chen, Xie, Wu, Tian: Progressive Differentiable Architecture Search: Bridging the Depth Gap between Search and
Evaluation, ICCV 2019.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from prdarts_jax.config.schema import require
from prdarts_jax.space.noise import DROPOUT
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategies.darts import darts
from prdarts_jax.strategies.transforms import at_most_skips, frozen
from prdarts_jax.strategy import Event, Restage, Strategy, Tables, View

CELLS, KEPT = (5, 11, 17), (8, 5, 3)  # of the stages, as published
_DECAY = 5.0  # 0.2 an epoch of 25
_SHARE = 0.4  # 10 epochs of 25


def p_darts(
    *,
    space: Space,
    skips: int = 2,
    skip_dropout: str = "0.1,0.4,0.7",
    frozen_epochs: int | None = None,
    init_scale: float = 1e-3,
    stage: int = 0,
) -> Strategy:
    """The P-DARTS strategy.

    Args:
      space: of the first stage; the cells of the others are in the proportion 5 : 11 : 17, and an edge of n operations
        keeps 5 n / 8, then 3/5 of these, rounded up.
      skips: at most so many skip connections in the derived normal cell.
      skip_dropout: p0 of the three stages.
      frozen_epochs: first epochs of a stage in which alpha rests; None: 10 of 25, in proportion.
      init_scale: alpha starts at init_scale * N(0,1).
      stage: 0, 1 or 2; the search itself sets it.

    Raises:
      UserError: a value that is not possible; from `stage_epochs`, less than one epoch a stage.

    >>> strategy = p_darts(space=Space(cells=5))
    >>> strategy.stage_epochs(75), [round(strategy.schedule(e, 25)["dropout/skip_connect"], 4) for e in (0, 9, 10, 24)]
    (25, [0.096, 0.06, 0.1, 0.0061])
    """
    require(stage in (0, 1, 2), "method.options.stage", stage, "0 | 1 | 2")
    rates = _rates(skip_dropout)
    skip_ops = [op for op, is_skip in zip(space.ops, space.group("skip"), strict=True) if is_skip]
    base = frozen(darts(space=space, init_scale=init_scale), epochs=frozen_epochs, share=_SHARE)

    def schedule(epoch: int, epochs: int) -> dict[str, float]:
        numbers = base.schedule(epoch, epochs)
        rest = round(_SHARE * epochs) if frozen_epochs is None else frozen_epochs
        early, late = (epochs - epoch - 1) / epochs, math.exp(-_DECAY * (epoch - rest) / epochs)
        rate = rates[stage] * (early if epoch < rest else late)
        return numbers | {f"{DROPOUT}{op}": rate for op in skip_ops}

    def at_epoch(view: View) -> Event | None:
        event = base.at_epoch(view)
        if event is not None or stage == 2 or view.epoch + 1 < view.epochs:
            return event
        cells = round(space.cells * CELLS[stage + 1] / CELLS[stage])
        edge_ops = kept_operations(base.scores(view.arch), space, KEPT[stage + 1] / KEPT[stage])
        deeper = dataclasses.replace(space, cells=cells, edge_ops=edge_ops)
        return Restage(deeper, epochs=view.epochs if stage == 0 else None, options={"stage": stage + 1})

    def stage_epochs(epochs: int) -> int:
        stages = 3 - stage
        require(epochs >= stages, "epochs", epochs, f">= {stages}, one a stage")
        return epochs // stages

    staged = base._replace(schedule=schedule, at_epoch=at_epoch, stage_epochs=stage_epochs)
    return at_most_skips(staged, skips=skips)


def kept_operations(scores: Tables, space: Space, share: float) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The operations that each edge keeps: those of highest score, a share of those it has, rounded up.

    Args:
      scores: {"normal", "reduce"} -> [E,O]; of equal ones the later ones are kept.
      space: whose operations they are.
      share: in (0, 1].

    Returns:
      (normal, reduce) x edge -> names in the order of the space, as `Space.edge_ops`.

    >>> table = np.tile(np.arange(8.0), (2, 1))
    >>> kept_operations({"normal": table, "reduce": table}, Space(nodes=1), 3 / 8)[0][0]
    ('sep_conv_5x5', 'dil_conv_3x3', 'dil_conv_5x5')
    """

    def of_edge(kind: str, e: int) -> tuple[str, ...]:
        there = np.flatnonzero(space.allowed[kind][e])
        ranked = there[np.argsort(np.asarray(scores[kind], np.float64)[e][there], kind="stable")]
        kept = set(ranked[len(there) - math.ceil(share * len(there)) :].tolist())
        return tuple(op for o, op in enumerate(space.ops) if o in kept)

    return tuple(tuple(of_edge(kind, e) for e in range(space.num_edges)) for kind in CELL_TYPES)


def _rates(text: str) -> tuple[float, ...]:
    """Three probabilities.

    >>> _rates("0, 0.5, 0.9")
    (0.0, 0.5, 0.9)
    """
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError:
        rates = ()
    possible = len(rates) == 3 and all(0 <= rate < 1 for rate in rates)
    require(possible, "method.options.skip_dropout", text, "three numbers in [0, 1), as 0.1,0.4,0.7")
    return rates
