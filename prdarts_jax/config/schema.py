"""Configs as frozen dataclasses, whatever their fields: checks, JSON, dotted paths, comments, differences.

It imports neither jax nor numpy, so `prdarts --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from prdarts_jax.errors import UserError, unknown

SCHEMA_VERSION = 1
MAX_SEED = 2**32 - 1  # a key of jax.random holds 32 bits of a seed: larger ones would repeat smaller ones


def require(holds: bool, path: str, value: object, allowed: str) -> None:
    """Refuses the value of a field in one line, unless it `holds`."""
    if not holds:
        raise UserError(f"{path}: {value!r} is not possible; allowed: {allowed}")


def minimum(config: object, section: str, **least: float) -> None:
    """Refuses fields of a config below their least value; `section` is their path with its dot."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value >= low, f"{section}{name}", value, f">= {low}")


def finite(config: object, section: str, *, but: tuple[str, ...] = ()) -> None:
    """Refuses inf and nan in the float fields of a config, apart from those named in `but`."""
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        if f.type == "float" and f.name not in but:  # annotations are texts here
            value = getattr(config, f.name)
            require(math.isfinite(value), f"{section}{f.name}", value, "a finite number")


def check_seed(seed: int) -> None:
    """Refuses a seed that jax.random would not tell from another one."""
    require(0 <= seed <= MAX_SEED, "seed", seed, f"0..{MAX_SEED}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain JSON types.

    >>> to_dict(ArchConfig())["beta1"]
    0.5
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: Mapping[str, Any], path: str = "") -> Any:
    """The inverse of `to_dict`; unknown names and wrong types are one clear error.

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
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}: {value!r} is not possible; allowed: a list")
        return tuple(_convert(item, part, f"{path}[{i}]") for i, part in enumerate(value))
    if origin in (typing.Union, types.UnionType) or hint is Any or origin is not None:
        return value
    return convert_scalar(hint, value, path)


def convert_scalar(hint: type, value: Any, path: str) -> Any:
    """A scalar of type bool, int, float or str from a JSON value or a command-line string.

    >>> convert_scalar(float, "3e-4", "arch.learning_rate"), convert_scalar(bool, "false", "data.flip")
    (0.0003, False)
    """
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[str(value).lower()]
        if hint is int:
            number = _whole(value) if isinstance(value, str) else value
            if isinstance(value, bool) or int(number) != number:
                raise ValueError
            return int(number)
        if hint is float:
            number = float(value)
            if isinstance(value, bool) or number != number:
                raise ValueError
            return number
        if hint is str:
            if not isinstance(value, str):
                raise ValueError
            return value
    except (ValueError, KeyError, TypeError, OverflowError):
        kinds = {bool: "true | false", int: "a whole number", float: "a number", str: "a text"}
        raise UserError(f"{path}: {value!r} is not possible; allowed: {kinds[hint]}") from None
    return value


def _whole(text: str) -> int | float:
    try:
        return int(text)  # a float would round numbers above 2^53
    except ValueError:
        return float(text)  # "1e3"


def fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf field of a config class as (dotted path, type, default).

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

    >>> get(SearchConfig(), "weights.momentum")
    0.9
    """
    for name in path.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def replace(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with the values at dotted paths changed, converted and validated.

    >>> replace(SearchConfig(), {"space.cells": 6, "seed": "3"}).space.cells
    6
    """
    nested = dataclasses.asdict(config)
    hints = {path: hint for path, hint, _ in fields(type(config))}
    for path, value in changes.items():
        head, _, option = path.partition("method.options.")
        if not head and option:
            nested["method"]["options"] = {**nested["method"]["options"], option: value}
            continue
        if path not in hints:
            raise unknown("field", path, hints)
        section = nested
        *parents, last = path.split(".")
        for name in parents:
            section = section[name]
        section[last] = value
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
