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
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass
from multiprocessing import connection, get_context, synchronize
from typing import Any, NamedTuple, Protocol

import numpy as np

from prdarts_jax.config.train import TrainDataConfig
from prdarts_jax.data.batches import epoch_order, padded_batches, process_slice
from prdarts_jax.data.records import Records
from prdarts_jax.data.stream_source import StreamedDataset
from prdarts_jax.data.tfds_source import reason
from prdarts_jax.data.transforms import Jitter, draw, for_test, for_training
from prdarts_jax.errors import RunError, UserError

_MOST_WORKERS = 16


class Batch(NamedTuple):
    """The images of a batch that this process reads."""

    images: Any  # uint8 [B, H, W, C]
    labels: Any  # int32 [B]


class Batches(Protocol):
    """A sequence of batches, each computed when it is asked for."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
          UserError: an image that cannot be read.
        """


@dataclass(frozen=True)
class TrainBatches:
    """The batches of all epochs, one after the other; step s is that of epoch s // S, S = floor(n / B).

    Process p of P reads positions p B/P .. (p+1) B/P - 1 of each global batch.
    """

    records: Records
    image: tuple[int, int, int]  # (H, W, C) of a batch
    indices: np.ndarray  # int [n], the examples that are used
    batch_size: int  # global, B
    epochs: int
    seed: int
    data: TrainDataConfig
    process_index: int = 0
    process_count: int = 1

    @property
    def epoch_steps(self) -> int:
        """S."""
        return len(self.indices) // self.batch_size

    def __len__(self) -> int:
        return self.epochs * self.epoch_steps

    def __getitem__(self, step: int) -> Batch:
        """See `Batches`."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch, step = divmod(int(step), self.epoch_steps)
        # Made again for each batch: a million indices take milliseconds, decoding a batch takes seconds.
        order = epoch_order(self.indices, self.batch_size, self.seed, epoch, "train")[step : step + 1]
        positions = np.arange(self.batch_size)[None]
        own, positions = (process_slice(rows, self.process_index, self.process_count)[0] for rows in (order, positions))
        return _batch(
            self.records,
            self.image,
            own,
            lambda image, i: self._transform(image, epoch, step * self.batch_size + int(positions[i])),
        )

    def _transform(self, image: Any, epoch: int, place: int) -> np.ndarray:
        data = self.data
        if not data.image_size:
            return np.asarray(image)
        strengths = Jitter(data.brightness, data.contrast, data.saturation, data.hue)
        draws = draw(self.seed, epoch, place)
        return for_training(image, draws, data.image_size, smallest=data.min_area, strengths=strengths)


@dataclass(frozen=True)
class TestBatches:
    """Every test image exactly once, in order; the last batch is filled up from the front (see `padded_batches`)."""

    records: Records
    image: tuple[int, int, int]
    batch_size: int  # global
    data: TrainDataConfig
    process_index: int = 0
    process_count: int = 1

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        """See `Batches`."""
        order, _ = padded_batches(len(self.records), self.batch_size)
        own = process_slice(order, self.process_index, self.process_count)[int(step)]
        return _batch(self.records, self.image, own, lambda image, _: self._transform(image))

    def _transform(self, image: Any) -> np.ndarray:
        size = self.data.image_size
        return for_test(image, size, self.data.shorter_side) if size else np.asarray(image)


def _batch(
    records: Records, shape: tuple[int, int, int], indices: np.ndarray, transform: Callable[[Any, int], np.ndarray]
) -> Batch:
    images, labels = np.empty((len(indices), *shape), np.uint8), np.empty(len(indices), np.int32)
    for i, index in enumerate(indices.tolist()):
        try:
            image, labels[i] = records.read(index)
            pixels = transform(image, i)
        except UserError:
            raise
        except Exception as error:
            raise _failed(records.name(index), error) from error
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if pixels.shape != shape:
            raise UserError(
                f"{records.name(index)}: image {list(pixels.shape)}, others are {list(shape)}; "
                "allowed: one size for all images, or data.image_size"
            )
        images[i] = pixels
    return Batch(images, labels)


def _failed(where: str, error: Exception) -> RunError:
    return RunError(f"{where}: {type(error).__name__} ({reason(error)}); what was saved is kept")


@dataclass(frozen=True)
class _Guarded:
    """Batches whose errors are one line of text: an error that pickle refuses never leaves its worker."""

    batches: Batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        try:
            return self.batches[step]
        except (UserError, RunError):
            raise
        except Exception as error:
            raise _failed(f"batch {step}", error) from error


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
    return TrainBatches(
        dataset.train, dataset.image, indices, batch_size, epochs, seed, data, process_index, process_count
    )


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
    place: Callable[[Batch], Any],
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

    with contextlib.ExitStack() as stack:
        source: Batches = _Guarded(batches)
        if workers:
            source = stack.enter_context(_in_processes(source, workers))
        # With workers the threads only wait for them: one more, so that a worker finds its next batch asked for.
        threads = workers + 1 if workers else cores()
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        read = grain.MapDataset.source(source)[start:].to_iter_dataset(options).map(place)
        iterator = iter(grain.experimental.ThreadPrefetchIterDataset(read, prefetch_buffer_size=ahead))
        items = _items(iterator)
        try:
            yield items
        finally:
            items.close()  # drops its reference: grain complains when the interpreter collects an iterator at its end
            iterator.close()


def _items(iterator: Iterator[Any]) -> Generator[Any, None, None]:
    yield from iterator


# --- worker processes -------------------------------------------------------------------------------------------------

_own: ContextVar[Batches] = ContextVar("the batches of a worker process")


@dataclass(frozen=True)
class _Remote:
    """Batches that worker processes compute."""

    pool: ProcessPoolExecutor
    count: int
    end: connection.Connection  # closing it ends the workers at once

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Batch:
        try:
            return self.pool.submit(_compute, int(step)).result()
        except BrokenProcessPool as error:
            self.end.close()  # the pool sends SIGTERM to those that are left, which they ignore, and waits for them
            raise RunError(
                "run.workers: a worker process did not start or was ended from outside; what was saved is kept, and "
                "the same command goes on from there (fewer workers need less memory; a script that trains with "
                "workers needs `if __name__ == '__main__':`)"
            ) from error


@contextlib.contextmanager
def _in_processes(batches: Batches, workers: int) -> Iterator[_Remote]:
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
    try:
        yield _Remote(pool, len(batches), end)
    finally:
        pool.shutdown(cancel_futures=True)
        received.close()
        sender.join()
        for each in (sent, ended, end):
            each.close()


def _compute(step: int) -> Batch:
    return _own.get()[step]


def _begin_worker(received: connection.Connection, turn: synchronize.Lock, ended: connection.Connection) -> None:
    """A worker leaves the signals of its group to the main process, and ends with it however it ends."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)

    def watch() -> None:
        connection.wait([ended])  # the other end is closed, also by kill -9 of the main process
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with turn:
        content = received.recv_bytes()
    _own.set(pickle.loads(content))
