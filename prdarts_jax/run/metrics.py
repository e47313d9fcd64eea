"""Metric rows (JSON lines) and their mirror in TensorBoard. Imports no jax."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, SupportsFloat

from prdarts_jax.config.search import RunConfig
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.run.workdir import atomic_write_text, reason

Row = dict[str, Any]
Kind = Literal["step", "epoch", "final"]


def comparable(row: Mapping[str, Any]) -> Row:
    """A row without the fields that depend on clock or machine: equal in two runs that computed the same bits.

    >>> comparable({"kind": "step", "step": 3, "loss": 0.5, "time_s": 9.1, "images_per_s": 80.0, "memory_peak": 1})
    {'kind': 'step', 'step': 3, 'loss': 0.5}
    """
    return {
        name: value
        for name, value in row.items()
        if not (name.startswith(("time_", "memory_")) or name.endswith("_per_s"))
    }


def check_finite(values: Mapping[str, SupportsFloat], step: int) -> None:
    """Stop the run at the first metric, in the order given, that is NaN or infinite.

    Args:
        values: metrics by name.
        step: the global step they belong to.

    Raises:
        RunError: one is not finite; the message names it and the step.

    >>> check_finite({"train_loss": 0.3, "val_loss": float("nan")}, 123)
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.RunError: val_loss is nan at step 123; the run stops, earlier checkpoints are kept
    """
    for name, value in values.items():
        if not math.isfinite(float(value)):
            raise RunError(f"{name} is {float(value)} at step {step}; the run stops, earlier checkpoints are kept")


def values(row: Mapping[str, Any]) -> Row:
    """The metrics of a row, without what says where it stands.

    >>> values({"kind": "epoch", "epoch": 0, "step": 45, "train_loss": 2.25})
    {'train_loss': 2.25}
    """
    return {name: value for name, value in row.items() if name not in ("kind", "epoch", "step")}


def _scalar(name: str, value: Any) -> int | float:
    try:
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, not one number") from error


def read(path: Path, *, damaged: bool = False) -> list[Row]:
    """The rows of a file of JSON lines, without a last line that was cut off; no file is no rows.

    Args:
        path: the file.
        damaged: whether other lines that are no JSON objects are passed over.

    Raises:
        UserError: another line is not a JSON object.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "metrics.jsonl").write_text('{"kind": "step", "step": 1}\\n{"kind": "st')
    ...     read(Path(folder, "metrics.jsonl"))
    [{'kind': 'step', 'step': 1}]
    """
    rows: list[Row] = []
    lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if damaged or number == len(lines):  # the last line is what a kill in mid-write leaves
                continue
            raise UserError(f"{path}: line {number} is not a JSON object; remove that line or the run") from error
        rows += [row] if row else []
    return rows


class RowLog(contextlib.ExitStack):
    """A file of JSON rows that a run appends to, and cuts back where it resumes; a row after `close` opens it again.

    Args:
        path: the file; its folder must exist by the first row. Nothing is touched before.
        writes: False on a process that leaves it to another one: nothing is touched.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        super().__init__()
        self.path, self._writes = Path(path), writes
        self._stream: IO[str] | None = None

    def keep(self, wanted: Callable[[Row], bool], *, damaged: bool = False) -> list[Row]:
        """Drops all rows but the wanted ones, and a half-written last line, atomically; what is left. See `read`."""
        if not self._writes or not self.path.exists():
            return []
        self.close()
        rows = [row for row in read(self.path, damaged=damaged) if wanted(row)]
        atomic_write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def append(self, row: Mapping[str, Any], *, sync: bool = False) -> None:
        """Adds a row, which other programs see at once; `sync` also forces it to the disk.

        Raises:
            RunError: the file could not be written.
        """
        try:
            if self._stream is None or self._stream.closed:
                self._stream = self.enter_context(self._open())
            self._stream.write(json.dumps(row) + "\n")
            self._stream.flush()
            if sync:
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise RunError(f"{self.path} could not be written: {reason(error)}") from error

    def _open(self) -> IO[str]:
        """For appending, after cutting off a half-written line that would swallow the next row."""
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)
        return self.path.open("a", encoding="utf-8")


class MetricsLog(RowLog):
    """Appends rows to a metrics file; every row is visible to other programs as soon as it is written.

    Rows are flat. NaN and infinities are written as Python's json does (`NaN`, `Infinity`). Write the rows of a step
    before its checkpoint is saved: then a resumed run, which drops the rows after its step, misses none.

    Args:
        path, writes: see `RowLog`.
        tensorboard_dir: also write every number as a TensorBoard scalar (needs tensorboardX).

    Raises:
        UserError: `tensorboard_dir` is given and tensorboardX is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, MetricsLog(Path(folder) / "metrics.jsonl") as log:
    ...     log.write("epoch", epoch=0, step=45, train_loss=2.25)
    ...     log.path.read_text()
    '{"kind": "epoch", "epoch": 0, "step": 45, "train_loss": 2.25}\\n'
    """

    def __init__(self, path: Path, *, tensorboard_dir: Path | None = None, writes: bool = True) -> None:
        super().__init__(path, writes=writes)
        if writes and tensorboard_dir is not None and importlib.util.find_spec("tensorboardX") is None:
            raise UserError(
                f"tensorboard: {tensorboard_dir} needs the package tensorboardX; install it: pip install tensorboardX"
            )
        self._tensorboard_dir = tensorboard_dir
        self._mirror: Any = None
        self._first_step: int | None = None  # of the rows to come, after a truncation
        self._present: set[tuple[str, int]] = set()  # (kind, epoch) of the rows of the restored step

    def truncate_after(self, step: int) -> None:
        """Drop all rows with a step above `step` and a half-written last line, atomically.

        A row of `step` itself that the resumed run writes again (same kind and epoch) is then ignored: a kill between
        a checkpoint and the next row must not double rows.
        """
        rows = self.keep(lambda row: bool(row["step"] <= step))
        self._first_step = step + 1
        self._present = {(row["kind"], row["epoch"]) for row in rows if row["step"] == step}

    def write(self, kind: Kind, epoch: int, step: int, **values: Any) -> None:
        """Append one row; epoch and final rows are also forced to the disk.

        Args:
            kind: step, epoch or final.
            epoch: from 0.
            step: global step, counted over epochs.
            **values: one number each (Python, NumPy or jax scalars).

        Raises:
            TypeError: a value is not one number.
            RunError: the file could not be written.
        """
        if kind not in ("step", "epoch", "final"):
            raise ValueError(f"kind {kind!r}: allowed: step | epoch | final")
        if not self._writes or (self._first_step == step + 1 and (kind, epoch) in self._present):
            return
        numbers_ = {name: _scalar(name, value) for name, value in values.items()}
        self.append({"kind": kind, "epoch": int(epoch), "step": int(step), **numbers_}, sync=kind != "step")
        if self._tensorboard_dir is None:
            return
        if self._mirror is None:
            from tensorboardX import SummaryWriter

            # purge_step hides what the killed run had already mirrored of the steps that are computed again.
            mirror = SummaryWriter(str(self._tensorboard_dir), purge_step=self._first_step)
            self._mirror = self.enter_context(contextlib.closing(mirror))
        for name, value in numbers_.items():
            self._mirror.add_scalar(f"{kind}/{name}", value, int(step))

    def close(self) -> None:
        """Close the files; a later `write` opens them again."""
        super().close()
        self._mirror = None


class EpochLog(RowLog):
    """A file of one JSON row an epoch; on resume the rows of epochs that are computed again are dropped.

    Args:
        path, writes: see `RowLog`.
        epochs_done: how many epochs keep their rows.
    """

    def __init__(self, path: Path, epochs_done: int, *, writes: bool = True) -> None:
        super().__init__(path, writes=writes)
        self.keep(lambda row: bool(row["epoch"] < epochs_done), damaged=True)

    def write(self, epoch: int, **values: Any) -> None:
        """Append the row of an epoch.

        Raises:
          RunError: the file could not be written.
        """
        if self._writes:
            self.append({"epoch": epoch, **values})
            self.close()


def check_tensorboard(run: RunConfig) -> None:
    """Refuses `run.tensorboard` without the package that writes it.

    >>> check_tensorboard(RunConfig(tensorboard=False))
    """
    if run.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("run.tensorboard: True needs the package tensorboardX; allowed: false, or install tensorboardX")
