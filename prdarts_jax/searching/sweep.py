"""Sweeps: which numbers searches of one compilation may differ in, and the members of a population. Imports no jax.

    --sweep lambda1=0.01,0.02 --sweep seed=0..4        the product: ten members

A number can be swept if it enters the compiled step as an array: the seed as the base key, learning rates and the
`arrays` of a method through `progress`, weight decay and momentum in the state of the optimizers.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.presets import OPTIONS
from prdarts_jax.strategies import registry

_SEED = "seed"
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "weights": ("learning_rate", "learning_rate_min", "weight_decay", "momentum"),
    "arch": ("learning_rate", "weight_decay"),
}
MOST = 1000  # members of a population: a slip of the pen in a range is found before it has made a folder


class Member(NamedTuple):
    """One search of a population."""

    name: str  # of its folder, as "seed=0,lambda1=0.01"
    values: Mapping[str, Any]  # dotted config path -> value
    config: SearchConfig


def sweepable(config: SearchConfig, own: Iterable[str] = ()) -> dict[str, str]:
    """What a sweep of this search may name: name -> dotted config path, in the order in which folders spell it.

    Args:
      config: of the search.
      own: groups (`weights`, `arch`) whose transformation the caller passes as an object.

    >>> list(sweepable(SearchConfig()))[-2:]
    ['lambda3', 'gate_dropout']
    """
    found = {_SEED: _SEED}
    for group, names in _GROUPS.items():
        # Of the user's own transformation nobody knows which numbers it has frozen.
        if group not in own and not schema.get(config, f"{group}.transform"):
            found |= {f"{group}.{name}": f"{group}.{name}" for name in names}
    method = config.method.strategy
    if not method.startswith("argument:"):
        for name in registry.arrays(method):
            found[f"method.{name}" if name in found else name] = f"{OPTIONS}{name}"
    return found


def parse(words: Sequence[str]) -> dict[str, list[str]]:
    """NAME=VALUES of the command line: values A,B,C, or A..B for whole numbers, both included.

    Raises:
      UserError: another form, or a name twice.

    >>> parse(["seed=0..2", "lambda1=0.01,0.02"])
    {'seed': ['0', '1', '2'], 'lambda1': ['0.01', '0.02']}
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not name or not equals or not all(values):
            raise UserError(f"sweep: {word!r} is not possible; allowed: NAME=A,B,C | NAME=A..B")
        if name in found:
            raise UserError(f"sweep: {name!r} is given twice; allowed: all its values in one --sweep")
        found[name] = [each for value in values for each in _range(value, word)]
    return found


def _range(text: str, word: str) -> list[str]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if match is None:
        if ".." in text:
            raise UserError(f"sweep: {word!r} is not possible; allowed: ranges A..B of whole numbers with A <= B")
        return [text]
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST:
        raise UserError(f"sweep: {word!r} is not possible; allowed: A..B with A <= B and at most {MOST} values")
    return [str(number) for number in range(first, last + 1)]


def find(name: str, config: SearchConfig, own: Iterable[str] = ()) -> str:
    """The name, as `sweepable` spells it, that a user means.

    Raises:
      UserError: a number that is no array in the compiled step, or no field at all; the error lists what can be swept.

    >>> find("method.lambda1", SearchConfig())
    'lambda1'
    """
    known = sweepable(config, own)
    wanted = name.replace("-", "_")
    spelled = {path: key for key, path in known.items()}
    spelled |= {f"method.{key}": key for key, path in known.items() if path.startswith(OPTIONS)} | {k: k for k in known}
    if wanted in spelled:
        return spelled[wanted]
    fields = {path for path, _, _ in schema.fields(SearchConfig)} | {"method"}
    options = config.method.options
    if wanted in fields or wanted.removeprefix(OPTIONS).removeprefix("method.") in options:
        allowed = " | ".join(known)
        raise UserError(f"sweep: {name!r} needs a compilation of its own, start it alone; allowed: {allowed}")
    raise unknown("sweep", name, known)


def members(
    config: SearchConfig, sweep: Mapping[str, Sequence[Any]], workdir: Path, own: Iterable[str] = ()
) -> tuple[Member, ...]:
    """The product of the sweep, the seed changing fastest, so that a setting is complete before the next one begins.

    Args:
      config: what the members share.
      sweep: name -> values, numbers or command-line texts.
      workdir: of the population; each member has a folder in it.
      own: as in `sweepable`.

    Raises:
      UserError: a name that cannot be swept, or values that are not possible.

    >>> [member.name for member in members(SearchConfig(), {"seed": [0, 1]}, Path("runs"))]
    ['seed=0', 'seed=1']
    """
    own = tuple(own)
    known = sweepable(config, own)
    columns: dict[str, list[Any]] = {}
    for name, texts in sweep.items():
        found = find(name, config, own)
        values = [_value(known[found], text, config) for text in texts]
        if found in columns:
            raise UserError(f"sweep: {found!r} is given twice; allowed: all its values in one --sweep")
        if not values or len(set(values)) < len(values):
            raise UserError(f"sweep: {found} = {','.join(map(str, texts))} is not possible; allowed: different values")
        columns[found] = values
    if not columns:
        raise UserError(f"sweep: nothing is swept; allowed: {' | '.join(known)}")
    number = 1
    for values in columns.values():
        number *= len(values)
    schema.require(number <= MOST, "sweep", number, f"at most {MOST} members")
    order = sorted(columns, key=lambda name: (name == _SEED, list(known).index(name)))
    return tuple(
        _member(config, {known[name]: value for name, value in zip(order, values, strict=True)}, known, workdir)
        for values in itertools.product(*(columns[name] for name in order))
    )


def _value(path: str, text: Any, config: SearchConfig) -> Any:
    """A value of the sweep, of the type of its field."""
    if path.startswith(OPTIONS):
        name = path.removeprefix(OPTIONS)
        return registry.resolve_options(config.method.strategy, {name: text})[name]
    hint = {field: hint for field, hint, _ in schema.fields(SearchConfig)}[path]
    return schema.convert_scalar(hint, text, path)


def _member(config: SearchConfig, values: Mapping[str, Any], known: Mapping[str, str], workdir: Path) -> Member:
    name = ",".join(f"{key}={values[path]}" for key, path in known.items() if path in values)
    schema.require(len(name.encode()) <= 255, "sweep", name, "names of at most 255 bytes, sweep fewer fields at a time")
    changed = schema.replace(config, values)
    run = dataclasses.replace(changed.run, workdir=str(workdir / name), devices="1")
    return Member(
        name, {path: values[path] for path in known.values() if path in values}, dataclasses.replace(changed, run=run)
    )
