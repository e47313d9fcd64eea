"""What feeds a training: images that lie on the devices, or batches that are read while the step before is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data import prefetch
from prdarts_jax.data.batches import Images, epoch_order
from prdarts_jax.data.sources import Dataset
from prdarts_jax.data.stream_source import StreamedDataset
from prdarts_jax.devices import sharding
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program
from prdarts_jax.training.evaluation import Figures, measure, measure_streamed
from prdarts_jax.training.inputs import Inputs
from prdarts_jax.training.program import Carry, Sums, Variables


class Programs(NamedTuple):
    """Compiled once for all the seeds."""

    dispatch: Callable[..., tuple[Carry, Sums]]
    evaluation: Callable[..., train_program.Outputs]


class Feed(Protocol):
    """The data of one start of a training."""

    def open(self, step: int) -> None:
        """Called once, with the step the training goes on from."""

    def order(self, epoch: int) -> np.ndarray:
        """int32[S,B'] a row a step, handed back to `dispatch` in the pieces of the dispatches."""

    def dispatch(
        self,
        carry: Carry,
        count: np.int32,
        fresh: np.bool_,
        order: np.ndarray,
        progress: Mapping[str, np.float32],
    ) -> tuple[Carry, Sums]:
        """The next `count` steps, see `train_program.make_dispatch`."""

    def measure(self, variables: Variables) -> Figures:
        """The figures of weights on the test images."""


def make_programs(inputs: Inputs) -> Programs:
    """The programs of a training, by the kind of its data."""
    if isinstance(inputs.dataset, StreamedDataset):
        return Programs(
            train_program.make_streamed_dispatch(inputs.problem, inputs.mesh),
            train_program.make_streamed_evaluation(inputs.problem, inputs.mesh),
        )
    return Programs(
        train_program.make_dispatch(inputs.problem, inputs.mesh),
        train_program.make_evaluation(inputs.problem, inputs.mesh),
    )


def _positions(mesh: Mesh, batch_size: int) -> Any:
    """The places in the global batch, split as it is."""
    return sharding.place(mesh, np.arange(batch_size, dtype=np.int32), PartitionSpec(sharding.AXIS))


@contextlib.contextmanager
def feed(config: TrainConfig, inputs: Inputs, programs: Programs) -> Iterator[Feed]:
    """The feed of a training; its threads and processes end with the context."""
    with contextlib.ExitStack() as stack:
        dataset = inputs.dataset
        if isinstance(dataset, StreamedDataset):
            yield _Streamed(config, inputs, dataset, programs, stack)
        else:
            yield _Resident(config, inputs, dataset, programs)


class _Resident:
    """All images on all devices."""

    def __init__(self, config: TrainConfig, inputs: Inputs, dataset: Dataset, programs: Programs) -> None:
        self.config, self.mesh, self.dataset, self.programs = config, inputs.mesh, dataset, programs
        self.indices = train_inputs.examples(config, dataset.train_size)
        self.positions = _positions(inputs.mesh, config.batch_size)
        self.key = jax.random.key(config.seed)

    def open(self, step: int) -> None:
        del step
        data = self.dataset
        self.data = sharding.replicate(self.mesh, Images(data.train_images, data.train_labels))
        self.test = sharding.replicate(self.mesh, Images(data.test_images, data.test_labels))

    def order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.indices, self.config.batch_size, self.config.seed, epoch, "train")

    def dispatch(
        self, carry: Carry, count: np.int32, fresh: np.bool_, order: np.ndarray, progress: Mapping[str, np.float32]
    ) -> tuple[Carry, Sums]:
        return self.programs.dispatch(carry, count, fresh, order, self.positions, self.key, progress, self.data)

    def measure(self, variables: Variables) -> Figures:
        def program(variables: Variables, order: np.ndarray, data: Images) -> train_program.Outputs:
            placed = sharding.place(self.mesh, order, PartitionSpec(None, sharding.AXIS))
            return self.programs.evaluation(variables, placed, data)

        return measure(
            program,
            variables,
            self.test,
            self.dataset.test_labels,
            batch_size=self.config.batch_size,
            classes=self.dataset.num_classes,
        )


class _Streamed:
    """Batches from disk, on their way to the devices while the steps before them are computed."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        dataset: StreamedDataset,
        programs: Programs,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.mesh, self.dataset, self.programs, self.stack = config, inputs.mesh, dataset, programs, stack
        self.positions = _positions(inputs.mesh, config.batch_size)
        self.key = jax.random.key(config.seed)
        self.workers = prefetch.worker_count(config.run.workers)
        self.train = prefetch.train_batches(
            dataset,
            config.data,
            train_inputs.examples(config, dataset.train_size),
            batch_size=config.batch_size,
            epochs=config.epochs,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.items: Iterator[Images] = iter(())

    def _place(self, batch: Images) -> Images:
        return sharding.split_batch(self.mesh, batch)

    def open(self, step: int) -> None:
        if step == len(self.train):
            return
        # A dispatch ahead: while one is computed, the batches of the next one arrive.
        ahead = min(self.config.run.steps_per_dispatch, self.train.epoch_steps)
        waiting = prefetch.prefetched(self.train, self._place, workers=self.workers, ahead=ahead, start=step)
        self.items = self.stack.enter_context(waiting)

    def order(self, epoch: int) -> np.ndarray:
        del epoch  # the batches come one after the other, from the step that `open` is told
        return np.zeros((self.train.epoch_steps, self.config.batch_size), np.int32)

    def dispatch(
        self, carry: Carry, count: np.int32, fresh: np.bool_, order: np.ndarray, progress: Mapping[str, np.float32]
    ) -> tuple[Carry, Sums]:
        found = [next(self.items) for _ in range(int(count))]
        # The program has one number of batches; the loop never reaches the repeated ones.
        found += found[:1] * (len(order) - len(found))
        return self.programs.dispatch(carry, count, fresh, tuple(found), self.positions, self.key, progress)

    def measure(self, variables: Variables) -> Figures:
        found = prefetch.test_batches(
            self.dataset,
            self.config.data,
            batch_size=self.config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return measure_streamed(
            self.programs.evaluation,
            variables,
            found,
            self.mesh,
            workers=self.workers,
            classes=self.dataset.num_classes,
        )
