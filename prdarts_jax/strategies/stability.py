"""The curvature of the validation loss in the architecture as an alarm: RobustDARTS.

    every few epochs l_i = dominant eigenvalue of the Hessian of L_val in a;  m_i = mean of l over a centred window
    m_newest / m_earlier > threshold:   stop with the genotype of the earlier measurement (hessian_stop), or go back to
                                        its epoch, with a stronger weight decay of the weights (hessian_rollback)

Zela et al., Understanding and Robustifying DARTS, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from prdarts_jax.config.schema import require
from prdarts_jax.errors import UserError
from prdarts_jax.strategies.nesting import remembering, with_memory
from prdarts_jax.strategy import Arch, Event, Restage, Rollback, Stop, Strategy, View

_EPOCHS = 50  # of the published search, by which its counts of epochs scale
_EVERY = 2  # of these between two measurements
_DECAY = "weights.weight_decay"

_Alarm = Callable[[View, int, Arch, str], Event | None]  # (view, epoch and architecture to return to, why)


def hessian_stop(
    strategy: Strategy,
    *,
    threshold: float = 1.3,
    window: int = 5,
    delta: int = 4,
    every: int | None = None,
    from_epoch: int | None = None,
    iterations: int = 10,
    radius: float = 3e-4,
    weight_decay: float = 1e-3,
) -> Strategy:
    """Ends a search whose validation loss becomes sharp in the architecture, with an earlier genotype.

    Args:
      strategy: any whose architecture starts from `init`.
      threshold: the ratio of two averaged eigenvalues that ends it.
      window: measurements in an average, centred: an odd number.
      delta: measurements between the two averages.
      every: epochs between measurements; None: 2 of 50, in proportion.
      from_epoch: the earliest epoch whose genotype may be returned; None: 10 of 50, in proportion.
      iterations: of Lanczos.
      radius: of the central differences of gradients that give products with the Hessian; the smaller, the fewer
        ReLUs switch within it, and the more a float32 rounds. 0: exact products, by plain automatic differentiation
        (slow to compile but for small spaces).
      weight_decay: added to the eigenvalue, as in the published program, whose loss has it.

    Raises:
      UserError: a value that is not possible.

    >>> from prdarts_jax.space.spec import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = hessian_stop(get("darts", space=Space(nodes=1)))
    >>> strategy.memory[1]["eigenvalues"].shape  # what two windows span
    (9,)
    """

    def alarm(view: View, epoch: int, arch: Arch, why: str) -> Event | None:
        return Stop((view.derive or strategy.derive)(arch), f"{why}; the cell is that of epoch {epoch + 1}")

    measuring = (threshold, window, delta, every, from_epoch, iterations, radius, weight_decay)
    return _watched(strategy, "hessian_stop", alarm, *measuring)


def hessian_rollback(
    strategy: Strategy,
    *,
    factor: float = 10.0,
    most: float = 0.03,
    threshold: float = 1.3,
    window: int = 5,
    delta: int = 4,
    every: int | None = None,
    from_epoch: int | None = None,
    iterations: int = 10,
    radius: float = 3e-4,
    weight_decay: float = 1e-3,
) -> Strategy:
    """Goes back, with a stronger weight decay of the weights, where `hessian_stop` would end the search.

    The decay becomes `factor` times what it was, but no more than `most`; once it is that, the search goes to its end.
    Eigenvalues of different decays are not compared: after a step back the windows fill anew.

    Args:
      strategy: any whose architecture starts from `init`.
      factor: of the weight decay.
      most: the largest weight decay.
      threshold, window, delta, from_epoch, iterations, radius, weight_decay: as `hessian_stop` has them.
      every: epochs between measurements; None: 2 of 50, in proportion, but 2 at most, since it keeps the checkpoints
        of the epochs that it may go back.

    Raises:
      UserError: a value that is not possible; from `at_epoch`, an optimizer without a weight decay to set.

    >>> from prdarts_jax.space.spec import Space
    >>> from prdarts_jax.strategies import get
    >>> hessian_rollback(get("darts", space=Space(nodes=1))).horizon
    12
    """
    field = "method.transforms.hessian_rollback"
    require(1 < factor < float("inf"), f"{field}.factor", factor, "> 1, finite")
    require(0 < most < float("inf"), f"{field}.most", most, "> 0, finite")

    def alarm(view: View, epoch: int, arch: Arch, why: str) -> Event | None:
        if _DECAY not in view.hyperparameters:
            raise UserError(f"weights.transform: {field} sets its weight_decay; allowed: inject_hyperparams with one")
        decay = view.hyperparameters[_DECAY]
        return Rollback(epoch, {_DECAY: min(factor * decay, most)}) if decay < most * (1 - 1e-6) else None

    measuring = (threshold, window, delta, every, from_epoch, iterations, radius, weight_decay)
    watched = _watched(strategy, "hessian_rollback", alarm, *measuring, longest=_EVERY)
    reach = (window // 2 + delta) * (every or _EVERY)
    return watched._replace(horizon=max(strategy.horizon, reach))


def _watched(
    strategy: Strategy,
    name: str,
    alarm: _Alarm,
    threshold: float,
    window: int,
    delta: int,
    every: int | None,
    from_epoch: int | None,
    iterations: int,
    radius: float,
    weight_decay: float,
    longest: int | None = None,
) -> Strategy:
    """The strategy with measurements in its memory; where the newest average is too large, the event of the alarm.

    Args:
      longest: epochs between measurements at most, where `every` is None.
    """
    field = f"method.transforms.{name}"
    require(threshold > 0, f"{field}.threshold", threshold, "> 0")
    require(window >= 1 and window % 2 == 1, f"{field}.window", window, "an odd number >= 1")
    for option, value in (("delta", delta), ("iterations", iterations)):
        require(value >= 1, f"{field}.{option}", value, ">= 1")
    require(every is None or every >= 1, f"{field}.every", every, ">= 1")
    require(from_epoch is None or from_epoch >= 0, f"{field}.from_epoch", from_epoch, ">= 0")
    require(radius >= 0, f"{field}.radius", radius, ">= 0")
    half, span = window // 2, window + delta
    first = jax.device_get(strategy.init(jax.random.key(0)))
    history = {
        "count": np.zeros((), np.int32),
        "eigenvalues": np.zeros((span,), np.float32),  # the oldest first
        "epochs": np.zeros((span,), np.int32),
        "decay": np.zeros((span,), np.float32),  # of the weights
        "arch": jax.tree.map(lambda leaf: np.zeros((span, *np.shape(leaf)), np.asarray(leaf).dtype), first),
    }
    inner = with_memory(strategy, history)

    def measured(view: View) -> dict[str, Any]:
        """The history with a measurement more."""

        def product(vector: np.ndarray) -> np.ndarray:
            found = view.probe.hvp(view.arch, back(vector), radius=radius or None)
            return np.asarray(ravel_pytree(found)[0], np.float64)

        flat, unravel = ravel_pytree(jax.tree.map(np.asarray, view.arch))

        def back(vector: np.ndarray) -> Any:
            return jax.device_get(unravel(jnp.asarray(vector, flat.dtype)))

        value = dominant_eigenvalue(product, flat.size, iterations=iterations, seed=view.epoch) + weight_decay
        old = view.memory[1]
        return {
            "count": np.int32(old["count"] + 1),
            "eigenvalues": np.append(old["eigenvalues"][1:], np.float32(value)),
            "epochs": np.append(old["epochs"][1:], np.int32(view.epoch)),
            "decay": np.append(old["decay"][1:], np.float32(view.hyperparameters.get(_DECAY, 0.0))),
            "arch": jax.tree.map(lambda a, b: np.concatenate([a[1:], np.asarray(b)[None]]), old["arch"], view.arch),
        }

    def at_epoch(view: View) -> Event | None:
        event = inner.at_epoch(view)
        step = every or min(max(1, round(_EVERY * view.epochs / _EPOCHS)), longest or view.epochs)
        if isinstance(event, Stop | Restage | Rollback) or (view.epoch + 1) % step:
            return event
        own = measured(view)
        earliest = round(10 * view.epochs / _EPOCHS) if from_epoch is None else from_epoch
        values, at = own["eigenvalues"], int(own["epochs"][half])
        # After a step back only what was measured since then is compared, at one weight decay: so no step back goes
        # behind the one before it, whose earlier checkpoints are gone.
        whole = int(own["count"]) >= span and bool(np.all(own["decay"] == own["decay"][-1]))
        if whole and at >= earliest:
            newest, earlier = float(values[delta:].mean()), float(values[:window].mean())
            if earlier > 0 and newest / earlier > threshold:
                arch = jax.tree.map(lambda leaf: leaf[half], own["arch"])
                why = f"the dominant eigenvalue rose from {earlier:.3g} to {newest:.3g}"
                found = alarm(view, at, arch, why)
                if found is not None:
                    return found
        return remembering(event, view, own)

    return inner._replace(at_epoch=at_epoch)


def dominant_eigenvalue(
    product: Callable[[np.ndarray], np.ndarray], size: int, *, iterations: int = 10, seed: int = 0
) -> float:
    """The eigenvalue of largest modulus of a symmetric matrix given by its products, by Lanczos from a random vector.

    Every new direction is made orthogonal to all before, so that rounding does not repeat eigenvalues.

    Args:
      product: vector float64[n] -> matrix times vector.
      size: n.
      iterations: at most n are made.
      seed: of the first vector.

    >>> matrix = np.diag([1.0, -5.0, 2.0])
    >>> round(dominant_eigenvalue(lambda v: matrix @ v, 3), 6)
    -5.0
    """
    start = np.random.default_rng(seed).normal(size=size)
    basis, diagonal, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(iterations, size)):
        image = product(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        rest = image - np.array(basis).T @ (np.array(basis) @ image)
        rest -= np.array(basis).T @ (np.array(basis) @ rest)
        norm = float(np.linalg.norm(rest))
        if norm <= 1e-9 * max(abs(diagonal[0]), 1e-30) or len(diagonal) == min(iterations, size):
            break
        beside.append(norm)
        basis.append(rest / norm)
    number = len(diagonal)
    small = np.diag(diagonal) + np.diag(beside[: number - 1], 1) + np.diag(beside[: number - 1], -1)
    values = np.linalg.eigvalsh(small)
    return float(values[np.argmax(np.abs(values))])
