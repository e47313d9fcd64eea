"""Streamed batches: read and decoded ahead of the step, in threads or in worker processes, in an order that is fixed.

A global batch is a function of (seed, epoch, step) alone. Workers share whole batches out among themselves, and every
random number belongs to a place in the epoch, so neither their number nor where a resumed run begins changes a bit.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, synchronize
from typing import TYPE_CHECKING, Any

import numpy as np

from prdarts_jax.config.train import TrainDataConfig
from prdarts_jax.data.batches import Images, epoch_order, padded_batches, process_slice
from prdarts_jax.data.records import Records, failure, read_images
from prdarts_jax.data.stream_source import StreamedDataset
from prdarts_jax.data.transforms import Jitter, draw, for_test, for_training
from prdarts_jax.errors import RunError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST_WORKERS = 16


@dataclass(frozen=True)
class Batches(ABC):
    """A sequence of batches, each read when it is asked for.

    Process p of P reads positions p B/P .. (p+1) B/P - 1 of each global batch.
    """

    records: Records
    image: tuple[int, int, int]  # (H, W, C) of an image of a batch
    batch_size: int  # global, B
    data: TrainDataConfig
    process_index: int = 0
    process_count: int = 1

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, step: int) -> Images:
        """The batch of a step: uint8 [B/P, H, W, C] and int32 [B/P].

        Raises:
          UserError: an image that cannot be read.
          RunError: any other error, in one line.
        """
        if not 0 <= step < len(self):
            raise IndexError(step)
        try:
            return self._read(int(step))
        except (UserError, RunError):
            raise
        except Exception as error:
            raise failure(f"batch {step}", error) from error

    @abstractmethod
    def _read(self, step: int) -> Images: ...


@dataclass(frozen=True)
class TrainBatches(Batches):
    """The batches of all epochs, one after the other; step s is that of epoch s // S, S = floor(n / B)."""

    indices: np.ndarray = field(kw_only=True)  # int [n], the examples that are used
    epochs: int = field(kw_only=True)
    seed: int = field(kw_only=True)

    @property
    def epoch_steps(self) -> int:
        """S."""
        return len(self.indices) // self.batch_size

    def __len__(self) -> int:
        return self.epochs * self.epoch_steps

    def _read(self, step: int) -> Images:
        epoch, step = divmod(step, self.epoch_steps)
        # Made again for each batch: a million indices take milliseconds, decoding a batch takes seconds.
        order = epoch_order(self.indices, self.batch_size, self.seed, epoch, "train")[step]
        rows = np.stack([order, step * self.batch_size + np.arange(self.batch_size)])
        own, places = process_slice(rows, self.process_index, self.process_count)
        data = self.data
        strengths = Jitter(data.brightness, data.contrast, data.saturation, data.hue)

        def transform(image: Image, i: int) -> np.ndarray:
            draws = draw(self.seed, epoch, int(places[i]))
            return for_training(image, draws, data.image_size, smallest=data.min_area, strengths=strengths)

        return read_images(self.records, self.image, own, transform if data.image_size else None)


@dataclass(frozen=True)
class TestBatches(Batches):
    """Every test image exactly once, in order; the last batch is filled up from the front (see `padded_batches`)."""

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch_size)

    def _read(self, step: int) -> Images:
        order, _ = padded_batches(len(self.records), self.batch_size)
        own = process_slice(order, self.process_index, self.process_count)[step]
        data = self.data

        def transform(image: Image, _: int) -> np.ndarray:
            return for_test(image, data.image_size, data.shorter_side)

        return read_images(self.records, self.image, own, transform if data.image_size else None)


def train_batches(
    dataset: StreamedDataset,
    data: TrainDataConfig,
    indices: np.ndarray,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """The training batches of a set, see `TrainBatches`."""
    shared = (dataset.train, dataset.image, batch_size, data, process_index, process_count)
    return TrainBatches(*shared, indices=indices, epochs=epochs, seed=seed)


def test_batches(
    dataset: StreamedDataset,
    data: TrainDataConfig,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TestBatches:
    """The test batches of a set, see `TestBatches`."""
    return TestBatches(dataset.test, dataset.image, batch_size, data, process_index, process_count)


def worker_count(workers: str) -> int:
    """Worker processes of `run.workers`: auto is one a core but for the first, at most 16.

    >>> worker_count("3")
    3
    """
    return min(cores() - 1, _MOST_WORKERS) if workers == "auto" else int(workers)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def prefetched(
    batches: Batches,
    place: Callable[[Images], Any],
    *,
    workers: int,
    ahead: int = 2,
    start: int = 0,
) -> Iterator[Generator[Any, None, None]]:
    """The batches from `start` on, each handed to `place` in a thread before it is asked for.

    Args:
      batches: computed in threads of this process, or in `workers` others.
      place: puts a batch on the devices.
      workers: processes; 0 = threads of this process alone.
      ahead: placed batches that wait for the step.
      start: the first one.

    Yields:
      An iterator; an error of a batch is raised where its turn comes.

    Raises:
      UserError: an image that cannot be read.
      RunError: any other error of a batch, or a worker that something ended.
    """
    import grain

    reading = _in_processes(batches, workers) if workers else contextlib.nullcontext(batches.__getitem__)
    with reading as read:
        # With workers the threads only wait for them: one more, so that a worker finds its next batch asked for.
        threads = workers + 1 if workers else cores()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        steps = grain.MapDataset.range(start, len(batches))
        placed = steps.map(read).to_iter_dataset(options).map(place)
        iterator = iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=ahead))
        # grain complains when the interpreter collects one of its iterators at its end: the caller, who may keep what
        # he is given, gets a generator, which lets go of the iterator when it is closed.
        with contextlib.closing(iterator), contextlib.closing(item for item in iterator) as items:
            yield items


# --- worker processes -------------------------------------------------------------------------------------------------

_own: ContextVar[Batches] = ContextVar("the batches of a worker process")


@contextlib.contextmanager
def _in_processes(batches: Batches, workers: int) -> Iterator[Callable[[int], Images]]:
    """What reads the batch of a step in one of the worker processes."""
    # Not the workers of grain: when a stream is left early, one that has a large batch on its way blocks in the pipe,
    # and is waited for for 25 s, each after the other. Here a thread always reads what they send. Spawned, since a
    # fork of a process that has the threads of XLA may deadlock.
    context = get_context("spawn")
    ended, end = context.Pipe(duplex=False)
    received, sent = context.Pipe(duplex=False)
    content = pickle.dumps(batches)

    def send() -> None:
        with contextlib.suppress(OSError):  # nobody is left to read
            for _ in range(workers):
                sent.send_bytes(content)

    # Not as an argument of the workers: where one ends before it has read its arguments, who starts it waits forever.
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (received, context.Lock(), ended))

    def read(step: int) -> Images:
        try:
            return pool.submit(_compute, int(step)).result()
        except BrokenProcessPool as error:
            end.close()  # the pool sends SIGTERM to those that are left, which they ignore, and waits for them
            raise RunError(
                "run.workers: a worker process did not start or was ended from outside; what was saved is kept, and "
                "the same command goes on from there (fewer workers need less memory; a script that trains with "
                "workers needs `if __name__ == '__main__':`)"
            ) from error

    try:
        yield read
    finally:
        pool.shutdown(cancel_futures=True)
        received.close()
        sender.join()
        for each in (sent, ended, end):
            each.close()


def _compute(step: int) -> Images:
    return _own.get()[step]


def _begin_worker(received: connection.Connection, turn: synchronize.Lock, ended: connection.Connection) -> None:
    """A worker leaves the signals of its group to the main process, and ends with it however it ends."""
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(which, signal.SIG_IGN)

    def watch() -> None:
        connection.wait([ended])  # the other end is closed, also by kill -9 of the main process
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with turn:
        content = received.recv_bytes()
    _own.set(pickle.loads(content))
