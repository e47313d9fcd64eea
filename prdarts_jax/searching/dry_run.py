"""The user's own code, tried on shapes before anything is written to the disk: what it raises is one clear line."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from prdarts_jax.config import userfile
from prdarts_jax.errors import UserError
from prdarts_jax.ops.check import primitives
from prdarts_jax.searching import program as search_program
from prdarts_jax.searching.program import Problem
from prdarts_jax.space import supernet
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategy import Strategy


def primitive_uses(space: Space) -> set[tuple[str, int]]:
    """(operation, stride) of everything an edge of the space may compute.

    >>> sorted(stride for op, stride in primitive_uses(Space()) if op == "skip_connect")
    [1, 2]
    """
    return {
        (op, group.stride)
        for kind in CELL_TYPES
        for group in space.edge_groups(kind)
        for op, edges in space.rows(kind, group).items()
        if edges and space.table[op].group != "none"
    }


def strategy(made: Strategy, space: Space, epochs: int, *, field: str = "method.strategy") -> None:
    """Calls every function of a user's strategy that needs no network, on its first architecture.

    Raises:
      UserError: an exception in one of them, or a result that the loop could not use.
    """
    with userfile.errors_of({field: made}):
        arch = made.init(jax.random.key(0))
        for epoch in {0, epochs - 1}:
            progress = {name: np.float32(value) for name, value in made.schedule(epoch, epochs).items()}
            p = {kind: np.shape(value) for kind, value in made.probabilities(arch, progress).items()}
        genotype = made.derive(jax.device_get(arch))
        jax.eval_shape(made.expected, arch, progress)
        # Not called: what it does with the metrics of an epoch shows when there are some.
        signature = inspect.signature(made.end_epoch)
    try:
        signature.bind(arch, {}, 0)
    except TypeError:
        raise UserError(f"{field}: end_epoch takes {signature}; allowed: (arch, metrics, epoch)") from None
    allowed = {kind: (space.num_edges, space.num_ops) for kind in CELL_TYPES}
    if p != allowed:
        raise UserError(f"{field}: probabilities have shapes {p}; allowed: {allowed}")
    if not isinstance(genotype, Genotype):
        raise UserError(f"{field}: derive gives a {type(genotype).__name__}; allowed: a Genotype")


def transformation(tx: optax.GradientTransformation, parameters: Any, *, field: str) -> None:
    """One update of a user's transformation, on the shapes of its parameters.

    Raises:
      UserError: an exception in it.
    """

    def update(parameters: Any) -> Any:
        updates, _ = tx.update(jax.tree.map(jax.numpy.zeros_like, parameters), tx.init(parameters), parameters)
        return optax.apply_updates(parameters, updates)

    with userfile.errors_of({field: tx}):
        jax.eval_shape(update, parameters)


def search(
    problem: Problem, mesh: Mesh, image: tuple[int, ...], epochs: int, user: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Tries everything of a search that is the user's: each part alone, then one step of all, on shapes.

    Args:
      problem, mesh: of the search.
      image: (H, W, C) of the data.
      epochs: of the search.
      user: name -> primitive of the user.
      given: fields among `method.strategy`, `weights.transform`, `arch.transform` whose value is the user's -> that
        value.

    Raises:
      UserError: the user's code raises, or gives what a search cannot use.
    """
    space = problem.space
    parts = {**given, **({"space.primitives": tuple(user.values())} if user else {})}
    if not parts:
        return
    primitives(
        user,
        primitive_uses(space),
        channels=2 * space.channels,
        size=(image[0], image[1]),
        dtype=problem.dtype,
        field="space.primitives",
    )
    if "method.strategy" in given:
        strategy(problem.strategy, space, epochs)
    weights = jax.eval_shape(lambda key: supernet.init(key, space), jax.random.key(0))
    arch = jax.eval_shape(problem.strategy.init, jax.random.key(0))
    for field, tx, parameters in (
        ("weights.transform", problem.weight_tx, weights),
        ("arch.transform", problem.arch_tx, arch),
    ):
        if field in given:
            transformation(tx, parameters, field=field)
    with userfile.errors_of(parts):
        progress = {name: np.float32(v) for name, v in problem.strategy.schedule(0, epochs).items()}
        progress |= {"weight_learning_rate": np.float32(0), "arch_learning_rate": np.float32(0)}
        search_program.abstract_carry(problem, mesh, jax.random.key(0), progress, image)
