"""What feeds a training: images that lie on the devices, or batches that are read while the step before is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data import prefetch
from prdarts_jax.data.batches import Images, epoch_order
from prdarts_jax.data.stream_source import StreamedDataset
from prdarts_jax.devices import sharding
from prdarts_jax.run.loop import Numbers
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program
from prdarts_jax.training.inputs import TrainInputs
from prdarts_jax.training.program import Outputs, Sums, TrainCarry


class TrainPrograms(NamedTuple):
    """Compiled once for all the seeds."""

    dispatch: Callable[..., tuple[TrainCarry, Sums]]
    evaluation: Callable[..., Outputs]


def make_programs(inputs: TrainInputs) -> TrainPrograms:
    """The programs of a training, by the kind of its data."""
    streamed = isinstance(inputs.dataset, StreamedDataset)
    return TrainPrograms(
        train_program.make_dispatch(inputs.problem, inputs.mesh, streamed=streamed),
        train_program.make_evaluation(inputs.problem, inputs.mesh, streamed=streamed),
    )


class ResidentFeed:
    """All training images on all devices; an epoch is its order."""

    def __init__(self, config: TrainConfig, inputs: TrainInputs, programs: TrainPrograms) -> None:
        self.config, self.inputs, self.program = config, inputs, programs.dispatch
        self.indices = train_inputs.examples(config, inputs.dataset.train_size)
        positions = np.arange(config.batch_size, dtype=np.int32)
        self.positions = sharding.place(inputs.mesh, positions, PartitionSpec(sharding.AXIS))
        self.key = jax.random.key(config.seed)

    def open(self, step: int) -> None:
        """Called once, with the step the training goes on from."""
        del step
        dataset: Any = self.inputs.dataset
        self.data = sharding.replicate(self.inputs.mesh, Images(dataset.train_images, dataset.train_labels))

    def order(self, epoch: int) -> np.ndarray:
        """int32[S,B], a row a step, handed back to `dispatch` in the pieces of the dispatches."""
        return epoch_order(self.indices, self.config.batch_size, self.config.seed, epoch, "train")

    def dispatch(
        self, carry: TrainCarry, count: np.int32, fresh: np.bool_, order: np.ndarray, numbers: Numbers
    ) -> tuple[TrainCarry, Sums]:
        """The next `count` steps, see `train_program.make_dispatch`."""
        return self.program(carry, count, fresh, order, self.positions, self.key, numbers, self.data)


class StreamedFeed(ResidentFeed):
    """Batches from disk, on their way to the devices while the steps before them are computed."""

    def __init__(
        self, config: TrainConfig, inputs: TrainInputs, programs: TrainPrograms, stack: contextlib.ExitStack
    ) -> None:
        super().__init__(config, inputs, programs)
        self.stack = stack
        self.items: Iterator[Images] = iter(())
        assert isinstance(inputs.dataset, StreamedDataset)
        self.train = prefetch.train_batches(
            inputs.dataset,
            config.data,
            self.indices,
            batch_size=config.batch_size,
            epochs=config.epochs,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def open(self, step: int) -> None:
        """Begins to read, a dispatch ahead: while one is computed, the batches of the next one arrive."""
        if step < len(self.train):
            ahead = min(self.config.run.steps_per_dispatch, self.train.epoch_steps)
            workers = prefetch.worker_count(self.config.run.workers)
            waiting = prefetch.prefetched(self.train, self._place, workers=workers, ahead=ahead, start=step)
            self.items = self.stack.enter_context(waiting)

    def _place(self, batch: Images) -> Images:
        return sharding.split_batch(self.inputs.mesh, batch)

    def order(self, epoch: int) -> np.ndarray:
        """Of the right shape and no other meaning: the batches come one after the other, from the step of `open`."""
        del epoch
        return np.zeros((self.train.epoch_steps, self.config.batch_size), np.int32)

    def dispatch(
        self, carry: TrainCarry, count: np.int32, fresh: np.bool_, order: np.ndarray, numbers: Numbers
    ) -> tuple[TrainCarry, Sums]:
        """The next `count` steps on the batches that have arrived."""
        batches = [next(self.items) for _ in range(int(count))]
        # The program has one number of batches; the loop never reaches the repeated ones.
        batches += batches[:1] * (len(order) - len(batches))
        return self.program(carry, count, fresh, tuple(batches), self.positions, self.key, numbers)


@contextlib.contextmanager
def feed(config: TrainConfig, inputs: TrainInputs, programs: TrainPrograms) -> Iterator[ResidentFeed]:
    """The feed of a training; its threads and processes end with the context."""
    with contextlib.ExitStack() as stack:
        if isinstance(inputs.dataset, StreamedDataset):
            yield StreamedFeed(config, inputs, programs, stack)
        else:
            yield ResidentFeed(config, inputs, programs)
