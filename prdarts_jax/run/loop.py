"""A run as epochs of dispatches, for a search and a training alike: resume, logs, checkpoints, stops.

What a dispatch computes, which rows an epoch writes and how it ends is said by a subclass.
"""

from __future__ import annotations

import contextlib
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from prdarts_jax.config.search import RunConfig
from prdarts_jax.devices import processes, sharding
from prdarts_jax.run import provenance
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.metrics import MetricsLog, check_finite
from prdarts_jax.run.output import Steady
from prdarts_jax.run.progress import Progress
from prdarts_jax.run.signals import StopRequest

Carry = TypeVar("Carry")
Result = TypeVar("Result")
Numbers = Mapping[str, np.float32]  # what changes between epochs and enters the compiled steps


class Start(NamedTuple):
    """How a run is started: none of it changes what is computed."""

    run: RunConfig
    workdir: Path
    notes: IO[str] | None  # where lines for people go
    stop: StopRequest
    old: Mapping[str, Any] | None  # config.json of the run that is resumed
    document: Mapping[str, Any]  # config.json of now
    label: str = ""  # its name among the runs of one process
    compiled: bool = False  # whether a run of this process has compiled its program
    side_by_side: bool = False  # whether one program computes this run and others at once
    began: float | None = None  # time.monotonic() from which the time limit counts; None: when the run is made


class Work(NamedTuple):
    """A dispatch that a run asks for."""

    loop: Any  # the EpochLoop that asks
    carry: Any
    steps: np.int32
    fresh: np.bool_
    batches: Any
    numbers: Numbers

    def done(self) -> Done:
        """What the run wants back, computed by its own program."""
        return self.loop.dispatch(self.carry, self.steps, self.fresh, self.batches, self.numbers)


_OTHERWISE = "computed otherwise"


Done = tuple[Any, Mapping[str, Any]]  # (carry, each metric of each step)


def drive(run: Generator[Work, Done, Result]) -> Result:
    """Computes what a run asks for, dispatch by dispatch, until it ends; what it raises leaves this function."""
    with contextlib.closing(run):
        try:
            work = next(run)
            while True:
                work = run.send(work.done())
        except StopIteration as end:
            return end.value


class Speed(NamedTuple):
    """How fast an epoch is computed."""

    began: float  # time.monotonic() when the epoch began, in this process
    images: int = 0  # of the dispatches that did not compile
    seconds: float = 0.0  # of the same dispatches

    def fields(self) -> dict[str, float]:
        """The clock's fields of the epoch's row, as of now."""
        return {
            "time_epoch_s": time.monotonic() - self.began,
            "images_per_s": self.images / self.seconds if self.images else 0.0,
            "memory_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }


class EpochLoop(ABC, Generic[Carry, Result]):
    """One start of a run, from the restored (or first) step to the end, a stop, or the time limit."""

    noun: str  # what the run is called in notes
    horizon = 0  # epochs that `turn` may go back
    mesh: Mesh  # the devices it is computed on

    def __init__(self, start: Start, *, epochs: int, epoch_steps: int, images_per_step: int) -> None:
        self.start, self.workdir, self.notes = start, start.workdir, Steady(start.notes)
        self.epochs, self.epoch_steps, self.images_per_step = epochs, epoch_steps, images_per_step
        self.end = epochs  # the epoch before which the run ends; a subclass may move it
        self.began = time.monotonic() if start.began is None else start.began
        self._otherwise: dict[str, Any] = {}  # in the info of checkpoints: why the bits are not those of one start

    # What a subclass says.

    @abstractmethod
    def first(self) -> Carry:
        """The carry before the first step."""

    @abstractmethod
    def target(self, info: Mapping[str, Any]) -> Carry:
        """Shapes, dtypes and shardings of the carry in a checkpoint with this `info`."""

    @abstractmethod
    def open(self, step: int) -> None:
        """Called once, with the step the run goes on from, before anything is computed."""

    @abstractmethod
    def numbers(self, epoch: int) -> dict[str, float]:
        """What changes between epochs and enters the compiled steps: learning rates, a temperature."""

    @abstractmethod
    def batches(self, epoch: int) -> Any:
        """A tree of int32[S,B]: the global batches of an epoch, as indices."""

    @abstractmethod
    def dispatch(
        self, carry: Carry, count: np.int32, fresh: np.bool_, batches: Any, numbers: Numbers
    ) -> tuple[Carry, Mapping[str, jax.Array]]:
        """`count` steps on the first `count` of the batches; the metrics of each, float32[S]. The carry is donated."""

    @abstractmethod
    def shown(self, carry: Carry, values: Mapping[str, np.ndarray], numbers: Numbers) -> dict[str, Any]:
        """The fields a person sees beside the progress bar."""

    @abstractmethod
    def end_epoch(
        self, carry: Carry, epoch: int, step: int, numbers: Numbers, log: MetricsLog, bar: Progress, speed: Speed
    ) -> dict[str, Any]:
        """Writes the rows of an epoch; its values."""

    @abstractmethod
    def finish(self, carry: Carry, step: int, log: MetricsLog) -> Result:
        """Everything is computed and saved: the final row and what else there is to write."""

    @abstractmethod
    def left(self, status: str, row: Mapping[str, Any]) -> Result:
        """The run is left early, and saved; or, on a process that writes nothing, finished elsewhere."""

    def decided(self) -> bool:
        """Whether the run ends before its last epoch."""
        return False

    def info(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the carry, as JSON."""
        return {}

    def recall(self, info: Mapping[str, Any]) -> None:
        """The counterpart of `info`, on resume."""
        del info

    def turn(self, carry: Carry, step: int, saved: Checkpointer, log: MetricsLog) -> tuple[Carry, int]:
        """After an epoch: the carry and the step that the run goes on from."""
        del saved, log
        return carry, step

    def step_row(self, values: dict[str, Any]) -> dict[str, Any]:
        """The metrics of a step that were measured in it."""
        return values

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, as far as is known now."""
        return self.epoch_steps * max(self.epochs, self.end)

    # The loop.

    def arrays(self, epoch: int) -> Numbers:
        """The numbers of an epoch as the compiled steps take them."""
        return {name: np.float32(value) for name, value in self.numbers(epoch).items()}

    def means(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """The mean of each metric over an epoch, as its row begins."""
        return {name: float(np.float32(total) / self.epoch_steps) for name, total in sums.items()}

    def numbers_row(self, epoch: int) -> dict[str, float]:
        """The numbers of an epoch as its row has them."""
        return {f"progress/{name}": float(value) for name, value in self.numbers(epoch).items()}

    @property
    def _last_step(self) -> int:
        return self.epoch_steps * self.end

    def is_due(self, every: int, epoch: int) -> bool:
        """Whether an epoch is one of every so many, or the last one; never if `every` is 0."""
        return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == self.end)

    def say(self, text: str) -> None:
        """A line for people, of which there is one in a run of several processes."""
        if processes.is_first():
            label = self.start.label
            print(f"{label}: {text}" if label else text, file=self.notes, flush=True)

    def go(self) -> Result:
        """Runs to the end, a stop, or the time limit."""
        return drive(self.work())

    def work(self) -> Generator[Work, Done, Result]:
        """The same as a generator of dispatches: whoever drives it may compute those of several runs at once."""
        run, workdir, writes = self.start.run, self.workdir, processes.is_first()
        tensorboard = workdir / "tensorboard" if run.tensorboard else None
        with (
            Checkpointer(
                workdir / "checkpoints",
                epochs=self.horizon and self.horizon + 1,
                epoch_steps=self.epoch_steps,
                writes=writes,
            ) as saved,
            MetricsLog(workdir / "metrics.jsonl", tensorboard_dir=tensorboard, writes=writes) as log,
        ):
            carry, step = self._restore(saved)
            log.truncate_after(step)
            self.open(step)
            shown = run.progress if writes else "off"
            with Progress(self.total_steps, initial=step, enabled=shown, label=self.start.label) as bar:
                return (yield from self._loop(carry, step, saved, log, bar))

    def _restore(self, saved: Checkpointer) -> tuple[Carry, int]:
        found = saved.restore_latest(self.target)
        if found is None:
            return self.first(), 0
        old, new = self.start.old or {}, self.start.document
        drawn_now = provenance.other_draws(old, new)
        # config.json says what the run began with; what other resumes in between computed with, its checkpoints say.
        before = found.info.get(_OTHERWISE, {})
        redrawn = list(dict.fromkeys([*before.get("draws", ()), *drawn_now]))
        changed = list(dict.fromkeys([*before.get("bits", ()), *provenance.tolerance(old, new)]))
        self._otherwise = {_OTHERWISE: {"draws": redrawn, "bits": changed}} if redrawn or changed else {}
        how = f"that of an uninterrupted {self.noun} "
        how += f"to float tolerance only ({'; '.join(changed)})" if changed else "bit for bit"
        if redrawn:
            said = "; ".join([*redrawn, *changed])
            when = "are drawn from here on" if drawn_now else "were drawn on the way here"
            how = f"not that of an uninterrupted {self.noun}: other random numbers {when} ({said})"
        where = f"step {found.step} of {self.total_steps} (epoch {found.step // self.epoch_steps})"
        self.say(f"resuming at {where}; the result is {how}")
        self.recall(found.info)
        return found.state, found.step

    def _loop(
        self, carry: Carry, step: int, saved: Checkpointer, log: MetricsLog, bar: Progress
    ) -> Generator[Work, Done, Result]:
        run, stop = self.start.run, self.start.stop
        length = min(run.steps_per_dispatch, self.epoch_steps)
        last_save = time.monotonic()
        row: dict[str, Any] = {}
        compiled = self.start.compiled
        if step < self._last_step and not self.decided() and not compiled:
            self.say(f"compiling the {self.noun} (once: compiled programs are kept for the next start)")
        while step < self._last_step and not self.decided():
            epoch, first = divmod(step, self.epoch_steps)
            speed = Speed(time.monotonic())
            batches, numbers = self.batches(epoch), self.arrays(epoch)
            for start in range(first, self.epoch_steps, length):
                count = min(length, self.epoch_steps - start)
                chunk = jax.tree.map(lambda b, s=start, n=count: padded(b[s : s + n], length), batches)
                chunk = sharding.place(self.mesh, chunk, PartitionSpec(None, sharding.AXIS))
                began = time.monotonic()
                carry, rows = yield Work(self, carry, np.int32(count), np.bool_(start == 0), chunk, numbers)
                values = {name: np.asarray(value)[:count] for name, value in rows.items()}
                elapsed = time.monotonic() - began
                if not compiled:
                    self.say(f"compiled and ran the first {count} steps in {elapsed:.1f} s")
                    compiled = True
                else:
                    images, seconds = speed.images + count * self.images_per_step, speed.seconds + elapsed
                    speed = speed._replace(images=images, seconds=seconds)
                self._log_steps(log, epoch, step, values)
                step += count
                shown = self.shown(carry, values, numbers)
                bar.update(count, **shown, **{"images/s": round(count * self.images_per_step / elapsed)})
                epoch_done, moved = start + count == self.epoch_steps, False
                if epoch_done:
                    row = self.end_epoch(carry, epoch, step, numbers, log, bar, speed)
                    before = step
                    carry, step = self.turn(carry, step, saved, log)
                    moved = step != before
                    bar.update(step - before)
                over_time = run.time_limit > 0 and time.monotonic() - self.began > 60 * run.time_limit
                ended = self.decided()
                wish = processes.agreed(processes.Wish(stop.signum, over_time), events=self.info())
                stop.signum, leaving = wish.signum, bool(wish)
                due = epoch_done and (self.is_due(run.checkpoint_every, epoch) or self.horizon > 0)
                late = run.checkpoint_minutes > 0 and time.monotonic() - last_save > 60 * run.checkpoint_minutes
                if due or late or leaving or ended or moved:
                    saved.save(
                        step, carry, {"epoch": step // self.epoch_steps, "step": step, **self.info(), **self._otherwise}
                    )
                    last_save = time.monotonic()
                if leaving and not ended and step < self._last_step:
                    processes.together(saved.wait)
                    return self.left("interrupted" if stop else "time-limit", row)

        def finish() -> Result:
            saved.wait()
            return self.finish(carry, step, log) if processes.is_first() else self.left("finished", row)

        return processes.together(finish)

    def _log_steps(self, log: MetricsLog, epoch: int, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Rows of every log_every-th step (counted globally, so independent of the dispatches); stops at a NaN."""
        for i in range(len(next(iter(values.values())))):
            number = step + i + 1
            found = {name: value[i] for name, value in values.items()}
            check_finite(found, number)
            if number % self.start.run.log_every == 0:
                log.write("step", epoch, number, **self.step_row(found))


def padded(order: np.ndarray, length: int) -> np.ndarray:
    """Batches [S,B] up to the fixed length of a dispatch; the loop never reaches the repeated ones.

    >>> padded(np.array([[3, 4]]), 2).tolist()
    [[3, 4], [3, 4]]
    """
    return np.concatenate([order, np.repeat(order[:1], length - len(order), axis=0)]) if len(order) < length else order
