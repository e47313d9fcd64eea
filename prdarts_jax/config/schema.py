"""Configs as frozen dataclasses, whatever their fields: checks, JSON, dotted paths, comments, differences.

It imports neither jax nor numpy, so `prdarts --help` stays fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prdarts_jax.errors import UserError, unknown

SCHEMA_VERSION = 1
_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Limit:
    """What the value of a field has to be."""

    allowed: str  # in words, for the error line
    holds: Callable[[Any], bool]


POSITIVE = Limit("> 0", lambda value: value > 0)
SHARE = Limit("in [0, 1)", lambda value: 0 <= value < 1)
# A key of jax.random holds 32 bits of a seed: larger ones would repeat smaller ones.
SEED = Limit(f"0..{2**32 - 1}", lambda seed: 0 <= seed < 2**32)


def batch_for(devices: str) -> Limit:
    """The limit of a global batch on N devices, or on `all` that there are (known when the run starts)."""
    parts = 1 if devices == "all" else int(devices)
    return Limit(f"a multiple of {parts} (devices)", lambda size: size % parts == 0)


def require(holds: bool, path: str, value: object, allowed: str) -> None:
    """Refuses the value of a field in one line, unless it `holds`."""
    if not holds:
        raise UserError(f"{path}: {value!r} is not possible; allowed: {allowed}")


def require_names(path: str, names: Iterable[str], allowed: Collection[str]) -> None:
    """Refuses the first name that is not in a list, with the nearest one that is."""
    for name in names:
        if name not in allowed:
            raise unknown(path, name, allowed)


def check(config: object, section: str, **limits: float | tuple[str, ...] | Limit) -> None:
    """Refuses fields of a config that are not what they have to be, in the order of the limits.

    Args:
      config: the dataclass.
      section: its path, with its dot.
      **limits: field -> its least value, the names it may have, or a `Limit`.
    """
    for name, limit in limits.items():
        path, value = f"{section}{name}", getattr(config, name)
        if isinstance(limit, Limit):
            require(limit.holds(value), path, value, limit.allowed)
        elif isinstance(limit, tuple):
            require_names(path, [value], limit)
        else:
            require(value >= limit, path, value, f">= {limit}")


def finite(config: object, section: str, *, but: tuple[str, ...] = ()) -> None:
    """Refuses inf and nan in the float fields of a config, apart from those named in `but`."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        if f.type == "float" and f.name not in but:  # annotations are texts here
            value = getattr(config, f.name)
            require(math.isfinite(value), f"{section}{f.name}", value, "a finite number")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain JSON types.

    >>> from prdarts_jax.config.search import ArchConfig
    >>> to_dict(ArchConfig())["beta1"]
    0.5
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: Mapping[str, Any], path: str = "") -> Any:
    """The inverse of `to_dict`; unknown names and wrong types are one clear error.

    >>> from prdarts_jax.config.search import SearchConfig
    >>> from_dict(SearchConfig, to_dict(SearchConfig())) == SearchConfig()
    True
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path.rstrip('.') or 'config'}: {values!r} is not possible; allowed: a section with names")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise unknown(f"{path}{name}".rpartition(".")[0] or "config", name, hints)
    made = {name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()}
    return kind(**made)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` (JSON type or command-line string) as the type `hint`."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, f"{path}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is not tuple:
        return convert_scalar(hint, value, path)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    require(isinstance(value, list | tuple), path, value, "a list")
    return tuple(_convert(typing.get_args(hint)[0], part, f"{path}[{i}]") for i, part in enumerate(value))


def convert_scalar(hint: Any, value: Any, path: str) -> Any:
    """A scalar of a type of `_SCALARS` from a JSON value or a command-line string; of others the value as it is.

    >>> convert_scalar(float, "3e-4", "arch.learning_rate"), convert_scalar(bool, "false", "data.flip")
    (0.0003, False)
    """
    if hint not in _SCALARS:
        return value
    convert, allowed = _SCALARS[hint]
    another_type = (isinstance(value, bool) and hint is not bool) or (hint is str and not isinstance(value, str))
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        converted = convert(value)
        if not another_type and converted == converted:  # nan is not equal to itself
            return converted
    raise UserError(f"{path}: {value!r} is not possible; allowed: {allowed}")


def _whole(value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value  # a float would round numbers above 2^53
    except ValueError:
        number = float(value)  # "1e3"
    if int(number) != number:
        raise ValueError
    return int(number)


def _number_or_none(value: Any) -> float | int | None:
    if value is None or str(value).lower() == "none":
        return None
    number = float(value)
    return int(number) if number.is_integer() and "." not in str(value) else number


_BOOLS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
_SCALARS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (lambda value: _BOOLS[str(value).lower()], "true | false"),
    int: (_whole, "a whole number"),
    float: (float, "a number"),
    str: (str, "a text"),
    type(None): (_number_or_none, "a number | none"),  # of a field whose default is None
}


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf field of a config class as (dotted path, type, default).

    >>> from prdarts_jax.config.search import SearchConfig
    >>> [path for path, _, _ in fields(SearchConfig)][:2]
    ['space.cells', 'space.channels']
    """
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            default = f.default if f.default is not dataclasses.MISSING else {}
            yield f"{prefix}{f.name}", hint, default


def comments(kind: type) -> dict[str, str]:
    """The comment beside each field of a config class, by dotted path: the one place where a field is explained.

    Args:
      kind: a dataclass whose fields stand one a line.

    >>> from prdarts_jax.config.search import SearchConfig
    >>> comments(SearchConfig)["space.channels"]
    'C of the first cells'
    """
    found: dict[str, str] = {}
    hints = typing.get_type_hints(kind)
    beside = {}
    # A class may extend another one, whose fields come first.
    for owner in reversed([one for one in kind.__mro__ if dataclasses.is_dataclass(one)]):
        for line in inspect.getsource(owner).splitlines():
            code, _, comment = line.partition("  # ")
            beside[code.strip().partition(":")[0]] = comment.strip()
    for f in dataclasses.fields(kind):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            found |= {f"{f.name}.{path}": text for path, text in comments(hint).items()}  # type: ignore[arg-type]
        else:
            found[f.name] = beside[f.name]
    return found


def get(config: Any, path: str) -> Any:
    """The value at a dotted path.

    >>> from prdarts_jax.config.search import SearchConfig
    >>> get(SearchConfig(), "weights.momentum")
    0.9
    """
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def replace(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with the values at dotted paths changed, converted and validated.

    >>> from prdarts_jax.config.search import SearchConfig
    >>> replace(SearchConfig(), {"space.cells": 6, "seed": "3"}).space.cells
    6
    """
    nested = dataclasses.asdict(config)
    known = [path for path, _, _ in fields(type(config))]
    for path, value in changes.items():
        *parents, name = path.split(".")
        is_option = parents == ["method", "options"] and "method.options" in known
        if path not in known and not (is_option and name):
            raise unknown("field", path, known)
        section = nested
        for parent in parents:
            section = section[parent]
        section[name] = value
    return from_dict(type(config), nested)


def computed(config: Any) -> dict[str, Any]:
    """What is computed: the flat fields that must be equal for a run to be resumed (all but `run`)."""
    flat = {path: get(config, path) for path, _, _ in fields(type(config)) if not path.startswith("run.")}
    options = flat.pop("method.options", {})
    flat |= {f"method.options.{name}": value for name, value in options.items()}
    return json.loads(json.dumps(flat))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Human-readable differences of two flat configs: 'field: OLD in the workdir, NEW now'.

    >>> differences({"seed": 0}, {"seed": 1})
    ['seed: 0 in the workdir, 1 now']
    """
    names = sorted(old.keys() | new.keys())
    return [
        f"{n}: {old.get(n, 'absent')!r} in the workdir, {new.get(n, 'absent')!r} now"
        for n in names
        if n not in old or n not in new or old[n] != new[n]
    ]


def parse_seeds(text: str, path: str = "seeds") -> list[int]:
    """Seeds from `A..B` (both included) or `A,B,C`.

    Raises:
      UserError: neither, or a seed twice.

    >>> parse_seeds("0..2"), parse_seeds("7,3")
    ([0, 1, 2], [7, 3])
    """
    seeds: Sequence[int] = ()
    if match := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text):
        first, last = int(match[1]), int(match[2])
        seeds = range(first, last + 1) if last - first < _MOST_SEEDS else ()
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        seeds = [int(word) for word in text.split(",")]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: {text!r} is not possible; allowed: A..B with A <= B, or different seeds A,B,C")
    return list(seeds)
