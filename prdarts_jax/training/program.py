"""The compiled programs of a training: several SGD steps a dispatch, evaluation of all test images, the first state.

loss = CE(logits) + w CE(auxiliary logits),      CE against (1 - s) one-hot + s / classes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax.config.search import ImagesConfig
from prdarts_jax.data.augment import load_images, normalize
from prdarts_jax.data.batches import Batch, Images
from prdarts_jax.devices import sharding
from prdarts_jax.devices.sharding import mean_over, on_mesh
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.ops.losses import accuracy, smoothed_cross_entropy
from prdarts_jax.ops.lowering import ANYWHERE, Lowering
from prdarts_jax.ops.precision import at_precision
from prdarts_jax.optimizers import set_learning_rate, with_extra_arguments
from prdarts_jax.run.steps import Sums, run_steps

Numbers = dict[str, Any]  # name -> float32[]: learning_rate, drop_path
_AUGMENT, _DROP_PATH = range(2)  # purposes of a step's keys

# The program runs once, in milliseconds: at the default level most of a short training would be its compilation.
_ONCE: dict[str, bool | str] = {"xla_backend_optimization_level": "0"}


class Variables(NamedTuple):
    """What the network is applied with."""

    params: Any  # float32 tree
    batch_stats: Any  # float32 tree, running statistics


@flax.struct.dataclass
class TrainState:
    """Everything a step changes."""

    step: jax.Array  # int32[], steps done since the start
    variables: Variables
    opt: Any  # state of the transformation
    ema: Variables | None  # averages of the variables, or None without EMA


@flax.struct.dataclass
class TrainCarry:
    """What a checkpoint holds: the state, and the sums of this epoch's metrics so far."""

    state: TrainState
    sums: Sums  # name -> float32[]


class TrainProblem(NamedTuple):
    """Static parts of a training: what is computed, without numbers that change."""

    network: DerivedNetwork  # as on one device of any platform: what depends on devices is set where they are known
    tx: optax.GradientTransformation
    data: ImagesConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    drop_path: bool  # whether there is any
    auxiliary_weight: float
    label_smoothing: float
    ema: float  # decay; 0 = none
    local_batch_norm: bool = False
    precision: str = "default"


def average(old: Any, new: Any, decay: float) -> Any:
    """Exponential moving average of a tree: decay old + (1 - decay) new.

    >>> print(average(jnp.ones(1), jnp.zeros(1), 0.75))
    [0.75]
    """
    return jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, old, new)


def _lowered(network: DerivedNetwork, lowering: Lowering, **changes: Any) -> DerivedNetwork:
    """The network with other attributes, and with those of what it is lowered for."""
    if lowering.platform == "cpu":  # elsewhere not measured
        changes["recompute"] = True
    if not lowering.own_kernels:
        changes["own_kernels"] = False
    return network.clone(**changes)


def make_step(
    problem: TrainProblem, axis_name: str | None = None, lowering: Lowering = ANYWHERE
) -> Callable[[TrainState, Batch, jax.Array, jax.Array, Numbers], tuple[TrainState, Sums]]:
    """A pure function (state, batch, positions, key, numbers) -> (state, metrics): one step of SGD.

    `positions` int[B] are the places of the images in the global batch; the key is the same on all devices. Gradients,
    BN statistics and metrics are means over `axis_name`. Metrics are of the network with drop-path, before the update.
    With `local_batch_norm` a device normalises by its own part of the batch; the running statistics, of which there is
    one set, move by the mean of the devices' statistics.

    `lowering` says what the step is lowered for: on a CPU equal cells are computed again for the backward pass.
    """
    network = _lowered(problem.network, lowering, axis_name=None if problem.local_batch_norm else axis_name)

    def losses(
        params: Any, statistics: Any, batch: Batch, positions: jax.Array, key: jax.Array, numbers: Numbers
    ) -> tuple[jax.Array, tuple[Any, Sums]]:
        (logits, auxiliary), new = network.apply(
            {"params": params, "batch_stats": statistics},
            batch.images,
            train=True,
            drop_path=numbers["drop_path"] if problem.drop_path else None,
            positions=positions,
            rngs={"drop_path": key},
            mutable=["batch_stats"],
        )
        loss = smoothed_cross_entropy(logits, batch.labels, problem.label_smoothing)
        metrics = {"train_loss": loss, "train_accuracy": accuracy(logits, batch.labels)}
        if auxiliary is not None:
            metrics["train_auxiliary_loss"] = smoothed_cross_entropy(auxiliary, batch.labels, problem.label_smoothing)
            loss = loss + problem.auxiliary_weight * metrics["train_auxiliary_loss"]
        return loss, (new["batch_stats"], metrics)

    tx = with_extra_arguments(problem.tx)

    def step(
        state: TrainState, batch: Batch, positions: jax.Array, key: jax.Array, numbers: Numbers
    ) -> tuple[TrainState, Sums]:
        params, statistics = state.variables
        rest = (statistics, batch, positions, key, numbers)
        (value, (statistics, metrics)), grads = jax.value_and_grad(losses, has_aux=True)(params, *rest)
        value, grads, metrics = mean_over(axis_name, (value, grads, metrics))
        if problem.local_batch_norm:
            statistics = mean_over(axis_name, statistics)
        metrics["gradient_norm/weights"] = optax.global_norm(grads)
        opt = set_learning_rate(state.opt, numbers["learning_rate"])
        extra = {"value": value, "grad": grads, "value_fn": lambda p: mean_over(axis_name, losses(p, *rest)[0])}
        updates, opt = tx.update(grads, opt, params, **extra)
        variables = Variables(optax.apply_updates(params, updates), statistics)
        ema = None if state.ema is None else average(state.ema, variables, problem.ema)
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return dataclasses.replace(state, step=state.step + 1, variables=variables, opt=opt, ema=ema), metrics

    return step


def metric_names(problem: TrainProblem) -> tuple[str, ...]:
    """What a step of `make_step` reports. Tracing one to learn it takes most of the time of an initialisation."""
    auxiliary = ("train_auxiliary_loss",) if problem.network.auxiliary else ()
    return ("train_loss", "train_accuracy", "gradient_norm/weights", *auxiliary)


def _initial(problem: TrainProblem, image: tuple[int, ...]) -> Callable[[jax.Array], TrainCarry]:
    def program(key: jax.Array) -> TrainCarry:
        images = jnp.zeros((2, *image), problem.network.dtype)
        made = problem.network.init(key, images)
        variables = Variables(made["params"], made["batch_stats"])
        # Of its own memory: the state is donated, and a buffer can be donated only once.
        ema = jax.tree.map(jnp.copy, variables) if problem.ema else None
        state = TrainState(jnp.zeros((), jnp.int32), variables, problem.tx.init(variables.params), ema)
        return TrainCarry(state, {name: jnp.zeros((), jnp.float32) for name in metric_names(problem)})

    return program


def initial_carry(problem: TrainProblem, mesh: Mesh, key: jax.Array, image: tuple[int, ...]) -> TrainCarry:
    """The carry before the first step, on all devices of the mesh.

    Args:
      problem, mesh: static.
      key: base key of the training.
      image: (H, W, C) of the data.
    """
    return sharding.replicate(mesh, jax.jit(_initial(problem, image), compiler_options=_ONCE)(key))


def abstract_carry(problem: TrainProblem, mesh: Mesh, key: jax.Array, image: tuple[int, ...]) -> TrainCarry:
    """Shapes, dtypes and shardings of the carry: what a checkpoint is restored into, without computing anything."""
    return on_mesh(mesh, jax.eval_shape(_initial(problem, image), key))


def make_dispatch(
    problem: TrainProblem, mesh: Mesh, *, streamed: bool = False, lowering: Lowering | None = None
) -> Callable[..., tuple[TrainCarry, Sums]]:
    """The jitted program (carry, count, fresh, batches, positions, key, numbers, *data) -> (carry, rows).

    It runs `count` steps on the first `count` of S batches: those of `batches` int32[S,B], indices into the one `data`,
    `Images` on the devices; or, streamed, `batches` themselves, a tuple of S `Images` of uint8[B,H,W,C] and int32[B],
    without `data`. `fresh` starts the sums of an epoch; `positions` int32[B] are the places in the global batch, 0..B-1
    (split over the devices with the batch). `rows` holds each metric of each step, float32[S]. The carry is donated.
    `lowering`: default that of the mesh; another one where the program is exported for other platforms.
    """
    step = make_step(problem, sharding.axis_of(mesh), lowering or sharding.lowering_of(mesh))

    def program(
        carry: TrainCarry,
        count: jax.Array,
        fresh: jax.Array,
        batches: Any,
        positions: jax.Array,
        key: jax.Array,
        numbers: Numbers,
        *data: Images,
    ) -> tuple[TrainCarry, Sums]:
        images, labels = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches) if streamed else data[0]

        def one(i: jax.Array, state: TrainState) -> tuple[TrainState, Sums]:
            index = i if streamed else batches[i]
            keys = [jax.random.fold_in(jax.random.fold_in(key, state.step), purpose) for purpose in range(2)]
            seen = load_images(
                keys[_AUGMENT],
                images[index],
                positions,
                data=problem.data,
                mean=problem.mean,
                std=problem.std,
                dtype=problem.network.dtype,
            )
            return step(state, Batch(seen, labels[index]), positions, keys[_DROP_PATH], numbers)

        length = len(batches)
        state, sums, rows = run_steps(one, carry.state, carry.sums, count=count, fresh=fresh, length=length)
        return TrainCarry(state, sums), rows

    everywhere, batch = sharding.REPLICATED, PartitionSpec(sharding.AXIS)
    each = batch if streamed else PartitionSpec(None, sharding.AXIS)
    in_specs = (
        everywhere,
        everywhere,
        everywhere,
        each,
        batch,
        everywhere,
        everywhere,
        *(() if streamed else (everywhere,)),
    )
    mapped = sharding.map_over(mesh, at_precision(problem.precision, program), in_specs, (everywhere, everywhere))
    return jax.jit(mapped, donate_argnums=0)


class Outputs(NamedTuple):
    """What is measured on each image; S batches of B."""

    loss: Any  # float32[S,B], cross-entropy in nats, without label smoothing
    rank: Any  # int32[S,B], how many classes are put before the true one (ties: in their order); 0 = right
    confidence: Any  # float32[S,B], the largest probability


def outputs(logits: jax.Array, labels: jax.Array) -> Outputs:
    """Loss, rank of the true class and confidence of each image, from float32[B,K] and int32[B].

    >>> outputs(jnp.asarray([[1.0, 3.0, 2.0]]), jnp.asarray([2])).rank.tolist()
    [1]
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    before = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    return Outputs(
        optax.softmax_cross_entropy_with_integer_labels(logits, labels),
        jnp.sum(ahead, axis=1, dtype=jnp.int32),
        jnp.max(jax.nn.softmax(logits, axis=1), axis=1),
    )


def make_evaluation(problem: TrainProblem, mesh: Mesh, *, streamed: bool = False) -> Callable[..., Outputs]:
    """The jitted program (variables, indices int32[S,B], data) -> Outputs, with running statistics and no augmentation.

    Streamed: (variables, one batch of `Images`) -> Outputs of [B]. An image's figures do not depend on the others of
    its batch, so nothing is summed here: the caller drops what pads the last batch.
    """
    network = _lowered(problem.network, sharding.lowering_of(mesh), auxiliary=False)
    predict = at_precision(problem.precision, network.apply)

    def measure(variables: Variables, data: Images) -> Outputs:
        seen = normalize(data.images, problem.mean, problem.std, network.dtype)
        logits, _ = predict({"params": variables.params, "batch_stats": variables.batch_stats}, seen)
        return outputs(logits, data.labels)

    def program(variables: Variables, indices: jax.Array, data: Images) -> Outputs:
        return lax.map(lambda index: measure(variables, Images(data.images[index], data.labels[index])), indices)

    everywhere, batch, batches = (
        sharding.REPLICATED,
        PartitionSpec(sharding.AXIS),
        PartitionSpec(None, sharding.AXIS),
    )
    if streamed:
        return jax.jit(sharding.map_over(mesh, measure, (everywhere, batch), batch))
    return jax.jit(sharding.map_over(mesh, program, (everywhere, batches, everywhere), batches))
