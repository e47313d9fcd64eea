"""Selection by perturbation: an operation is worth what the validation accuracy loses without it (DARTS-PT).

    edge by edge, in a random order: op(e) = argmin over o of accuracy(o on e masked); the others are masked for good
    then the two edges of each node are kept whose removal hurts most

Wang et al., Rethinking Architecture Selection in Differentiable NAS, ICLR 2021, as others describe it: the number of
epochs of tuning and the order of normal and reduction cells were not checked against its program.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prdarts_jax.config.schema import require
from prdarts_jax.gates import Gates
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES
from prdarts_jax.strategies.nesting import remembering, with_memory
from prdarts_jax.strategy import Arch, Event, Memory, Numbers, Restage, Rollback, Stop, Strategy, View

Masks = Mapping[str, np.ndarray]  # {"normal", "reduce"} -> float32[E,O]


def select_by_perturbation(
    strategy: Strategy, *, tuning: int = 0, pairs: int = 2, seed: int = 0, batches: int | None = None
) -> Strategy:
    """The derived cell is that of the operations whose absence hurts, found at the end of the search.

    Args:
      strategy: any.
      tuning: epochs in which the weights adapt after each decision, the architecture at rest; they are the last ones of
        the search, `tuning` for each edge of both cells. 0: all is decided after the last epoch.
      pairs: kept a node.
      seed: of the order of the edges.
      batches: of validation images in an accuracy; None: all.

    Raises:
      UserError: a value that is not possible; from `schedule`, if the search has too few epochs for the tuning.

    >>> from prdarts_jax.space.spec import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = select_by_perturbation(get("darts", space=Space(nodes=1)), tuning=1)
    >>> [strategy.schedule(epoch, 6)["arch_on"] for epoch in range(6)]  # two edges a cell
    [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    field = "method.transforms.select_by_perturbation"
    for name, value, least in (("tuning", tuning, 0), ("pairs", pairs, 1), ("seed", seed, 0)):
        require(value >= least, f"{field}.{name}", value, f">= {least}")
    require(batches is None or batches >= 1, f"{field}.batches", batches, ">= 1")
    space = strategy.space
    usable = {kind: space.allowed[kind] & ~space.group("none")[None, :] for kind in CELL_TYPES}
    everything = {kind: space.allowed[kind].astype(np.float32) for kind in CELL_TYPES}
    edges = [(kind, e) for kind in CELL_TYPES for e in range(space.num_edges) if usable[kind][e].any()]
    order = [edges[i] for i in np.random.default_rng(seed).permutation(len(edges))]
    inner = with_memory(strategy, everything)

    def schedule(epoch: int, epochs: int) -> dict[str, float]:
        numbers, rest = strategy.schedule(epoch, epochs), tuning * len(order)
        require(rest < epochs, f"{field}.tuning", tuning, f"at most {(epochs - 1) // len(order)} in {epochs} epochs")
        return numbers | {"arch_on": float(epoch < epochs - rest and numbers.get("arch_on", 1.0) > 0)}

    def sample(key: jax.Array, arch: Arch, memory: Memory, numbers: Numbers, role: str) -> Gates:
        return _masked(inner.sample(key, arch, memory, numbers, role), memory[1])

    def accuracy(view: View, masks: Masks) -> float:
        gates = sample(jax.random.key(0), view.arch, (view.memory[0], masks), view.numbers, "eval")
        return view.probe.gates_accuracy(gates, batches=batches)

    def decided(view: View, masks: Masks, kind: str, e: int) -> Masks:
        """With the operation of an edge alone whose absence hurts most; equal ones keep their order."""
        candidates = [int(o) for o in np.flatnonzero(usable[kind][e])]
        left = {o: accuracy(view, _without(masks, kind, e, o)) for o in candidates} if len(candidates) > 1 else {}
        best = min(left, key=lambda o: left[o]) if left else candidates[0]
        row = np.zeros(space.num_ops, np.float32)
        row[best] = 1.0
        return _with_row(masks, kind, e, row)

    def result(view: View, masks: Masks) -> Genotype:
        """Each node keeps the edges whose removal hurts most."""
        cells: dict[str, list[tuple[tuple[str, int], ...]]] = {kind: [] for kind in CELL_TYPES}
        for kind, node in itertools.product(CELL_TYPES, range(2, 2 + space.nodes)):
            incoming = [e for e, (_, target) in enumerate(space.edges) if target == node and (kind, e) in edges]
            if len(incoming) > pairs:
                without = {e: accuracy(view, _with_row(masks, kind, e, np.zeros(space.num_ops))) for e in incoming}
                incoming = sorted(sorted(incoming, key=lambda e: without[e])[:pairs])
            chosen = [(space.ops[int(np.argmax(masks[kind][e]))], space.edges[e][0]) for e in incoming]
            cells[kind].append(tuple(chosen))
        concat = tuple(range(2, 2 + space.nodes))
        return Genotype(tuple(cells["normal"]), concat, tuple(cells["reduce"]), concat)

    def at_epoch(view: View) -> Event | None:
        event, masks = inner.at_epoch(view), view.memory[1]
        if isinstance(event, Stop | Restage | Rollback):
            return event
        after = view.epoch - (view.epochs - tuning * len(order)) + 1  # epochs of tuning that are over
        last = view.epoch + 1 == view.epochs
        if tuning and after >= 0 and after % tuning == 0 and not last:
            masks = decided(view, masks, *order[after // tuning])
            return remembering(event, view, masks)
        if not last:
            return event
        for kind, e in () if tuning else order:
            masks = decided(view, masks, kind, e)
        return Stop(result(view, masks), "operations and edges were selected by perturbation")

    return inner._replace(schedule=schedule, sample=sample, at_epoch=at_epoch)


def _masked(gates: Gates, masks: Mapping[str, Any]) -> Gates:
    """Gates of masked operations are 0; nothing is computed for those that are executed no more."""
    ops = {kind: table * jnp.broadcast_to(masks[kind], table.shape) for kind, table in gates.ops.items()}
    executed = {}
    for kind, chosen in gates.executed.items():
        number = gates.ops[kind].shape[-1]
        there = jnp.take_along_axis(jnp.pad(jnp.asarray(masks[kind]), ((0, 0), (0, 1))), chosen, axis=1)
        executed[kind] = jnp.where(there > 0, chosen, number)
    return dataclasses.replace(gates, ops=ops, executed=executed)


def _with_row(masks: Masks, kind: str, e: int, row: np.ndarray) -> Masks:
    table = np.array(masks[kind], np.float32)
    table[e] = row
    return {**masks, kind: table}


def _without(masks: Masks, kind: str, e: int, o: int) -> Masks:
    row = np.array(masks[kind][e], np.float32)
    row[o] = 0.0
    return _with_row(masks, kind, e, row)
