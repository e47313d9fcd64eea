"""The compiled programs of a search: several bilevel steps a dispatch, the full evaluation, the first state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax.bilevel import Batches, SearchState
from prdarts_jax.config.search import DataConfig
from prdarts_jax.data.augment import load_images, normalize
from prdarts_jax.data.batches import Batch, Images
from prdarts_jax.devices import sharding
from prdarts_jax.devices.sharding import on_mesh
from prdarts_jax.errors import UserError
from prdarts_jax.gates import Gates
from prdarts_jax.ops.lowering import Lowering
from prdarts_jax.ops.precision import at_precision
from prdarts_jax.run.steps import Sums, run_steps
from prdarts_jax.searching.probe import probe_program
from prdarts_jax.searching.step import init_state, make_search_step
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import Space
from prdarts_jax.strategy import Numbers, Strategy

_INITIAL = 2**32 - 1  # in the place of a step number: the first state shares no key with a step
_TRAIN, _VAL, _GATES = range(3)  # purposes of a step's keys


@flax.struct.dataclass
class SearchCarry:
    """What a checkpoint holds: the state, and the sums of this epoch's metrics so far."""

    state: SearchState
    sums: Sums  # name -> float32[]


class Orders(NamedTuple):
    """The batches of a dispatch, as indices into the data set."""

    train: Any  # int32[S,B]
    val: Any  # int32[S,B]


class SearchProblem(NamedTuple):
    """Static parts of a search: what is computed, without numbers that change."""

    space: Space
    strategy: Strategy
    weight_tx: optax.GradientTransformation
    arch_tx: optax.GradientTransformation
    data: DataConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str
    local_batch_norm: bool = False
    precision: str = "default"
    cell: str = "auto"  # the lowering of the mixed cell

    def lowering(self, mesh: Mesh) -> Lowering:
        """What a program of this mesh is lowered for, and how its cells are."""
        return sharding.lowering_of(mesh)._replace(cell=self.cell)


def strong(leaf: jax.Array) -> jax.Array:
    """An array whose dtype is no longer that of a Python number."""
    return lax.convert_element_type(leaf, leaf.dtype) if getattr(leaf.aval, "weak_type", False) else leaf


def _initial(problem: SearchProblem, mesh: Mesh, image: tuple[int, ...]) -> Callable[[jax.Array, Numbers], SearchCarry]:
    step = _step(problem, None, problem.lowering(mesh))

    def program(key: jax.Array, numbers: Numbers) -> SearchCarry:
        state = init_state(
            jax.random.fold_in(key, _INITIAL),
            space=problem.space,
            strategy=problem.strategy,
            weight_tx=problem.weight_tx,
            arch_tx=problem.arch_tx,
        )
        batch = Batch(jnp.zeros((2, *image), problem.dtype), jnp.zeros((2,), jnp.int32))
        after, metrics = jax.eval_shape(step, state, Batches(batch, batch), key, numbers)
        _check_types(state, after)
        # An optimizer may begin with Python numbers and go on with arrays, which would be a second program.
        state = jax.tree.map(lambda leaf, later: leaf if later.weak_type else strong(leaf), state, after)
        return SearchCarry(state, {name: jnp.zeros((), jnp.float32) for name in metrics})

    return program


_PARTS = {"memory": "method.strategy", "weight_opt": "weights.transform", "arch_opt": "arch.transform"}


def _check_types(before: SearchState, after: SearchState) -> None:
    """Refuses a step that changes the tree, a shape or a dtype of what it goes on from: it is compiled once."""
    for part, field in _PARTS.items():
        old, new = (_typed(getattr(state, part)) for state in (before, after))
        changed = [name for name in old | new if old.get(name) != new.get(name)]
        if changed:
            name = changed[0]
            was, now = old.get(name, "nothing"), new.get(name, "nothing")
            raise UserError(f"{field}: a step makes {now} of {part}{name}, which was {was}; allowed: what it was")


def _typed(tree: Any) -> dict[str, str]:
    """Path -> dtype[shape] of each leaf."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


class SearchPrograms:
    """The compiled programs of a search, made when first asked for: searches that differ in arrays alone share them.

    Args:
      problem, mesh: static.
      image: (H, W, C) of the data.
    """

    def __init__(self, problem: SearchProblem, mesh: Mesh, image: tuple[int, ...]) -> None:
        self.problem, self.mesh, self._image = problem, mesh, image
        self._probes: dict[str, Callable[..., Any]] = {}

    @functools.cached_property
    def initial(self) -> Callable[[jax.Array, Numbers], SearchCarry]:
        """(base key, numbers of any epoch) -> the carry before the first step, on one device."""
        return jax.jit(_initial(self.problem, self.mesh, self._image))

    @functools.cached_property
    def dispatch(self) -> Callable[..., tuple[SearchCarry, Sums]]:
        """See `make_dispatch`."""
        return make_dispatch(self.problem, self.mesh)

    @functools.cached_property
    def evaluation(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """See `make_evaluation`."""
        return make_evaluation(self.problem, self.mesh)

    @functools.cached_property
    def at_gates(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(state, gates, indices [S,B], mask [S,B], data) -> (mean loss, accuracy), as `make_evaluation` has them."""
        return make_evaluation(self.problem, self.mesh, given=True)

    def probe(self, what: str) -> Callable[..., Any]:
        """See `probe_program`."""
        if what not in self._probes:
            self._probes[what] = probe_program(self.problem, self.mesh, what)
        return self._probes[what]


def abstract_carry(
    problem: SearchProblem, mesh: Mesh, key: jax.Array, numbers: Numbers, image: tuple[int, ...]
) -> SearchCarry:
    """Shapes, dtypes and shardings of the carry: what a checkpoint is restored into, without computing anything."""
    shapes = jax.eval_shape(_initial(problem, mesh, image), key, numbers)
    return on_mesh(mesh, shapes)


def _step(problem: SearchProblem, axis_name: str | None, lowering: Lowering) -> Callable[..., Any]:
    return make_search_step(
        space=problem.space,
        strategy=problem.strategy,
        weight_tx=problem.weight_tx,
        arch_tx=problem.arch_tx,
        axis_name=axis_name,
        local_batch_norm=problem.local_batch_norm,
        apply=functools.partial(supernet.apply, lowering=lowering),
    )


def dispatch_program(
    problem: SearchProblem, axis_name: str | None, lowering: Lowering
) -> Callable[..., tuple[SearchCarry, Sums]]:
    """What `make_dispatch` compiles, as a pure per-device function."""
    step = _step(problem, axis_name, lowering)

    def load(key: jax.Array, data: Images, index: jax.Array, positions: jax.Array) -> Batch:
        images = load_images(
            key,
            data.images[index],
            positions,
            data=problem.data,
            mean=problem.mean,
            std=problem.std,
            dtype=problem.dtype,
        )
        return Batch(images, data.labels[index])

    def program(
        carry: SearchCarry,
        count: jax.Array,
        fresh: jax.Array,
        orders: Orders,
        positions: jax.Array,
        key: jax.Array,
        numbers: Numbers,
        data: Images,
    ) -> tuple[SearchCarry, Sums]:
        def one(i: jax.Array, state: SearchState) -> tuple[SearchState, Sums]:
            keys = [jax.random.fold_in(jax.random.fold_in(key, state.step), purpose) for purpose in range(3)]
            batches = Batches(
                load(keys[_TRAIN], data, orders.train[i], positions),
                load(keys[_VAL], data, orders.val[i], positions),
            )
            return step(state, batches, keys[_GATES], numbers)

        length = orders.train.shape[0]
        state, sums, rows = run_steps(one, carry.state, carry.sums, count=count, fresh=fresh, length=length)
        return SearchCarry(state, sums), rows

    return at_precision(problem.precision, program)


def make_dispatch(
    problem: SearchProblem, mesh: Mesh, lowering: Lowering | None = None
) -> Callable[..., tuple[SearchCarry, Sums]]:
    """The jitted program (carry, count, fresh, orders, positions, key, numbers, data) -> (carry, rows).

    It runs `count` steps on the first `count` batches of `orders`; `fresh` starts the sums of an epoch; `positions`
    int32[B] are the places in the global batch, 0..B-1 (they are split over the devices with the batch). `rows` holds
    each metric of each step, float32[S]. The carry is donated.
    `lowering`: default that of the mesh; another one where the program is exported for other platforms.
    """
    program = dispatch_program(problem, sharding.axis_of(mesh), lowering or problem.lowering(mesh))
    everywhere, batch = sharding.REPLICATED, PartitionSpec(None, sharding.AXIS)
    in_specs = (
        everywhere,
        everywhere,
        everywhere,
        Orders(batch, batch),
        PartitionSpec(sharding.AXIS),
        everywhere,
        everywhere,
        everywhere,
    )
    return jax.jit(sharding.map_over(mesh, program, in_specs, (everywhere, everywhere)), donate_argnums=0)


def make_evaluation(
    problem: SearchProblem, mesh: Mesh, *, given: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted program (state, indices [S,B], mask [S,B], numbers, data) -> (mean loss, accuracy).

    The network has the gates of role "eval", or (given) those that the program (state, gates, indices, mask, data)
    is called with; batch statistics come from the whole (padded) batches, or their parts on each
    device (`local_batch_norm`), the means from the images under the mask alone.
    """
    axis_name = sharding.axis_of(mesh)
    norm_axis = None if problem.local_batch_norm else axis_name
    static: dict[str, Any] = {"space": problem.space, "axis_name": norm_axis, "lowering": problem.lowering(mesh)}
    network = at_precision(problem.precision, functools.partial(supernet.apply, **static))

    def at(
        state: SearchState, gates: Gates, indices: jax.Array, mask: jax.Array, data: Images
    ) -> tuple[jax.Array, jax.Array]:
        def body(sums: jax.Array, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            index, counted = batch
            images = normalize(data.images[index], problem.mean, problem.std, problem.dtype)
            labels = data.labels[index]
            logits, _ = network(state.weights, gates, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            right = (jnp.argmax(logits, axis=1) == labels).astype(jnp.float32)
            found = jnp.stack([jnp.sum(jnp.where(counted, v, 0.0)) for v in (losses, right, jnp.ones_like(losses))])
            return sums + found, None

        sums, _ = lax.scan(body, jnp.zeros((3,), jnp.float32), (indices, mask))
        sums = sums if axis_name is None else lax.psum(sums, axis_name)
        return sums[0] / sums[2], sums[1] / sums[2]

    def expected(
        state: SearchState, indices: jax.Array, mask: jax.Array, numbers: Numbers, data: Images
    ) -> tuple[jax.Array, jax.Array]:
        gates = problem.strategy.sample(jax.random.key(0), state.arch, state.memory, numbers, "eval")
        return at(state, gates, indices, mask, data)

    everywhere, batch = sharding.REPLICATED, PartitionSpec(None, sharding.AXIS)
    specs = (
        (everywhere, everywhere, batch, batch, everywhere)
        if given
        else (everywhere, batch, batch, everywhere, everywhere)
    )
    return jax.jit(sharding.map_over(mesh, at if given else expected, specs, (everywhere, everywhere)))
