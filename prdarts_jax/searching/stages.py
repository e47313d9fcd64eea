"""Stages of a search: what a `Restage` changes, as JSON for checkpoints, and what goes from one stage to the next."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prdarts_jax.bilevel import SearchState
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.searching.own_code import METHOD
from prdarts_jax.searching.program import SearchCarry
from prdarts_jax.space import supernet
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import Space
from prdarts_jax.strategy import Continue, Event, Restage, Rollback, Stop, Strategy

_FIELDS = ("nodes", "ops", "edge_ops", "cells", "channels", "head_norm", "pool_norm", "partial")


class Stage(NamedTuple):
    """One stage of a search."""

    start: int = 0  # the epoch of the search it begins with
    epochs: int = 0
    space: Mapping[str, Any] = {}  # fields of its space that differ from those of the search's config
    options: Mapping[str, Any] = {}  # of the factory, beside those of the config

    @property
    def end(self) -> int:
        """The epoch before which it ends."""
        return self.start + self.epochs


def changed_fields(space: Space, first: Space) -> dict[str, Any]:
    """The fields in which the space of a stage differs from the first one, as JSON types.

    Raises:
      UserError: it differs in a field that a stage cannot change, or has other operations than the first space.

    >>> changed_fields(Space(cells=11), Space())
    {'cells': 11}
    """
    rest = dataclasses.replace(space, primitives=first.primitives, **{name: getattr(first, name) for name in _FIELDS})
    known = dict(first.primitives)
    others = any(known.get(name) != primitive for name, primitive in space.primitives)
    if rest != first or others or not set(space.ops) <= set(known) or space.channels % space.partial:
        allowed = f"changes of {' | '.join(_FIELDS)}, with operations of the first space; partial divides channels"
        named = {
            f.name: getattr(space, f.name)
            for f in dataclasses.fields(Space)
            if f.name not in ("primitives", "edge_ops")
        }
        said = {name: value for name, value in named.items() if value != getattr(first, name)}
        raise UserError(f"{METHOD}: Restage to a space of {said} is not possible; allowed: {allowed}")
    return {name: getattr(space, name) for name in _FIELDS if getattr(space, name) != getattr(first, name)}


def space_of(stage: Stage, first: Space) -> Space:
    """The space of a stage; JSON types are taken.

    >>> space_of(Stage(space={"ops": ["none", "skip_connect"]}), Space()).num_ops
    2
    """
    fields = {name: _tuples(value) for name, value in stage.space.items()}
    known = dict(first.primitives)
    primitives = tuple((name, known[name]) for name in fields.get("ops", first.ops))
    return dataclasses.replace(first, **fields, primitives=primitives)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def kept_weights(old: Any, new: Any, before: Space, after: Space) -> Any:
    """Weights of a new stage: those of the old one where they mean the same, else the new ones.

    A cell is kept where the cell at its place has the same type and widths. Of its edges the operations that both
    spaces allow are kept.

    Args:
      old, new: weights of the search network, host arrays, of the spaces `before` and `after`.
    """
    if before.nodes != after.nodes:
        return new
    old_cells = supernet.by_cell(old, before)
    kept = [
        _kept_cell(old_cells[i], cell, before, after, spec.kind)
        if i < before.cells and before.layout[i] == spec
        else cell
        for i, (cell, spec) in enumerate(zip(supernet.by_cell(new, after), after.layout, strict=True))
    ]
    runs = [
        kept[run[0]] if len(run) == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *(kept[i] for i in run))
        for run in after.runs
    ]
    same = {
        part: jax.tree.map(_same, old[part], new[part])
        for part in ("stem", "head")
        if _paths(old[part]) == _paths(new[part])
    }
    return {**new, **same, "cells": runs}


def _same(old: Any, new: Any) -> Any:
    return old if np.shape(old) == np.shape(new) else new


def _paths(tree: Any) -> list[Any]:
    return [path for path, _ in jax.tree.leaves_with_path(tree)]


def _kept_cell(old: Any, new: Any, before: Space, after: Space, kind: str) -> Any:
    edges: dict[str, Any] = {}
    groups = {group.name: group for group in before.edge_groups(kind)}
    for group in after.edge_groups(kind):
        was, now = before.rows(kind, groups[group.name]), after.rows(kind, group)
        stacks = {}
        for op, leaves in new["edges"][group.name].items():
            there = old["edges"].get(group.name, {}).get(op)
            rows = [(row, was[op].index(e)) for row, e in enumerate(now[op]) if there is not None and e in was[op]]
            stacks[op] = jax.tree.map(lambda leaf: np.array(leaf), leaves)
            for row, source in rows:
                for name in leaves:
                    stacks[op][name][row] = np.asarray(there[name])[source]
        edges[group.name] = stacks
    rest = {name: jax.tree.map(_same, old[name], new[name]) for name in new if name != "edges"}
    return {**rest, "edges": edges}


def with_event(carry: SearchCarry, event: Continue, mesh: Mesh) -> SearchCarry:
    """The carry with the memory, and the architecture, that an event names: the same trees, shapes and dtypes."""
    new = {"memory": _as_before(carry.state.memory, event.memory, "memory", "Strategy.memory", mesh)}
    if event.arch is not None:
        new["arch"] = _as_before(carry.state.arch, event.arch, "arch", "Strategy.init", mesh)
    return dataclasses.replace(carry, state=dataclasses.replace(carry.state, **new))


def _as_before(old: Any, new: Any, what: str, first: str, mesh: Mesh) -> Any:
    """A part of the state in the place of another one, on the devices."""
    if _paths(old) != _paths(new):
        raise UserError(f"{METHOD}: the {what} of an event is another tree than {first}; allowed: the same")
    shapes = [(np.shape(a), np.shape(b)) for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)]
    if any(a != b for a, b in shapes):
        raise UserError(f"{METHOD}: the {what} of an event has shapes {shapes}; allowed: those of {first}")
    for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True):
        if jnp.issubdtype(np.asarray(b).dtype, jnp.inexact) and not jnp.issubdtype(a.dtype, jnp.inexact):
            raise UserError(
                f"{METHOD}: the {what} of an event has {np.asarray(b).dtype} in place of {a.dtype}, which would cut "
                f"it; allowed: the dtypes of {first}"
            )
    return sharding.replicate(mesh, jax.tree.map(lambda a, b: np.asarray(b, np.asarray(a).dtype), old, new))


def plain_event(event: Any) -> Event | None:
    """An event of a strategy, its numbers as those of Python: checkpoints and events.jsonl hold them as JSON.

    Raises:
      UserError: it is none, or a part of it is not what it must be.

    >>> plain_event(Rollback(np.int64(3), {"weights.weight_decay": np.float32(0.5)}))
    Rollback(epoch=3, hyperparameters={'weights.weight_decay': 0.5}, memory=None)
    """
    if not isinstance(event, Event | None):
        allowed = "None | Continue | Stop | Restage | Rollback"
        raise UserError(f"{METHOD}: at_epoch gives a {type(event).__name__}; allowed: {allowed}")
    name = type(event).__name__
    if isinstance(event, Stop) and not isinstance(event.genotype, Genotype):
        raise UserError(f"{METHOD}: {name} with a {type(event.genotype).__name__}; allowed: a Genotype")
    if isinstance(event, Restage) and not isinstance(event.space, Space):
        raise UserError(f"{METHOD}: {name} with a {type(event.space).__name__}; allowed: a Space")
    try:
        if isinstance(event, Stop):
            return event._replace(reason=str(event.reason))
        if isinstance(event, Restage):
            options = {option: _plain(value) for option, value in event.options.items()}
            json.dumps(options)
            return event._replace(epochs=event.epochs and operator.index(event.epochs), options=options)
        if isinstance(event, Rollback):
            numbers = {field: float(value) for field, value in event.hyperparameters.items()}
            return event._replace(epoch=operator.index(event.epoch), hyperparameters=numbers)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{METHOD}: {name}: {error}; allowed: whole epochs, and numbers, texts by name") from error
    return event


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


_OPTIMIZERS = {"weights": "weight_opt", "arch": "arch_opt"}


def hyperparameters(state: SearchState) -> dict[str, float]:
    """Those of the optimizers of a search, as `with_hyperparameter` names them."""
    return {
        f"{group}.{field}": float(value)
        for group, attribute in _OPTIMIZERS.items()
        for field, value in jax.device_get(getattr(getattr(state, attribute), "hyperparams", {})).items()
        if field != "learning_rate" and np.ndim(value) == 0
    }


def with_hyperparameter(state: SearchState, name: str, value: float) -> SearchState:
    """The state of a search with another hyperparameter of an optimizer: weights.NAME or arch.NAME."""
    group, _, field = name.partition(".")
    attribute = _OPTIMIZERS.get(group, "")
    opt: Any = getattr(state, attribute, None)
    known = getattr(opt, "hyperparams", {})
    if field not in known or field == "learning_rate":
        allowed = " | ".join(f"{group}.{other}" for other in known if other != "learning_rate") or "none here"
        raise UserError(f"{METHOD}: Rollback sets {name!r}, which is no hyperparameter; allowed: {allowed}")
    old = known[field]
    new = np.asarray(value, old.dtype)
    # Side by side with others a search has its scalars on the host.
    changed = {**known, field: jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new}
    return dataclasses.replace(state, **{attribute: opt._replace(hyperparams=changed)})


def plan_in_words(strategy: Strategy, stage: Stage, epochs: int) -> str:
    """What a method makes of the epochs it is given, where that is not simply to search in all of them; or nothing.

    >>> from prdarts_jax.strategies.composition import transformed
    >>> from prdarts_jax.strategies.darts import darts
    >>> strategy = transformed(darts(space=Space()), ["frozen"])
    >>> plan_in_words(strategy, Stage(epochs=10), 10)
    'the architecture rests in 3 of 10 epochs'
    """
    rates = [strategy.schedule(epoch, stage.epochs).get("arch_on", 1.0) for epoch in range(stage.epochs)]
    rest = sum(rate == 0 for rate in rates)
    words = [f"stage 1 has {stage.epochs} of {epochs} epochs"] if stage.epochs < epochs and stage.start == 0 else []
    words += [f"the architecture rests in {rest} of {stage.epochs} epochs"] if rest else []
    return ", ".join(words)


def gone_back(carry: SearchCarry, event: Rollback, mesh: Mesh) -> SearchCarry:
    """The carry with the hyperparameters and the memory of a Rollback."""
    state = carry.state
    for name, value in event.hyperparameters.items():
        state = with_hyperparameter(state, name, value)
    carry = dataclasses.replace(carry, state=state)
    return carry if event.memory is None else with_event(carry, Continue(event.memory), mesh)


def in_words(fields: Mapping[str, Any]) -> str:
    """The space of a stage for a line: lists are counted."""
    texts = [f"{name} {value}" for name, value in fields.items() if not isinstance(value, tuple)]
    if "edge_ops" in fields:
        counts = {len(ops) for kind in fields["edge_ops"] for ops in kind}
        texts.append(f"{'-'.join(map(str, sorted({min(counts), max(counts)})))} operations an edge")
    return ", ".join(texts) or "the space of before"
