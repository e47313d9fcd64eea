"""What takes the place of logs and checkpoints on the processes of a run that write nothing: all but the first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prdarts_jax.devices import processes
from prdarts_jax.errors import warn
from prdarts_jax.run.checkpoint import Checkpointer
from prdarts_jax.run.metrics import EpochLog, Kind, MetricsLog


class _NoCheckpoints(Checkpointer):
    """Saves nothing."""

    def save(self, step: int, state: Any, info: Mapping[str, Any]) -> None:
        """Nothing: the state is the same on the first process, which saves it."""
        del step, state, info


class _NoLog(MetricsLog):
    """Writes nothing."""

    def truncate_after(self, step: int) -> None:
        """Nothing."""
        del step

    def write(self, kind: Kind, epoch: int, step: int, **values: Any) -> None:
        """Nothing: the first process has the same values."""
        del kind, epoch, step, values


class _NoEpochLog(EpochLog):
    """Writes nothing."""

    def __init__(self) -> None:
        pass

    def write(self, epoch: int, **values: Any) -> None:
        """Nothing."""
        del epoch, values


def checkpointer(directory: Path) -> Checkpointer:
    """The checkpoints of a run, as this process has them."""
    kind = Checkpointer if processes.is_first() else _NoCheckpoints
    return kind(directory, warn=warn)


def metrics_log(path: Path, tensorboard_dir: Path | None) -> MetricsLog:
    """The metrics of a run, as this process writes them."""
    return MetricsLog(path, tensorboard_dir=tensorboard_dir) if processes.is_first() else _NoLog(path)


def epoch_log(path: Path, epochs_done: int) -> EpochLog:
    """A file of one row an epoch, as this process writes it."""
    return EpochLog(path, epochs_done) if processes.is_first() else _NoEpochLog()
