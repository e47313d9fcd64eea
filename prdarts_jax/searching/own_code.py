"""The caller's own code, before anything is written to the disk: tried on shapes, and told apart by its programs.

What a strategy or an optimizer computes is the text of the program it lowers to, with the numbers it has closed over as
constants. Its digest says on resume whether it is the same, its comparison whether members of a population may share
one compiled step.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from prdarts_jax.bilevel import Batch, Batches, Optimizers, SearchState
from prdarts_jax.config import userfile
from prdarts_jax.config.search import ArchConfig, WeightsConfig
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.ops.check import check_primitives
from prdarts_jax.ops.primitives import Primitive
from prdarts_jax.optimizers import arch_transform, lowered_text, program_text, weight_transform
from prdarts_jax.run.digests import is_key
from prdarts_jax.searching.program import SearchProblem, abstract_carry
from prdarts_jax.searching.step import make_losses
from prdarts_jax.space import supernet
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, Space
from prdarts_jax.strategy import ROLES, Strategy

METHOD, WEIGHTS, ARCH = "method.strategy", "weights.transform", "arch.transform"  # config fields


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


def try_out(
    problem: SearchProblem,
    mesh: Mesh,
    image: tuple[int, ...],
    epochs: int,
    primitives: Mapping[str, Primitive],
    own: Mapping[str, Any],
) -> dict[str, str]:
    """Tries everything of a search that is the caller's: each part alone, then one step of all, on shapes.

    Args:
      problem, mesh: of the search.
      image: (H, W, C) of the data.
      epochs: of the search.
      primitives: name -> primitive of the user.
      own: METHOD, WEIGHTS, ARCH, as far as the value is the caller's -> that value.

    Returns:
      field of `own` -> SHA-256 of what it computes.

    Raises:
      UserError: the caller's code raises, or gives what a search cannot use.
    """
    parts = {**own, **({"space.primitives": tuple(primitives.values())} if primitives else {})}
    if not parts:
        return {}
    channels = 2 * problem.space.channels // problem.space.partial
    check_primitives(
        primitives,
        primitive_uses(problem.space),
        channels=channels,
        size=(image[0], image[1]),
        dtype=problem.dtype,
        field="space.primitives",
    )
    if METHOD in own:
        check_strategy(problem.strategy, problem.space, epochs)
    digests = {}
    for field, value in own.items():
        with userfile.errors_of({field: value}):
            content = _lowered(problem, field) + (_on_the_host(problem.strategy, epochs) if field == METHOD else "")
        digests[field] = hashlib.sha256(content.encode()).hexdigest()
    with userfile.errors_of(parts):
        numbers = {name: np.float32(value) for name, value in problem.strategy.schedule(0, epochs).items()}
        numbers |= {"weight_learning_rate": np.float32(0), "arch_learning_rate": np.float32(0)}
        abstract_carry(problem, mesh, jax.random.key(0), numbers, image)
    return digests


def same_programs(members: Mapping[str, tuple[SearchProblem, Mapping[str, str]]]) -> None:
    """Refuses members whose strategies or own optimizers compute something else than the first member's.

    A number that reaches the step through `schedule` or the state of an optimizer leaves no trace in the lowered
    program; a Python number that a function has closed over is a constant in it.

    Args:
      members: name -> (problem, digests of what is the caller's); the program of the first one is used by all.

    Raises:
      UserError: a program differs.
    """
    (first, own), *_ = members.values()
    # The optimizers of the config have their numbers in their state.
    for field in (METHOD, *(field for field in (WEIGHTS, ARCH) if field in own)):
        differing = {n: other for n, (other, _) in members.items() if _part(other, field) is not _part(first, field)}
        expected = _compared(first, field) if differing else ""
        for name, other in differing.items():
            if _compared(other, field) != expected:
                raise UserError(
                    f"sweep: {name} makes another program of {field}, which has frozen a swept number; "
                    "allowed: numbers that enter the step as arrays"
                )


def _rule_text(strategy: Strategy) -> str:
    """A step by the rule of a strategy, lowered with a small network in the place of the search network."""
    space = strategy.space

    def apply(weights: Any, gates: Gates, images: jax.Array, **_: Any) -> tuple[jax.Array, None]:
        parts = [leaf for leaf in jax.tree.leaves((gates.ops, gates.edges)) if leaf is not None]
        logits = jnp.mean(images) + sum(map(jnp.sum, parts), jnp.zeros(())) * weights["w"]
        return jnp.broadcast_to(logits, (images.shape[0], space.classes)), None

    losses = make_losses(space=space, strategy=strategy, apply=apply)
    optimizers = Optimizers(weight_transform(WeightsConfig()), arch_transform(ArchConfig()))
    step = strategy.rule(losses._replace(twice=losses.weight), optimizers)
    numbers = {"weight_learning_rate": 0.1, "arch_learning_rate": 0.1} | strategy.schedule(0, 2)
    batch = Batch(jnp.zeros((2, 1, 1, 1)), jnp.zeros((2,), jnp.int32))

    def state(key: jax.Array) -> SearchState:
        weights, arch = {"w": jnp.zeros((space.classes,))}, strategy.init(key)
        opts = (optimizers.weights.init(weights), optimizers.arch.init(arch))
        return SearchState(jnp.zeros((), jnp.int32), weights, arch, *opts, jax.tree.map(jnp.asarray, strategy.memory))

    key = jax.random.key(0)
    arrays = {name: np.float32(value) for name, value in numbers.items()}
    return lowered_text(step, jax.eval_shape(state, key), Batches(batch, batch), key, arrays)


def _part(problem: SearchProblem, field: str) -> Any:
    return {METHOD: problem.strategy, WEIGHTS: problem.weight_tx, ARCH: problem.arch_tx}[field]


def _compared(problem: SearchProblem, field: str) -> str:
    """What members of a population have in common; of a method also its rule, and its first memory."""
    text = _lowered(problem, field)
    if field != METHOD:
        return text
    memory = jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), problem.strategy.memory)
    return text + _rule_text(problem.strategy) + repr(memory)


def _lowered(problem: SearchProblem, field: str) -> str:
    """A part of a search as the text of its program."""
    if field == METHOD:
        return _strategy_text(problem.strategy)
    make = problem.strategy.init if field == ARCH else functools.partial(supernet.init, space=problem.space)
    return program_text(_part(problem, field), jax.eval_shape(make, jax.random.key(0)))


def _strategy_text(strategy: Strategy) -> str:
    """The functions of a strategy that are compiled, lowered on shapes."""
    numbers = {name: np.float32(value) for name, value in strategy.schedule(0, 2).items()}

    def everything(key: jax.Array, arch: Any, numbers: Any) -> Any:
        memory, ce = strategy.memory, jnp.zeros(())
        found = []
        for role, objective in zip(ROLES, (strategy.weight_objective, strategy.objective, None), strict=True):
            gates = strategy.sample(key, arch, memory, numbers, role)
            found.append((gates, objective and objective(ce, arch, gates, memory, numbers)))
        return found

    key, arch = jax.random.key(0), jax.eval_shape(strategy.init, jax.random.key(0))
    return lowered_text(strategy.init, key) + lowered_text(everything, key, arch, numbers)


def _on_the_host(strategy: Strategy, epochs: int) -> str:
    """What of a strategy no program shows: its numbers, a cell it derives, the source of what is not compiled."""
    genotype = strategy.derive(jax.device_get(strategy.init(jax.random.key(0))))
    schedule = [strategy.schedule(epoch, epochs) for epoch in range(epochs)]
    host = (strategy.derive, strategy.probabilities, strategy.at_epoch, strategy.stage_epochs, strategy.rule)
    told = [_told(value) for value in (*host, strategy.memory, strategy.horizon)]
    return json.dumps([schedule, genotype.to_json(), told], default=str)


def _told(value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value of the host as JSON, equal in every process: functions by their source and what they hold.

    Nothing of it is an address. What belongs to a library stands for itself by its name, and so does what no one can
    see into.
    """
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in within or len(within) > 40:  # it contains itself
        return name
    inner = functools.partial(_told, within=(*within, id(value)))
    if isinstance(value, np.ndarray | np.generic) or (isinstance(value, jax.Array) and not is_key(value)):
        return [name, str(value.dtype), np.asarray(value).tolist()]
    if isinstance(value, Mapping):
        return [name, sorted(([inner(key), inner(item)] for key, item in value.items()), key=json.dumps)]
    if isinstance(value, list | tuple):
        return [name, *map(inner, value)]
    if isinstance(value, set | frozenset):
        return [name, *sorted(map(inner, value), key=json.dumps)]
    if isinstance(value, functools.partial):
        return [name, inner(value.func), inner(value.args), inner(value.keywords)]
    if inspect.ismethod(value):
        return [name, inner(value.__func__), inner(value.__self__)]
    if inspect.isfunction(value):
        return _function_told(value, inner)
    if callable(getattr(value, "__wrapped__", None)):  # jitted or cached
        return [name, inner(value.__wrapped__)]
    if isinstance(value, type) or inspect.ismodule(value) or not hasattr(value, "__dict__"):
        return [name, getattr(value, "__qualname__", getattr(value, "__name__", ""))]
    # Whether a cached property was read yet says nothing.
    cached = functools.cached_property
    held = {n: v for n, v in vars(value).items() if not isinstance(getattr(type(value), n, None), cached)}
    return [name, inner(held), inner(vars(type(value)).get("__call__"))]


def _function_told(function: types.FunctionType, inner: Callable[[Any], Any]) -> list[Any]:
    """A function: its source, or its bytecode, its defaults, what it has closed over and the globals it names."""
    code, known = function.__code__, function.__globals__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
    state = [inner(closed), inner(function.__defaults__), inner(function.__kwdefaults__)]
    if not userfile.is_users(code.co_filename):  # of a library: its version stands for its source
        return [function.__module__, function.__qualname__, *state]
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = code.co_code.hex() + repr(code.co_names)
    return [text, *state, inner({name: known[name] for name in code.co_names if name in known})]


def check_strategy(strategy: Strategy, space: Space, epochs: int) -> None:
    """Calls every function of a caller's strategy that needs no network, on its first architecture."""
    with userfile.errors_of({METHOD: strategy}):
        arch = strategy.init(jax.random.key(0))
        for epoch in {0, epochs - 1}:
            numbers = {name: np.float32(value) for name, value in strategy.schedule(epoch, epochs).items()}
            shapes = {kind: np.shape(value) for kind, value in strategy.probabilities(arch, numbers).items()}
        genotype = strategy.derive(jax.device_get(arch))
        for role in ROLES:
            jax.eval_shape(
                lambda key, r=role: strategy.sample(key, arch, strategy.memory, numbers, r), jax.random.key(0)
            )
        # Not called: what it does with the metrics of an epoch shows when there are some.
        signature = inspect.signature(strategy.at_epoch)
    try:
        signature.bind(None)
    except TypeError:
        raise UserError(f"{METHOD}: at_epoch takes {signature}; allowed: (view)") from None
    allowed = {kind: (space.num_edges, space.num_ops) for kind in CELL_TYPES}
    if shapes != allowed:
        raise UserError(f"{METHOD}: probabilities have shapes {shapes}; allowed: {allowed}")
    if not isinstance(genotype, Genotype):
        raise UserError(f"{METHOD}: derive gives a {type(genotype).__name__}; allowed: a Genotype")
