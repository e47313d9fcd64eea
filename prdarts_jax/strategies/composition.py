"""The table of transforms, and their texts on a command line: NAME:option=value,option=value.

Imports no jax: a transform's module is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prdarts_jax.config.schema import convert_scalar
from prdarts_jax.errors import UserError, unknown

if TYPE_CHECKING:
    from prdarts_jax.strategy import Strategy

FIELD = "method.transforms"
_ROOM = "prdarts_jax.strategies"
TRANSFORMS = {
    "frozen": f"{_ROOM}.transforms:frozen",
    "edge_weights": f"{_ROOM}.transforms:edge_weights",
    "stop_at_skips": f"{_ROOM}.transforms:stop_at_skips",
    "at_most_skips": f"{_ROOM}.transforms:at_most_skips",
    "cost": f"{_ROOM}.cost:cost",
    "hessian_stop": f"{_ROOM}.stability:hessian_stop",
    "hessian_rollback": f"{_ROOM}.stability:hessian_rollback",
    "perturbed": f"{_ROOM}.transforms:perturbed",
    "select_by_perturbation": f"{_ROOM}.perturbation:select_by_perturbation",
}
_WITHOUT_GRADIENTS = ("stop_at_skips", "at_most_skips")  # for a method whose architecture no gradient moves


def transform(name: str) -> Callable[..., Strategy]:
    """The transform of a name: `transform(strategy, **options)`.

    Raises:
      UserError: no such name; the error names the nearest one.

    >>> transform("frozen").__name__
    'frozen'
    """
    if name not in TRANSFORMS:
        raise unknown(FIELD, name, TRANSFORMS)
    module, _, function = TRANSFORMS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def options(name: str) -> dict[str, Any]:
    """The options of a transform and their defaults.

    >>> options("stop_at_skips")
    {'skips': 2, 'from_epoch': None, 'share': 0.0}
    """
    parameters = inspect.signature(transform(name)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.name != "strategy"}


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """A transform as a command line spells it: its name, and the options that are given.

    Raises:
      UserError: an unknown name or option (with the nearest one), or a value of another type.

    >>> parse("frozen:epochs=15"), parse("edge_weights")
    (('frozen', {'epochs': 15}), ('edge_weights', {}))
    """
    name, colon, rest = text.partition(":")
    known, given = options(name.strip()), {}
    for word in rest.split(",") if colon else ():
        option, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise UserError(f"{FIELD}: {text!r} is not possible; allowed: NAME:option=value,option=value")
        if option not in known:
            raise unknown(f"{FIELD}.{name}", option, known)
        if option in given:
            raise UserError(f"{FIELD}: {text!r} gives {option!r} twice; allowed: once")
        given[option] = convert_scalar(type(known[option]), value, f"{FIELD}.{name}.{option}")
    return name.strip(), given


def transformed(strategy: Strategy, texts: Sequence[str]) -> Strategy:
    """A strategy with transforms, the first one innermost.

    Raises:
      UserError: as `parse`; or a transform that the strategy cannot have.

    >>> from prdarts_jax.space import Space
    >>> from prdarts_jax.strategies import get
    >>> strategy = transformed(get("darts", space=Space()), ["frozen:epochs=1", "edge_weights"])
    >>> strategy.schedule(0, 3)
    {'arch_on': 0.0}
    """
    from prdarts_jax.bilevel import weights_alone

    for text in texts:
        name, given = parse(text)
        if strategy.rule is weights_alone and name not in _WITHOUT_GRADIENTS:
            allowed = " | ".join(_WITHOUT_GRADIENTS)
            raise UserError(f"{FIELD}: {name} needs an architecture that gradients move; allowed: {allowed}")
        strategy = transform(name)(strategy, **given)
    return strategy
