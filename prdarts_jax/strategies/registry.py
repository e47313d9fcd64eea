"""Search methods by name: factory, options and published settings of a row of `rows.py`, or of a user's own file.

Imports no jax: a factory's module is imported when the factory is asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from prdarts_jax.config import userfile
from prdarts_jax.config.schema import convert_scalar
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.strategies.rows import ROWS as _ROWS
from prdarts_jax.strategies.rows import Row


def rows() -> tuple[Row, ...]:
    """Every method, in the order of the table.

    >>> [row.name for row in rows()][:2]
    ['prdarts', 'darts']
    """
    return _ROWS


def row(name: str) -> Row:
    """The row of a method.

    Raises:
      UserError: no such name; the error names the nearest one.

    >>> row("darts").settings["epochs"]
    50
    """
    for candidate in _ROWS:
        if candidate.name == name:
            return candidate
    raise unknown("method.strategy", name, [*(candidate.name for candidate in _ROWS), "path.py:factory"])


def factory(name_or_path: str) -> Callable[..., Any]:
    """The factory of a method: `factory(space=..., **options)` makes the strategy.

    Args:
      name_or_path: a name of the table, or `path.py:factory` of the user's own file.

    Raises:
      UserError: no such name or file, or the object is not callable.

    >>> factory("darts").__name__
    'darts'
    """
    if userfile.is_path(name_or_path):
        made = userfile.load(name_or_path, "method.strategy").value
        if not callable(made):
            raise UserError(
                f"method.strategy: {name_or_path!r} is a {type(made).__name__}; allowed: a factory function"
            )
        return made
    module, _, function = row(name_or_path).factory.partition(":")
    return getattr(importlib.import_module(module), function)


def settings(name_or_path: str) -> Mapping[str, Any]:
    """The published settings of a method: dotted config path -> value.

    A user's factory may carry them as its attribute `settings`; without it there are none.

    Raises:
      UserError: no such method, or an attribute `settings` that is not a mapping.

    >>> settings("darts")["weights.weight_decay"]
    0.0003
    """
    if not userfile.is_path(name_or_path):
        return row(name_or_path).settings
    published = getattr(factory(name_or_path), "settings", {})
    if not isinstance(published, Mapping):
        allowed = "a dict path -> value"
        raise UserError(f"method.strategy: settings of {name_or_path!r} are {published!r}; allowed: {allowed}")
    for path in published:
        if str(path).startswith("method."):
            raise UserError(
                f"method.strategy: settings of {name_or_path!r} name {path!r}; allowed: fields of the config "
                "but the method's own (its defaults are those of the factory)"
            )
    return published


def arrays(name_or_path: str) -> tuple[str, ...]:
    """The options of a method whose values are arrays in the compiled step, so that searches with others share it.

    A user's factory may carry their names as its attribute `arrays`; without it there are none.

    Raises:
      UserError: no such method, or names that are no options of it.

    >>> arrays("prdarts")[:2]
    ('tau_max', 'tau_min')
    """
    if not userfile.is_path(name_or_path):
        return row(name_or_path).arrays
    declared, known = getattr(factory(name_or_path), "arrays", ()), options(name_or_path)
    names = tuple(declared) if isinstance(declared, tuple | list | set) else (declared,)
    if any(name not in known for name in names):
        raise UserError(
            f"method.strategy: arrays of {name_or_path!r} are {declared!r}; allowed: names among {' | '.join(known)}"
        )
    return names


def options(name_or_path: str) -> dict[str, Any]:
    """The options of a method: the keyword arguments of its factory without `space`, and their defaults.

    Only arguments with a default of type None, bool, int, float or str are options: the rest cannot be written in a
    config.

    Raises:
      UserError: no such method, or a factory with an argument that has no default.

    >>> options("darts")
    {'order': 1, 'exact': False, 'init_scale': 0.001}
    """
    parameters = [
        parameter
        for parameter in inspect.signature(factory(name_or_path)).parameters.values()
        if parameter.name != "space" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    for parameter in parameters:
        if parameter.default is parameter.empty:
            raise UserError(
                f"method.strategy: argument {parameter.name!r} of {name_or_path!r} has no default; "
                "allowed: `space` and arguments with a default"
            )
    kinds = bool | int | float | str | None
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, kinds)}


def resolve_options(name_or_path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method: the given ones, converted to the type of their default, and the defaults of the others.

    An option whose default is None takes a number or none.

    Args:
      name_or_path: as in `factory`.
      given: option name -> JSON value or command-line string.

    Raises:
      UserError: an option the method does not have, or a value of another type.

    >>> resolve_options("darts", {"init_scale": "0.1"})
    {'order': 1, 'exact': False, 'init_scale': 0.1}
    """
    defaults = options(name_or_path)
    for name in given:
        if name not in defaults:
            raise unknown(f"method.options.{name}", name, defaults)
    return {
        name: convert_scalar(type(default), given[name], f"method.options.{name}") if name in given else default
        for name, default in defaults.items()
    }
