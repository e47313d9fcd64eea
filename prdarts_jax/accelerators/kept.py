"""Programs as files: jax.export of a jitted program whose arguments are trees of our classes and of optax's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax import export as jax_export


def exported(program: Any, arguments: tuple[Any, ...], *platforms: str) -> jax_export.Exported:
    """A jitted program lowered for platforms that need not be here; `.serialize()` gives the bytes of a file.

    Args:
      program: jitted, and traced for these platforms (`make_dispatch(..., lowering=Lowering("tpu"))`).
      arguments: arrays or shapes.
      platforms: cpu | cuda | tpu.

    Returns:
      what `jax.export.deserialize` gives in a process where `nameable` has seen trees of the same classes.

    >>> exported(jax.jit(lambda x: x + 1.0), (jax.ShapeDtypeStruct((2,), "float32"),), "tpu").platforms
    ('tpu',)
    """
    nameable((arguments, jax.eval_shape(program, *arguments)))
    return jax_export.export(program, platforms=platforms)(*arguments)


def nameable(tree: Any) -> None:
    """Tells jax.export the names of the classes in a tree: named tuples and flax's dataclasses without static fields.

    Those of a caller's own transformation are not known before there is a tree of them. JAX keeps the names for the
    process; a class that has one keeps it.
    """
    for kind in set(_classes(jax.tree.structure(tree))):
        name = f"{kind.__module__}.{kind.__qualname__}"
        try:
            if issubclass(kind, tuple):
                jax_export.register_namedtuple_serialization(kind, serialized_name=name)
            else:
                nothing: dict[str, Any] = {"serialize_auxdata": bytes, "deserialize_auxdata": lambda _: ()}
                jax_export.register_pytree_node_serialization(kind, serialized_name=name, **nothing)
        except ValueError as error:
            if "Duplicate" not in str(error):
                raise


def _classes(structure: Any) -> Iterator[type]:
    """Of the nodes that are neither tuples, lists, dicts nor None."""
    node = structure.node_data()
    if node is not None and node[0] not in (tuple, list, dict, type(None)):
        yield node[0]
    for child in structure.children():
        yield from _classes(child)
