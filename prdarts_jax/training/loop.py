"""The training of a derived network: epochs of dispatches, the test images, checkpoints, logs; one seed or several."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from prdarts_jax import schedules
from prdarts_jax.config.places import expanded
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data.prefetch import worker_count
from prdarts_jax.data.sources import Dataset
from prdarts_jax.data.stream_source import describe
from prdarts_jax.devices import processes
from prdarts_jax.errors import UserError
from prdarts_jax.optimizers import base_rate
from prdarts_jax.run import metrics, provenance
from prdarts_jax.run.loop import EpochLoop, Numbers, Speed, Start
from prdarts_jax.run.metrics import MetricsLog, check_finite
from prdarts_jax.run.progress import Progress
from prdarts_jax.run.signals import StopRequest
from prdarts_jax.run.workdir import (
    atomic_write_text,
    check_workdir,
    check_writable,
    claim,
    draw,
    prepared_for,
    report_path,
)
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training import feed as train_feed
from prdarts_jax.training import inputs as train_inputs
from prdarts_jax.training import program as train_program
from prdarts_jax.training.evaluation import Measure, make_measure
from prdarts_jax.training.feed import ResidentFeed, TrainPrograms
from prdarts_jax.training.inputs import TrainInputs
from prdarts_jax.training.program import TrainCarry

# Everything a training writes: what --overwrite may remove, and nothing else. The config goes last: while it is there,
# a folder that a kill left half-cleared is known as that of a training.
_OWN = (
    "metrics.jsonl",
    "genotype.json",
    "evaluation.json",
    "network.safetensors",
    "checkpoints",
    "tensorboard",
    "report.html",
    "config.json",
)


class TrainResult(NamedTuple):
    """How a training ended.

    Attributes:
      status: "finished" | "already-finished" | "interrupted" | "time-limit".
      workdir: where everything lies.
      metrics: the final row of a finished training, else the last epoch's of this start.
      report: path of report.html, or None.
      signum: the signal that interrupted it.
    """

    status: str
    workdir: Path
    metrics: Mapping[str, Any] = {}
    report: Path | None = None
    signum: int | None = None

    def _repr_html_(self) -> str:
        from prdarts_jax.report.notebook import result_html

        return result_html(f"Training: {self.status} ({self.workdir.name})", self.metrics, report=self.report)


class SeedsResult(NamedTuple):
    """How the trainings of several seeds ended.

    Attributes:
      status: as of a training; "finished" or "already-finished" if all of them are.
      runs: the trainings that were reached, in the order of the seeds.
      metrics: mean and sample standard deviation ({NAME: mean, NAME_std: ...}) of the last epoch's test figures.
      report: path of the common report, or None.
      signum: the signal that interrupted it.
    """

    status: str
    runs: tuple[TrainResult, ...]
    metrics: Mapping[str, float] = {}
    report: Path | None = None
    signum: int | None = None

    def _repr_html_(self) -> str:
        from prdarts_jax.report.notebook import result_html

        return result_html(f"Trainings of {len(self.runs)} seeds: {self.status}", self.metrics, report=self.report)


def train(
    config: TrainConfig,
    genotype: Genotype | str | Path,
    workdir: str | Path,
    *,
    weight_tx: Any = None,
    data: Dataset | None = None,
    sources: Mapping[str, str] | None = None,
    out: IO[str] | None = None,
) -> TrainResult:
    """Trains the network of a genotype from scratch; the same call again resumes, or reports a finished training.

    Args:
      config: what is computed and how it is run (`train_presets.resolve` makes one).
      genotype: a Genotype, a name of the zoo, a file, or the workdir of a search.
      workdir: the folder of this training.
      weight_tx: in place of the config's optimizer: a transformation, or a function of the config.
      data: in place of the config's source.
      sources: where each value of the config comes from, kept in config.json.
      out: where notes go (default: stdout).

    Returns:
      TrainResult. SIGTERM, SIGHUP, Ctrl-C and the time limit end it early with everything saved.

    Raises:
      UserError: a config, genotype, data set or workdir that is not possible; nothing is changed on disk.
      RunError: a metric is not finite, or the disk fails; the last good checkpoint is kept.
    """
    workdir = expanded(workdir, "workdir")
    inputs = _prepared(config, genotype, workdir, weight_tx, data)
    return _train(config, inputs, train_feed.make_programs(inputs), workdir, sources, out)


def train_seeds(
    config: TrainConfig,
    genotype: Genotype | str | Path,
    workdir: str | Path,
    seeds: Sequence[int],
    *,
    weight_tx: Any = None,
    data: Dataset | None = None,
    sources: Mapping[str, str] | None = None,
    out: IO[str] | None = None,
) -> SeedsResult:
    """Trains once a seed, each in WORKDIR/seed<N>, one after the other; the same call again resumes.

    Each folder is that of an ordinary training. WORKDIR/report.html compares them and has mean and standard deviation
    over the seeds; the headline is the last epoch. `run.time_limit` is that of all of them together.

    Args:
      config: of the training; its seed is replaced.
      genotype, weight_tx, data, sources, out: see `train`.
      workdir: the folder of the folders.
      seeds: different integers >= 0.

    Raises:
      UserError, RunError: see `train`; what is wrong with any of the folders is said before the first one trains.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {list(seeds)} is not possible; allowed: different seeds, at least one")
    workdir = expanded(workdir, "workdir")
    inputs = _prepared(config, genotype, workdir, weight_tx, data)
    configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
    folders = [workdir / f"seed{seed}" for seed in seeds]

    def check() -> None:
        for each, folder in zip(configs, folders, strict=True):
            check_writable(folder)
            document, overwrite = train_inputs.document(each, inputs, sources), each.run.overwrite
            check_workdir(folder, document, overwrite=overwrite, compared=train_inputs.compared)

    processes.on_first(check)
    programs, began = train_feed.make_programs(inputs), time.monotonic()
    found: list[TrainResult] = []
    for each, folder in zip(configs, folders, strict=True):
        # At least a moment: then a start gets on, however short its limit, and says itself that it is over.
        left = max(each.run.time_limit - (time.monotonic() - began) / 60, 1e-9) if each.run.time_limit else 0.0
        run = dataclasses.replace(each.run, time_limit=left)
        found.append(_train(dataclasses.replace(each, run=run), inputs, programs, folder, sources, out))
        if found[-1].status in ("interrupted", "time-limit"):
            return SeedsResult(found[-1].status, tuple(found), signum=found[-1].signum)
    page = processes.on_first(lambda: str(_report(folders, workdir) or ""))
    status = "finished" if any(one.status == "finished" for one in found) else "already-finished"
    return SeedsResult(status, tuple(found), over_seeds([one.metrics for one in found]), Path(page) if page else None)


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean and sample standard deviation (n - 1) of the test figures of final rows.

    >>> over_seeds([{"test_accuracy": 0.5, "step": 9}, {"test_accuracy": 0.75, "step": 9}])["test_accuracy"]
    0.625
    """
    found: dict[str, float] = {}
    for name in [name for name in rows[0] if "test_" in name] if rows else ():
        values = [row[name] for row in rows if name in row]
        found[name] = statistics.fmean(values)
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


# --- one training -----------------------------------------------------------------------------------------------------


def _prepared(config: TrainConfig, genotype: Genotype | str | Path, workdir: Path, tx: Any, data: Any) -> TrainInputs:
    """The parts of the training, or trainings, in a workdir that can be written."""
    return prepared_for(workdir, lambda: train_inputs.prepare(config, genotype, weight_tx=tx, data=data))


def _train(
    config: TrainConfig,
    inputs: TrainInputs,
    programs: TrainPrograms,
    workdir: Path,
    sources: Mapping[str, str] | None,
    out: IO[str] | None,
) -> TrainResult:
    document, compared = train_inputs.document(config, inputs, sources), train_inputs.compared
    processes.same(config, compared(document), document)
    provenance.warn_without_kernels(document["platform"]["cpu_kernels"])

    def begin() -> list[Any]:
        """(config.json of the training in the workdir or None, final row and report of a finished one)."""
        old = claim(lock, workdir, document, overwrite=config.run.overwrite, compared=compared, own=_OWN)
        rows = metrics.read(workdir / "metrics.jsonl") if old is not None else []
        final = [row for row in rows if row["kind"] == "final"]
        if final:
            return [old, metrics.values(final[-1]), str(report_path(workdir) or _report([workdir], workdir) or "")]
        if not (workdir / "genotype.json").is_file():
            atomic_write_text(workdir / "genotype.json", inputs.genotype.to_json(indent=1) + "\n")
        return [old, None, ""]

    with contextlib.ExitStack() as lock, StopRequest() as stop:
        old, final, page = processes.on_first(begin)
        if final is not None:
            return TrainResult("already-finished", workdir, final, Path(page) if page else None)
        start = Start(config.run, workdir, out if out is not None else sys.stdout, stop, old, document)
        with train_feed.feed(config, inputs, programs) as data:
            return _Training(config, inputs, programs, data, start).go()


class _Training(EpochLoop[TrainCarry, TrainResult]):
    """A training as epochs of SGD steps."""

    noun = "training"

    def __init__(
        self, config: TrainConfig, inputs: TrainInputs, programs: TrainPrograms, data: ResidentFeed, start: Start
    ) -> None:
        self.config, self.inputs, self.programs, self.data = config, inputs, programs, data
        self.problem, self.mesh, self.dataset = inputs.problem, inputs.mesh, inputs.dataset
        self.key, self.image = jax.random.key(config.seed), inputs.dataset.image
        super().__init__(
            start,
            epochs=config.epochs,
            epoch_steps=len(train_inputs.examples(config, self.dataset.train_size)) // config.batch_size,
            images_per_step=config.batch_size,
        )

    def numbers(self, epoch: int) -> dict[str, float]:
        """The learning rate and the rate of drop-path."""
        weights, high = self.config.weights, base_rate(self.config)
        return {
            "learning_rate": schedules.learning_rate(weights.schedule, epoch, self.epochs, high, weights.warmup_epochs),
            "drop_path": schedules.drop_path_rate(epoch, self.epochs, self.config.drop_path),
        }

    def first(self) -> TrainCarry:
        return train_program.initial_carry(self.problem, self.mesh, self.key, self.image)

    def target(self, info: Mapping[str, Any]) -> TrainCarry:
        del info
        return train_program.abstract_carry(self.problem, self.mesh, self.key, self.image)

    def open(self, step: int) -> None:
        self.say(describe(self.dataset))
        self.data.open(step)
        if self.config.evaluate_every:
            _ = self.measure  # too little memory for the test images shows before the first step

    def batches(self, epoch: int) -> np.ndarray:
        return self.data.order(epoch)

    def dispatch(
        self, carry: TrainCarry, count: np.int32, fresh: np.bool_, batches: Any, numbers: Numbers
    ) -> tuple[TrainCarry, Mapping[str, jax.Array]]:
        return self.data.dispatch(carry, count, fresh, batches, numbers)

    def shown(self, carry: TrainCarry, values: Mapping[str, np.ndarray], numbers: Numbers) -> dict[str, Any]:
        return {"loss": float(values["train_loss"].mean()), "accuracy": float(values["train_accuracy"].mean())}

    def end_epoch(
        self,
        carry: TrainCarry,
        epoch: int,
        step: int,
        numbers: Numbers,
        log: MetricsLog,
        bar: Progress,
        speed: Speed,
    ) -> dict[str, Any]:
        row = self.means(carry.sums) | self.numbers_row(epoch)
        clock = speed.fields()  # before the evaluation: images per second are those of training
        text = f"epoch {epoch + 1}/{self.epochs} | train {row['train_loss']:.3f} {row['train_accuracy']:.1%}"
        check_finite(row, step)
        if self.is_due(self.config.evaluate_every, epoch):
            began = time.monotonic()
            row |= self.evaluate(carry)
            clock["time_evaluation_s"] = time.monotonic() - began
            text += f" | test {row['test_loss']:.3f} {row['test_accuracy']:.2%}"
        row |= clock
        check_finite(row, step)
        log.write("epoch", epoch, step, **row)
        bar.epoch_line(text)
        return row

    @functools.cached_property
    def measure(self) -> Measure:
        """The figures of weights on the test images."""
        return make_measure(
            self.programs.evaluation,
            self.dataset,
            self.config.data,
            self.mesh,
            batch_size=self.config.batch_size,
            workers=worker_count(self.config.run.workers),
        )

    def evaluate(self, carry: TrainCarry) -> dict[str, float]:
        """The test figures of the weights, and of their averages."""
        row: dict[str, float] = {}
        for prefix, variables in (("", carry.state.variables), ("ema_", carry.state.ema)):
            if variables is not None:
                figures = self.measure(variables)
                row |= {f"{prefix}test_{name}": getattr(figures, name) for name in ("loss", "accuracy", "top5")}
        return row

    def left(self, status: str, row: Mapping[str, Any]) -> TrainResult:
        return TrainResult(status, self.workdir, row, None, self.start.stop.signum)

    def finish(self, carry: TrainCarry, step: int, log: MetricsLog) -> TrainResult:
        """The network as a flat file, the final row, which is what makes a training finished, and the report."""
        from prdarts_jax.interop import export

        variables, data = jax.device_get(carry.state.variables), self.dataset
        about = export.describe(
            self.problem.network, self.image, mean=data.mean, std=data.std, class_names=data.class_names
        )
        export.safetensors(variables._asdict(), self.workdir / export.NETWORK_FILE, about)

        rows = [row for row in metrics.read(self.workdir / "metrics.jsonl") if row["kind"] == "epoch"]
        last, evaluated = metrics.values(rows[-1]), [row for row in rows if "test_accuracy" in row]
        if evaluated:
            best = max(evaluated, key=lambda row: row["test_accuracy"])
            last |= {"best_test_accuracy": best["test_accuracy"], "best_epoch": best["epoch"]}
        last["time_train_s"] = sum(row.get("time_epoch_s", 0.0) for row in rows)
        log.write("final", self.epochs - 1, step, **last)
        log.close()
        return TrainResult("finished", self.workdir, last, _report([self.workdir], self.workdir))


def _report(folders: Sequence[Path], workdir: Path) -> Path | None:
    """WORKDIR/report.html about finished trainings, which can be made at any time."""

    def report() -> None:
        from prdarts_jax.report import page

        page.report(folders, None if folders == [workdir] else workdir / "report.html")

    draw("training", {"report.html": report})
    return report_path(workdir)
