"""What changes from epoch to epoch of a training, as functions of the epoch. Imports no jax."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "step")
KINK = 5  # epochs over which the linear schedule runs out
STEP_FACTOR = 0.97  # of the learning rates of two neighbouring epochs


def cosine(epoch: int, epochs: int, high: float, low: float = 0.0) -> float:
    """Cosine, constant within an epoch: low + (high - low)/2 (1 + cos(pi e / E)), e = 0..E-1.

    >>> cosine(0, 200, 0.025, 0.001), cosine(100, 200, 0.5)
    (0.025, 0.25)
    """
    return low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * epoch / epochs))


def linear(epoch: int, epochs: int, high: float) -> float:
    """Linear with a kink, constant within an epoch; for more than 5 epochs E:

        high (E - 5 - e) / (E - 5)      while E - e > 5
        high (E - e) / (5 (E - 5))      in the last 5 epochs, which would else have a rate of zero or less

    Source: P-DARTS' ImageNet program, taken over by those of PC-DARTS and PR-DARTS.

    >>> [round(linear(e, 15, 1.0), 3) for e in (0, 9, 10, 14)]
    [1.0, 0.1, 0.1, 0.02]
    """
    if epochs - epoch > KINK:
        return high * (epochs - KINK - epoch) / (epochs - KINK)
    return high * (epochs - epoch) / (KINK * (epochs - KINK))


def step(epoch: int, high: float) -> float:
    """A step down after every epoch: high 0.97^e, e = 0, 1, ...; how long the training is does not matter.

    Source: DARTS' ImageNet program (torch's StepLR with step_size 1 and gamma 0.97).

    >>> step(0, 0.1), round(step(2, 0.1), 6)
    (0.1, 0.09409)
    """
    return high * STEP_FACTOR**epoch


def learning_rate(kind: str, epoch: int, epochs: int, high: float, warmup_epochs: int = 0) -> float:
    """The learning rate of an epoch: the schedule, times (e + 1)/W in the W epochs of the warm-up.

    Args:
      kind: "cosine" (to 0) | "linear" | "step".
      epoch: e, from 0.
      epochs: E.
      high: at the beginning, without warm-up.
      warmup_epochs: W.

    >>> learning_rate("cosine", 0, 10, 0.5, warmup_epochs=5)
    0.1
    """
    if kind == "step":
        rate = step(epoch, high)
    else:
        rate = cosine(epoch, epochs, high) if kind == "cosine" else linear(epoch, epochs, high)
    return rate * min(1.0, (epoch + 1) / warmup_epochs) if warmup_epochs else rate


def drop_path_rate(epoch: int, epochs: int, rate: float) -> float:
    """The linear ramp p e / E of drop-path.

    >>> drop_path_rate(300, 600, 0.2)
    0.1
    """
    return rate * epoch / epochs
