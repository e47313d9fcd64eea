"""What transforms share: a method inside one that keeps more beside it, in its architecture or in its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from prdarts_jax.bilevel import Loss, Losses, Optimizers, SearchState, Step
from prdarts_jax.gates import Gates
from prdarts_jax.strategy import Arch, Continue, Event, Memory, Numbers, Probe, Restage, Rollback, Strategy, View


def with_arch(strategy: Strategy, *, inside: Callable[[Arch], Arch], outside: Callable[[Arch, Arch], Arch]) -> Strategy:
    """A method as part of a larger architecture; the caller replaces `init`.

    Args:
      strategy: the method.
      inside: whole architecture -> that of the method.
      outside: (whole, another of the method) -> the whole with it.
    """

    def objective(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda ce, arch, gates, memory, numbers: of(ce, inside(arch), gates, memory, numbers)

    def at_epoch(view: View) -> Event | None:
        probe = _InnerProbe(view.probe, view.arch, inside, outside)
        whole = view.derive
        derive = whole and (lambda arch: whole(outside(view.arch, arch)))
        event = strategy.at_epoch(view._replace(arch=inside(view.arch), probe=probe, derive=derive))
        if isinstance(event, Continue) and event.arch is not None:
            return event._replace(arch=outside(view.arch, event.arch))
        return event

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        return strategy.rule(losses._replace(own=lambda arch: inside(losses.own(arch))), optimizers)

    own_derive = None if strategy.derives_from_scores else lambda arch: strategy.derive(inside(arch))
    weight_objective = strategy.weight_objective
    return strategy._replace(
        sample=lambda key, arch, memory, numbers, role: strategy.sample(key, inside(arch), memory, numbers, role),
        objective=objective(strategy.objective),
        weight_objective=weight_objective and objective(weight_objective),
        probabilities=lambda arch, numbers: strategy.probabilities(inside(arch), numbers),
        scores=lambda arch: strategy.scores(inside(arch)),
        derive=own_derive,
        at_epoch=at_epoch,
        rule=rule,
    )


class _InnerProbe(NamedTuple):
    """The probe of a method that is part of a larger architecture; the rest of it stays as it is."""

    whole: Probe
    arch: Arch
    inside: Callable[[Arch], Arch]
    outside: Callable[[Arch, Arch], Arch]

    def loss(self, arch: Arch, *, batches: int | None = 1) -> float:
        return self.whole.loss(self.outside(self.arch, arch), batches=batches)

    def grad(self, arch: Arch, *, batches: int | None = 1) -> Arch:
        return self.inside(self.whole.grad(self.outside(self.arch, arch), batches=batches))

    def hvp(self, arch: Arch, vector: Arch, *, radius: float | None = None, batches: int | None = 1) -> Arch:
        rest = jax.tree.map(lambda leaf: 0 * leaf, self.arch)
        at, along = self.outside(self.arch, arch), self.outside(rest, vector)
        return self.inside(self.whole.hvp(at, along, radius=radius, batches=batches))

    def gates_loss(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        return self.whole.gates_loss(gates, batches=batches, first=first)

    def gates_accuracy(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        return self.whole.gates_accuracy(gates, batches=batches, first=first)


_LOSSES = ("plain", "full", "weight", "twice")


def with_memory(strategy: Strategy, own: Memory) -> Strategy:
    """A method whose memory is a pair (its own before, `own`); the caller gives `own` a use."""

    def at_epoch(view: View) -> Event | None:
        base, own = view.memory
        return paired(strategy.at_epoch(view._replace(memory=base)), own)

    def objective(of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda ce, arch, gates, memory, numbers: of(ce, arch, gates, memory[0], numbers)

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        return strategy.sample(key, arch, memory[0], numbers, role)

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        def step(state: SearchState, batches: Any, key: jax.Array, numbers: Numbers) -> Any:
            base, own = state.memory
            parts: dict[str, Any] = {name: _at_memory(getattr(losses, name), own) for name in _LOSSES}
            inner = losses._replace(**parts)
            state, metrics = strategy.rule(inner, optimizers)(
                dataclasses.replace(state, memory=base), batches, key, numbers
            )
            return dataclasses.replace(state, memory=(state.memory, own)), metrics

        return step

    weight_objective = strategy.weight_objective
    return strategy._replace(
        sample=sample,
        objective=objective(strategy.objective),
        weight_objective=weight_objective and objective(weight_objective),
        memory=(strategy.memory, own),
        at_epoch=at_epoch,
        rule=rule,
    )


def _at_memory(loss: Loss, own: Memory) -> Loss:
    """A loss that takes the inner memory of a pair, and completes it."""
    objective = loss.objective
    return dataclasses.replace(
        loss,
        gates=lambda weights, arch, memory, *rest: loss.gates(weights, arch, (memory, own), *rest),
        objective=objective
        and (lambda ce, arch, gates, memory, numbers: objective(ce, arch, gates, (memory, own), numbers)),
    )


def paired(event: Event | None, own: Memory) -> Event | None:
    """The event of an inner method, its memory completed by `own`."""
    if isinstance(event, Continue | Restage | Rollback) and event.memory is not None:
        return event._replace(memory=(event.memory, own))
    return event


def remembering(event: Event | None, view: View, own: Memory) -> Event | None:
    """The event of an inner method with a new `own`: going on becomes a Continue, other events stay as they are.

    Args:
      event: of `with_memory`'s `at_epoch`.
      view: what it was made from, with the pair as memory.
      own: from now on.
    """
    if event is None:
        return Continue((view.memory[0], own))
    return event._replace(memory=(event.memory[0], own)) if isinstance(event, Continue) else event
