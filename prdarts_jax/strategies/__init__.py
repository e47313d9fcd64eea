"""Search methods: each one a NamedTuple of pure functions and a row in the registry.

Imports no jax by itself: the command line lists the methods without starting it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prdarts_jax.strategies import registry

if TYPE_CHECKING:
    from prdarts_jax.space.spec import Space
    from prdarts_jax.strategy import Strategy


def get(name: str, *, space: Space, **options: Any) -> Strategy:
    """The strategy of a name (or of `path.py:factory`) on a space.

    Args:
      name: a row of the registry, or a factory in the user's own file.
      space: the search space.
      **options: keyword arguments of the factory; the others keep their defaults.

    Raises:
      UserError: an unknown name or option, or a value that is not possible.

    >>> from prdarts_jax.space import Space
    >>> get("prdarts", space=Space(), tau_max=1.0).schedule(0, 10)["tau"]
    1.0
    """
    return registry.factory(name)(space=space, **registry.resolve_options(name, options))
