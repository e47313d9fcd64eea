"""The dispatches of a search and of a training, compiled for devices that are not here, as rows of figures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prdarts_jax.accelerators.compiled import Program
from prdarts_jax.accelerators.targets import Target, devices
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data.batches import Images, check_batch
from prdarts_jax.data.sources import Dataset, load
from prdarts_jax.devices import sharding
from prdarts_jax.errors import brief
from prdarts_jax.searching import inputs as search_inputs
from prdarts_jax.searching import program as search_program
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program

Row = dict[str, Any]
MIB = 2**20
# Sets that need not be here: training and test images, (H, W, C), classes.
_SIZES = {
    "digits": (1437, 360, (8, 8, 1), 10),
    "tfds:cifar10": (50_000, 10_000, (32, 32, 3), 10),
    "tfds:cifar100": (50_000, 10_000, (32, 32, 3), 100),
}
# XLA:TPU takes many times as long at its default effort. Cycles are those of this one: they compare whole programs.
_OPTIONS: dict[str, dict[str, Any]] = {"tpu": {"exec_time_optimization_effort": -1.0}}


class Dispatch(NamedTuple):
    """A jitted program of several steps, and its arguments as shapes that lie on the devices of a mesh."""

    program: Callable[..., Any]
    arguments: tuple[Any, ...]

    def lower(self) -> Any:
        """`jax.stages.Lowered`."""
        return self.program.lower(*self.arguments)  # type: ignore[attr-defined]


def stand_in(source: str, data_dir: str | None = None) -> Dataset:
    """The images of a source, or for digits and CIFAR, which need not be here, black ones that take no memory.

    >>> stand_in("tfds:cifar10").image
    (32, 32, 3)
    """
    if source not in _SIZES:
        return load(source, data_dir)
    train, test, image, classes = _SIZES[source]

    def images(count: int) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), (count, *image))

    def labels(count: int) -> np.ndarray:
        return np.broadcast_to(np.int32(0), (count,))

    names = tuple(map(str, range(classes)))
    arrays = (images(train), labels(train), images(test), labels(test))
    channels = image[2]
    return Dataset(source, *arrays, names, (0.5,) * channels, (0.25,) * channels, digest="")


class _Shapes:
    """Makes abstract arrays on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __call__(self, shape: tuple[int, ...], dtype: Any, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self._mesh, PartitionSpec(*spec)))


def _arguments(mesh: Mesh, carry: Any, orders: Any, batch: int, numbers: Any, images: np.ndarray) -> tuple[Any, ...]:
    """(carry, count, fresh, orders, positions, key, numbers, data) of a dispatch."""
    shape = _Shapes(mesh)
    data = Images(shape(images.shape, images.dtype), shape(images.shape[:1], jnp.int32))
    names = {name: shape((), jnp.float32) for name in numbers}
    key = shape((), jax.random.key(0).dtype)
    positions = shape((batch,), jnp.int32, sharding.AXIS)
    return carry, shape((), jnp.int32), shape((), jnp.bool_), orders, positions, key, names, data


def search_dispatch(config: SearchConfig, mesh: Mesh, data: Dataset) -> Dispatch:
    """The dispatch of a search as `prdarts search` compiles it.

    Args:
      config: of the search; `run.devices` is not looked at.
      mesh: of any devices.
      data: of which the shapes count.

    Raises:
      UserError: what is not possible, named by its field.
    """
    check_batch(config.batch_size, min(map(len, search_inputs.halves(config, data.train_size))), mesh.size)
    alone = dataclasses.replace(config, run=dataclasses.replace(config.run, devices="1"))
    problem = search_inputs.prepare(alone, data=data).problem
    schedule = problem.strategy.schedule(0, config.epochs) | {"weight_learning_rate": 0.0, "arch_learning_rate": 0.0}
    numbers = {name: np.float32(value) for name, value in schedule.items()}
    carry = search_program.abstract_carry(problem, mesh, jax.random.key(0), numbers, data.image)
    order = _Shapes(mesh)((config.run.steps_per_dispatch, config.batch_size), jnp.int32, None, sharding.AXIS)
    orders = search_program.Orders(order, order)
    arguments = _arguments(mesh, carry, orders, config.batch_size, numbers, data.train_images)
    return Dispatch(search_program.make_dispatch(problem, mesh), arguments)


def train_dispatch(config: TrainConfig, genotype: Genotype, mesh: Mesh, data: Dataset) -> Dispatch:
    """The dispatch of a training on images in memory, as `prdarts train` compiles it; see `search_dispatch`."""
    check_batch(config.batch_size, len(train_inputs.examples(config, data.train_size)), mesh.size)
    alone = dataclasses.replace(config, run=dataclasses.replace(config.run, devices="1"))
    problem = train_inputs.prepare(alone, genotype, data=data).problem
    carry = train_program.abstract_carry(problem, mesh, jax.random.key(0), data.image)
    order = _Shapes(mesh)((config.run.steps_per_dispatch, config.batch_size), jnp.int32, None, sharding.AXIS)
    numbers = ("learning_rate", "drop_path")
    arguments = _arguments(mesh, carry, order, config.batch_size, numbers, data.train_images)
    return Dispatch(train_program.make_dispatch(problem, mesh), arguments)


def compiled_row(dispatch: Dispatch, platform: str) -> Row:
    """The figures of a compiled dispatch; those of a step are means over the branches that it may take.

    Returns:
      compile_s: CPU seconds of the compiler.
      temp_mib, memory_mib: of each device: what is computed on the way; with arguments, results and code.
      launches_per_step, conditionals_per_step, all_reduces_per_step (all collectives), bytes_per_step, cycles_per_step
      (TPU; else None): see `compiled.Counts`.
      cpu_kernels: calls of CPU kernels in the program: 0.
      failure: of the compiler, in place of all others.
    """
    lowered, began = dispatch.lower(), time.process_time()
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS.get(platform))
    except jax.errors.JaxRuntimeError as error:  # out of memory, say
        return {"failure": brief(error)}
    spent, memory = time.process_time() - began, compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    program = Program(compiled.as_text())
    step = program.step()
    return {
        "compile_s": round(spent, 1),
        "temp_mib": round(memory.temp_size_in_bytes / MIB, 1),
        "memory_mib": round(whole / MIB, 1),
        "launches_per_step": round(step.launches),
        "conditionals_per_step": round(step.conditionals),
        "all_reduces_per_step": round(step.exchanges),
        "bytes_per_step": round(step.bytes),
        "cycles_per_step": round(step.cycles) if platform == "tpu" else None,
        "cpu_kernels": program.custom_calls("prdarts_"),
    }


def search_row(target: Target, config: SearchConfig, data: Dataset) -> Row:
    """The row of the dispatch of a search for a target: what it is of, `device_mib`, and its figures.

    Raises:
      UserError: what is not possible, the target or the search.
    """
    mesh = sharding.make_mesh(devices(target))
    return _row(target, "search", config, search_dispatch(config, mesh, data))


def train_row(target: Target, config: TrainConfig, genotype: Genotype, data: Dataset) -> Row:
    """The row of the dispatch of a training; as `search_row`."""
    mesh = sharding.make_mesh(devices(target))
    return _row(target, "train", config, train_dispatch(config, genotype, mesh, data))


def _row(target: Target, program: str, config: SearchConfig | TrainConfig, dispatch: Dispatch) -> Row:
    head = {"target": str(target), "program": program, "batch": config.batch_size, "dtype": config.dtype}
    return {**head, "device_mib": target.memory // MIB, **compiled_row(dispatch, target.platform)}


def fits(row: Row) -> bool:
    """Whether the program of a row has room on each device.

    >>> fits({"memory_mib": 10, "device_mib": 9}), fits({"failure": "RESOURCE_EXHAUSTED"})
    (False, False)
    """
    return "failure" not in row and row["memory_mib"] <= row["device_mib"]
